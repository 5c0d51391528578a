"""The updates of one PPO iteration: epochs x mini-batches x micro-batches.

The loss of a mini-batch is a sum over tokens divided by the counted tokens of the whole mini-batch, over all its
micro-batches and processes. How it is cut never changes the update.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor

from lmkit.errors import Stopped
from lmkit.masked import AllReduce, alone, whiten
from lmkit.rl.actor_critic import ActorCritic
from lmkit.rl.advantages import generalized_advantages, token_rewards
from lmkit.rl.config import PPOConfig
from lmkit.rl.kl import kl_per_token
from lmkit.rl.losses import log_ratio, policy_loss, value_loss
from lmkit.rl.rollout import Rollout, by_length


def advantages_and_returns(
    rollout: Rollout, config: PPOConfig, kl_coef: float, all_reduce: AllReduce = alone
) -> tuple[Tensor, Tensor]:
    """Whitened advantages and returns of a rollout, each [B, C]; means are over all processes."""
    mask = rollout.mask
    scores = rollout.scores - config.missing_eos_penalty * ~rollout.stopped
    penalties = kl_coef * kl_per_token(rollout.logprobs, rollout.ref_logprobs, "k1")
    rewards = token_rewards(scores, penalties, mask)
    if config.whiten_rewards:
        rewards = whiten(rewards, mask, shift_mean=False, all_reduce=all_reduce)
    advantages, returns = generalized_advantages(rewards, rollout.values, mask, gamma=config.gamma, lam=config.lam)
    return whiten(advantages, mask, all_reduce=all_reduce), returns


def make_optimizer(model: ActorCritic, config: PPOConfig) -> torch.optim.Optimizer:
    """AdamW with two groups: the policy's parameters, and those of the critic that are not the policy's."""
    groups = [{"params": list(part.parameters())} for part in (model.policy, model.critic)]
    betas = (config.adam_beta1, config.adam_beta2)
    return torch.optim.AdamW(groups, betas=betas, eps=config.adam_epsilon, weight_decay=config.weight_decay, fused=True)


def mini_batches(num_rows: int, config: PPOConfig, generator: torch.Generator) -> Iterator[Tensor]:
    """Row numbers of every mini-batch of an iteration: each epoch shuffles the rows and cuts them into equal parts."""
    for _ in range(config.num_ppo_epochs):
        yield from torch.randperm(num_rows, generator=generator).tensor_split(config.num_mini_batches)


def update(
    rollout: Rollout,
    advantages: Tensor,
    returns: Tensor,
    *,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    config: PPOConfig,
    rates: Sequence[float],
    accelerator: Accelerator,
    generator: torch.Generator,
) -> dict[str, float]:
    """Learns from a rollout, num_ppo_epochs x num_mini_batches optimizer steps; means of what happened, as metrics.

    model: the prepared ActorCritic. rates: a factor on the learning rates for each of the steps. generator: shuffles.
    Raises Stopped, the step not taken, when a loss or gradient is not finite.
    """
    totals: dict[str, Tensor] = {}
    norms, largest, first_ratio = [], -math.inf, 0.0
    bases = (config.learning_rate, config.value_learning_rate or 3 * config.learning_rate)
    model.train()
    for step, index in enumerate(mini_batches(len(rollout.scores), config, generator)):
        batch, targets = rollout.rows(index), (advantages[index], returns[index])
        count = accelerator.reduce(batch.completion_lengths.sum().to(accelerator.device), reduction="sum")
        parts = by_length(batch, config.per_device_train_batch_size)
        for number, rows in enumerate(parts):
            # Gradients are exchanged between processes once, after the last micro-batch.
            with accelerator.no_sync(model) if number < len(parts) - 1 else contextlib.nullcontext():
                loss, sums = micro_batch_loss(batch, rows, *targets, model, config, accelerator.device)
                # Processes' gradients are averaged; this loss is a mean over the tokens of all of them.
                accelerator.backward(loss * accelerator.num_processes / count)
            largest = max(largest, sums.pop("log_ratio_max").item())
            distance = sums.pop("log_ratio_distance").item()
            first_ratio = max(first_ratio, distance) if step == 0 else first_ratio
            for name, value in sums.items():
                totals[name] = totals.get(name, 0.0) + value
        groups = optimizer.param_groups
        norms.append([accelerator.clip_grad_norm_(g["params"], config.max_grad_norm).item() for g in groups])
        if not math.isfinite(sum(norms[-1]) + float(totals["loss"])):
            raise Stopped(
                f"at update {step + 1} the summed loss is {float(totals['loss'])} and the gradient norms {norms[-1]} "
                "(policy, critic); they must be finite, so the update was not made. Lower learning_rate or look at the "
                "rewards."
            )
        for group, base in zip(groups, bases):
            group["lr"] = base * rates[step]
        optimizer.step()
        optimizer.zero_grad()
    extremes = torch.tensor([largest, first_ratio], device=accelerator.device)
    largest, first_ratio = accelerator.gather(extremes).reshape(-1, 2).max(dim=0).values.tolist()
    return _means(totals, norms, accelerator) | {
        "val/ratio_max": math.exp(largest),
        "val/first_ratio_error": first_ratio,
        "lr": bases[0] * rates[-1],
        "critic_lr": bases[1] * rates[-1],
    }


def micro_batch_loss(batch: Rollout, rows: Tensor, advantages, returns, model, config, device):
    """The summed loss of some rows of a mini-batch, and detached sums for the metrics.

    advantages, returns: [B, >= C] of the mini-batch. The loss is a sum over tokens: its caller divides.
    """
    part = batch.rows(rows)
    mask = part.mask
    width = mask.shape[1]
    tables = (part.logprobs, part.values, advantages[rows, :width], returns[rows, :width])
    old_logprobs, old_values, advantages, returns = (table[mask].to(device) for table in tables)
    inputs = (tensor.to(device) for tensor in part.model_inputs())
    logprobs, values, entropies = model(*inputs, config.temperature, config.entropy_coef > 0)
    policy = policy_loss(
        logprobs, old_logprobs, advantages, cliprange=config.cliprange, dual_clip=config.dual_clip
    ).sum()
    value = value_loss(values, old_values, returns, cliprange_value=config.cliprange_value).sum()
    loss = policy + config.vf_coef * value
    if entropies is not None:
        loss = loss - config.entropy_coef * entropies.sum()
    with torch.no_grad():
        difference = log_ratio(logprobs, old_logprobs)
        ratio = difference.exp()
        sums = {
            "count": torch.tensor(float(len(ratio)), device=device),
            "loss": loss.detach(),
            "policy_loss": policy.detach(),
            "value_loss": value.detach(),
            "approxkl": (difference**2).sum() / 2,
            "approxkl_k3": (ratio - 1 - difference).sum(),
            "clipped_low": ((ratio < 1 - config.cliprange) & (advantages < 0)).sum(),
            "clipped_high": ((ratio > 1 + config.cliprange) & (advantages > 0)).sum(),
            "value_clipped": ((values - old_values).abs() > config.cliprange_value).sum(),
            "ratio": ratio.sum(),
            "ratio_squared": (ratio**2).sum(),
            "log_ratio_max": difference.max(),
            "log_ratio_distance": difference.abs().max(),
        }
    return loss, sums


def _means(totals: dict[str, Tensor], norms: list[list[float]], accelerator: Accelerator) -> dict[str, float]:
    """Token means over all updates and processes, under TRL's names."""
    packed = torch.stack([value.float().to(accelerator.device) for value in totals.values()])
    reduced = dict(zip(totals, accelerator.reduce(packed, reduction="sum").tolist()))
    mean = {name: value / reduced["count"] for name, value in reduced.items()}
    policy_norm, critic_norm = torch.tensor(norms).mean(0).tolist()
    return {
        "loss/policy_avg": mean["policy_loss"],
        "loss/value_avg": mean["value_loss"],
        "policy/approxkl_avg": mean["approxkl"],
        "policy/approxkl_k3": mean["approxkl_k3"],
        "policy/clipfrac_avg": mean["clipped_low"] + mean["clipped_high"],
        "policy/clipfrac_low": mean["clipped_low"],
        "policy/clipfrac_high": mean["clipped_high"],
        "policy/grad_norm": policy_norm,
        "val/grad_norm": critic_norm,
        "val/clipfrac_avg": mean["value_clipped"],
        "val/ratio": mean["ratio"],
        "val/ratio_var": mean["ratio_squared"] - mean["ratio"] ** 2,
    }
