"""The updates of one PPO iteration: epochs x mini-batches x micro-batches.

The loss of a mini-batch is a sum over tokens divided by the counted tokens of the whole mini-batch, over all its
micro-batches and processes. How it is cut never changes the update.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor

from lmkit.errors import Stopped
from lmkit.masked import whiten
from lmkit.rl.actor_critic import ActorCritic
from lmkit.rl.advantages import generalized_advantages, leave_one_out, token_rewards
from lmkit.rl.config import PPOConfig
from lmkit.rl.kl import kl_per_token
from lmkit.rl.losses import importance_weights, log_ratio, policy_loss, value_loss
from lmkit.rl.ptx import add_gradients
from lmkit.rl.rollout import Rollout
from lmkit.rl.shares import micro_batches
from lmkit.training.sharding import full

EARLY_STOP = 1.5  # times target_kl, as in OpenAI's Spinning Up


def counted_tokens(rollout: Rollout, config: PPOConfig) -> Tensor:
    """bool [B, C]: the tokens that losses and means count; with truncation "mask" none of a completion cut off."""
    return rollout.mask & rollout.stopped[:, None] if config.truncation == "mask" else rollout.mask


def advantages_and_returns(rollout: Rollout, config: PPOConfig, kl_coef: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns of a rollout (that of all processes), each [B, C].

    By a critic advantages are whitened over the counted tokens. By rloo each token has its completion's advantage, and
    returns are 0.
    """
    mask = counted_tokens(rollout, config)
    rewards = token_rewards(*scores_and_penalties(rollout, config, kl_coef), mask)
    if config.advantage_estimator == "rloo":
        advantages = leave_one_out(rewards.sum(1), mask.any(1), config.completions_per_prompt)
        return advantages[:, None] * mask, torch.zeros_like(rewards)
    if config.whiten_rewards:
        rewards = whiten(rewards, mask, shift_mean=False)
    decays = {"gamma": config.gamma, "lam": config.lam}
    advantages, returns = generalized_advantages(
        rewards, rollout.values, mask, **decays, final_values=rollout.final_values
    )
    return whiten(advantages, mask), returns


def scores_and_penalties(rollout: Rollout, config: PPOConfig, kl_coef: float) -> tuple[Tensor, Tensor]:
    """What a completion is paid at its end [B], and what is taken for the KL at each token [B, C]."""
    scores = rollout.scores - config.missing_eos_penalty * ~rollout.stopped
    if config.truncation == "bootstrap":  # what a completion cut off would have earned is in the critic's value
        scores = scores.masked_fill(~rollout.stopped, 0)
    if config.kl_placement == "loss":
        return scores, torch.zeros_like(rollout.logprobs)
    return scores, kl_coef * kl_per_token(rollout.logprobs, rollout.ref_logprobs, config.kl_estimator)


def paid_metrics(rollout: Rollout, config: PPOConfig, kl_coef: float) -> dict[str, float]:
    """Means over completions of what they are paid beside the score, and in all; scores are those that are learnt from.

    With truncation "mask" completions cut off are paid nothing and not counted.
    """
    scores, penalties = scores_and_penalties(rollout, config, kl_coef)
    paid = counted_tokens(rollout, config).any(1)
    rows, other = max(int(paid.sum()), 1), -penalties[paid].sum().item()
    return {
        "objective/non_score_reward": other / rows,
        "objective/rlhf_reward": (scores[paid].sum().item() + other) / rows,
    }


def make_optimizer(model: ActorCritic, config: PPOConfig) -> torch.optim.Optimizer:
    """AdamW with a group for the policy's parameters, and if there is a critic one for those that are its alone."""
    groups = [{"params": parameters} for parameters in model.parameter_groups()]
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
    kl_coef: float,
    rates: Sequence[float],
    accelerator: Accelerator,
    generator: torch.Generator,
    ptx: Callable[[int], Mapping[str, Tensor]] | None = None,
) -> dict[str, float]:
    """Learns from a rollout, num_ppo_epochs x num_mini_batches optimizer steps; means of what happened, as metrics.

    rollout, advantages, returns: of all processes, in each of them; a mini-batch is shared out so that every process
        has about as many tokens. generator: shuffles, and is the same in all processes.
    model: the prepared ActorCritic. rates: a factor on the learning rates for each of the steps.
    ptx: number of the step -> input_ids and labels [B, T] (the next token, or -100) of the text that is mixed in, this
        process's part.

    With `target_kl`, a mini-batch whose KL from the rollout's policy (k3, mean over tokens) is over 1.5 times it ends
    the iteration before its step, in all processes. Raises Stopped, the step not taken, when a loss or gradient is
    not finite.
    """
    totals: dict[str, Tensor] = {}
    norms, ptx_losses, largest, first_ratio = [], [], -math.inf, 0.0
    bases = (config.learning_rate, config.value_learning_rate or 3 * config.learning_rate)
    groups, counted = optimizer.param_groups, counted_tokens(rollout, config)
    model.train()
    for step, index in enumerate(mini_batches(len(rollout.scores), config, generator)):
        batch, tables = rollout.rows(index), (advantages[index], returns[index], counted[index])
        count = tables[-1].sum().clamp(min=1).to(accelerator.device)
        if ptx is not None:
            ptx_losses.append(add_gradients(ptx(step), model, config, accelerator))
        approxkl = torch.zeros((), device=accelerator.device)
        size, place = config.per_device_train_batch_size, (accelerator.process_index, accelerator.num_processes)
        parts = micro_batches(batch.prompt_lengths + batch.completion_lengths, size, *place)
        for number, (rows, counts) in enumerate(parts):
            # Gradients are exchanged between processes once, after the last micro-batch.
            with accelerator.no_sync(model) if number < len(parts) - 1 else contextlib.nullcontext():
                given = (*tables[:2], tables[2] & counts)
                loss, sums = micro_batch_loss(batch, rows, *given, model, config, kl_coef, accelerator.device)
                # Processes' gradients are averaged; this loss is a mean over the tokens of all of them.
                accelerator.backward(loss * accelerator.num_processes / count)
            largest = max(largest, sums.pop("log_ratio_max").item())
            distance = sums.pop("log_ratio_distance").item()
            first_ratio = max(first_ratio, distance) if step == 0 else first_ratio
            approxkl += sums["approxkl_k3"]
            for name, value in sums.items():
                totals[name] = totals.get(name, 0.0) + value
        bound = math.inf if config.target_kl is None or step == 0 else EARLY_STOP * config.target_kl
        if bound < math.inf and accelerator.reduce(approxkl, reduction="sum") / count > bound:
            optimizer.zero_grad()
            break
        clipped = [accelerator.clip_grad_norm_(group["params"], config.max_grad_norm) for group in groups]
        norms.append([full(norm).item() for norm in clipped])
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
    metrics = _means(totals, norms, accelerator) | {
        "policy/num_updates": len(norms),
        "val/ratio_max": math.exp(largest),
        "val/first_ratio_error": first_ratio,
        "lr": bases[0] * rates[len(norms) - 1],
    }
    if len(groups) > 1:
        metrics["critic_lr"] = bases[1] * rates[len(norms) - 1]
    if ptx_losses:
        metrics["loss/ptx"] = sum(ptx_losses) / len(ptx_losses)
    return metrics


def micro_batch_loss(batch: Rollout, rows: Tensor, advantages, returns, counted, model, config, kl_coef, device):
    """The summed loss of some rows of a mini-batch, and detached sums for the metrics.

    advantages, returns, counted: [B, >= C] of the mini-batch. The loss is a sum over them: its caller divides.
    """
    part = batch.rows(rows)
    mask = part.mask
    width = mask.shape[1]
    given = (part.logprobs, part.ref_logprobs, part.sampled_logprobs, part.values)
    given += (advantages[rows, :width], returns[rows, :width], counted[rows, :width])
    old_logprobs, ref_logprobs, sampled, old_values, advantages, returns, counts = (t[mask].to(device) for t in given)
    inputs = (tensor.to(device) for tensor in part.model_inputs())
    logprobs, values, entropies = model(*inputs, config.temperature, config.entropy_coef > 0)
    policy = policy_loss(logprobs, old_logprobs, advantages, cliprange=config.cliprange, dual_clip=config.dual_clip)
    if config.importance_sampling_cap is not None:
        policy = policy * importance_weights(old_logprobs, sampled, cap=config.importance_sampling_cap)
    value = value_loss(values, old_values, returns, cliprange_value=config.cliprange_value)
    losses = policy + config.vf_coef * value
    if config.kl_placement == "loss":
        losses = losses + kl_coef * kl_per_token(logprobs, ref_logprobs, config.kl_estimator)
    if entropies is not None:
        losses = losses - config.entropy_coef * entropies
    loss = losses.masked_fill(~counts, 0).sum()
    with torch.no_grad():
        difference = log_ratio(logprobs, old_logprobs)
        ratio = difference.exp()
        far = (values - old_values).abs() > config.cliprange_value
        means = {
            "count": torch.ones_like(ratio),
            "policy_loss": policy,
            "value_loss": value,
            "approxkl": difference**2 / 2,
            "approxkl_k3": ratio - 1 - difference,
            "clipped_low": (ratio < 1 - config.cliprange) & (advantages < 0),
            "clipped_high": (ratio > 1 + config.cliprange) & (advantages > 0),
            # Where the clipped error is the larger one the value has no gradient.
            "value_clipped": (value > (values - returns) ** 2 / 2) & far,
            "ratio": ratio,
            "ratio_squared": ratio**2,
        }
        sums = {name: (value * counts).sum() for name, value in means.items()}
        sums |= {"loss": loss.detach(), "log_ratio_max": difference.max(), "log_ratio_distance": difference.abs().max()}
    return loss, sums


def _means(totals: dict[str, Tensor], norms: list[list[float]], accelerator: Accelerator) -> dict[str, float]:
    """Token means over all updates and processes, under TRL's names; those of the critic where there is one."""
    packed = torch.stack([value.float().to(accelerator.device) for value in totals.values()])
    reduced = dict(zip(totals, accelerator.reduce(packed, reduction="sum").tolist()))
    mean = {name: value / max(reduced["count"], 1.0) for name, value in reduced.items()}
    policy_norm, *critic_norm = torch.tensor(norms).mean(0).tolist()
    metrics = {
        "loss/policy_avg": mean["policy_loss"],
        "policy/approxkl_avg": mean["approxkl"],
        "policy/approxkl_k3": mean["approxkl_k3"],
        "policy/clipfrac_avg": mean["clipped_low"] + mean["clipped_high"],
        "policy/clipfrac_low": mean["clipped_low"],
        "policy/clipfrac_high": mean["clipped_high"],
        "policy/grad_norm": policy_norm,
        "val/ratio": mean["ratio"],
        "val/ratio_var": mean["ratio_squared"] - mean["ratio"] ** 2,
    }
    if critic_norm:
        metrics["loss/value_avg"], metrics["val/clipfrac_avg"] = mean["value_loss"], mean["value_clipped"]
        metrics["val/grad_norm"] = critic_norm[0]
    return metrics
