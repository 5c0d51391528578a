"""What a rollout says about the run: KL, scores, lengths, entropy, critic; and warnings that name the likely cause."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset

from lmkit.rl.config import PPOConfig
from lmkit.rl.kl import kl_per_token
from lmkit.rl.rollout import Rollout, completion_ids

NGRAM = 4
NUM_SAMPLES = 4  # completions kept in samples.jsonl at each evaluation
EVALUATED = {
    "eval/score": "objective/scores",
    "eval/kl": "objective/kl",
    "eval/completion_length": "rollout/completion_length_mean",
    "eval/eos_rate": "rollout/eos_rate",
    "eval/entropy": "policy/entropy_avg",
}
RATIO_TOLERANCE = {"no": 1e-4, "bf16": 5e-2}  # of the first mini-batch's log ratio, by precision
SAMPLER_TOLERANCE = 0.05  # mean over tokens; rounding to bfloat16 makes a few thousandths
CUT_TOLERANCE = 0.05  # what a log ratio may be over that of the cap: with a cap of 1 half of all rounding is


def rollout_metrics(rollout: Rollout, config: PPOConfig, kl_coef: float) -> dict[str, float]:
    """Means over the completions or tokens of all processes, whose rollout it is.

    Names are TRL's, with "completion" for "response".
    objective/kl and objective/entropy are sums over a completion's tokens, in nats; policy/entropy_avg is per token.
    sampling/kl, of the policy from what the completions were drawn with, is a sum too, and not 0 where another engine
    or an older policy drew them; sampling/importance_sampling_capped is the share of tokens whose weight is
    cut by more than rounding.
    """
    mask = rollout.mask
    k1 = kl_per_token(rollout.logprobs, rollout.ref_logprobs, "k1")
    k3 = kl_per_token(rollout.logprobs, rollout.ref_logprobs, "k3")
    lengths = rollout.completion_lengths
    lag = ((rollout.sampled_logprobs - rollout.logprobs) * mask).double()
    mismatch = lag.abs()
    totals = rollout.prompt_lengths + lengths
    completions = [tuple(ids) for ids in completion_ids(rollout)]
    sums = {
        "rows": len(lengths),
        "tokens": lengths.sum(),
        "kl": (k1 * mask).sum(),
        "kl_k3": (k3 * mask).sum(),
        "surprisal": -rollout.logprobs.sum(),
        "entropy": rollout.entropies.sum(),
        "scores": rollout.scores.sum(),
        "scores_squared": (rollout.scores.double() ** 2).sum(),
        "stopped": rollout.stopped.sum(),
        "values": rollout.values.sum(),
        "mismatch": mismatch.sum(),
        "lag": lag.sum(),
        "places": totals.max() * len(totals),
        "filled": totals.sum(),
        "distinct": len(set(completions)),
        "repeated": sum(repeated_ngrams(ids) for ids in completions),
    }
    total = {name: float(value) for name, value in sums.items()}
    rows, tokens = total["rows"], total["tokens"]
    score, kl = total["scores"] / rows, total["kl"] / rows
    metrics = {
        "objective/scores": score,
        "objective/kl": kl,
        "rollout/completion_length_mean": tokens / rows,
        "rollout/eos_rate": total["stopped"] / rows,
        "objective/scores_std": max(total["scores_squared"] / rows - score**2, 0.0) ** 0.5,
        "objective/kl_k3": total["kl_k3"] / rows,
        "objective/entropy": total["surprisal"] / rows,
        "objective/kl_coef": kl_coef,
        "policy/entropy_avg": total["entropy"] / tokens,
        "val/mean": total["values"] / tokens,
        "val/num_eos_tokens": total["stopped"],
        "rollout/completion_length_max": float(lengths.max()),
        "rollout/truncated_rate": 1 - total["stopped"] / rows,
        "rollout/pad_waste": 1 - total["filled"] / total["places"],
        "rollout/unique_frac": total["distinct"] / rows,
        "rollout/repeat_ngram": total["repeated"] / rows,
        "sampling/logprob_diff_mean": total["mismatch"] / tokens,
        "sampling/logprob_diff_max": float(mismatch.max()),
        "sampling/kl": total["lag"] / rows,
    }
    if config.importance_sampling_cap is not None:
        capped = (-lag > math.log(config.importance_sampling_cap) + CUT_TOLERANCE) & mask
        metrics["sampling/importance_sampling_capped"] = float(capped.sum()) / tokens
    return metrics


def evaluation_metrics(
    metrics: Mapping[str, float], scores: Sequence[float], ref_scores: Sequence[float]
) -> dict[str, float]:
    """Those of `rollout_metrics` under eval/ names, and how the scores stand against the reference's on the same rows.

    eval/win_rate_vs_ref is the share of rows with the better score, a tie half.
    """
    wins = [(own > other) + (own == other) / 2 for own, other in zip(scores, ref_scores)]
    gain = sum(scores) - sum(ref_scores)
    against = {"eval/win_rate_vs_ref": sum(wins) / len(wins), "eval/score_gain": gain / len(wins)}
    return {name: metrics[source] for name, source in EVALUATED.items()} | against


def sample_table(
    rollout: Rollout, rows: Dataset, index: Sequence[int], decode: Callable[[list[list[int]]], list[str]]
) -> list[dict[str, Any]]:
    """The first rows of a rollout for a person to read; kl is summed over the completion, in nats."""
    few = rollout.rows(torch.arange(min(NUM_SAMPLES, len(index))))
    kls = (few.logprobs - few.ref_logprobs).sum(1).tolist()
    prompts = rows.select(index[: len(kls)])["prompt"]
    columns = (prompts, decode(completion_ids(few)), few.scores.tolist(), kls, few.finish_reasons)
    names = ("prompt", "completion", "score", "kl", "finish_reason")
    return [dict(zip(names, values)) for values in zip(*columns)]


def reward_metrics(parts: Mapping[str, torch.Tensor], accelerator: Accelerator) -> dict[str, float]:
    """reward/NAME_mean and reward/NAME_std of each source [B], where there are several; over all processes."""
    if len(parts) < 2:
        return {}
    sums = {"rows": len(next(iter(parts.values())))}
    for name, scores in parts.items():
        sums |= {f"{name}_mean": scores.double().sum(), f"{name}_std": (scores.double() ** 2).sum()}
    total = _reduced(sums, accelerator)
    found = {name: value / total["rows"] for name, value in total.items() if name != "rows"}
    for name in parts:
        found[f"{name}_std"] = max(found[f"{name}_std"] - found[f"{name}_mean"] ** 2, 0.0) ** 0.5
    return {f"reward/{name}": value for name, value in found.items()}


def explained_variance(rollout: Rollout, returns: torch.Tensor, mask: torch.Tensor) -> dict[str, float]:
    """val/explained_var: 1 - variance of (returns - values) / variance of returns, over the tokens that count."""
    wanted, error = returns[mask].double(), (returns - rollout.values)[mask].double()
    variance, unexplained = (x.var(correction=0).item() if len(x) else 0.0 for x in (wanted, error))
    return {"val/explained_var": 1 - unexplained / variance if variance > 0 else 0.0}


def repeated_ngrams(ids: tuple[int, ...], size: int = NGRAM) -> float:
    """Share of a completion's n-grams that occurred before in it.

    >>> repeated_ngrams((1, 2, 1, 2, 1), size=2)
    0.5
    """
    ngrams = [ids[i : i + size] for i in range(len(ids) - size + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def warnings(metrics: dict[str, float], accelerator: Accelerator) -> dict[str, str]:
    """What looks broken in an iteration, by kind: the number seen and its likely cause."""
    found = {}
    ratio_error = metrics["val/first_ratio_error"]
    if ratio_error > RATIO_TOLERANCE[accelerator.mixed_precision]:
        found["ratio"] = (
            f"the first mini-batch's log ratio reaches {ratio_error:.2g} where it should be 0: old log-probabilities "
            "and the training forward disagree (dropout, precision, or a model that depends on its padding)"
        )
    mismatch = metrics["sampling/logprob_diff_mean"]
    if mismatch > SAMPLER_TOLERANCE and "sampling/importance_sampling_capped" not in metrics:
        found["sampler"] = (
            f"the sampler's log-probabilities are {mismatch:.2g} nats a token from those of the training forward: "
            "completions are not quite the policy's (a model that depends on its padding, or on a cache)"
        )
    if metrics["objective/kl"] < 0 and metrics["objective/kl_k3"] > 1:
        found["kl"] = (
            f"the mean KL is {metrics['objective/kl']:.2f}, which cannot be: completions are not drawn from the policy "
            "that is scored (temperature, or a sampler that differs from it)"
        )
    if metrics["val/ratio_max"] > 10:
        found["step"] = (
            f"a token's probability moved {metrics['val/ratio_max']:.0f}-fold in one iteration: lower learning_rate or "
            "num_ppo_epochs"
        )
    if metrics["policy/clipfrac_avg"] > 0.5:
        found["clip"] = (
            f"{metrics['policy/clipfrac_avg']:.0%} of the tokens have ratios outside the clip and no gradient: lower "
            "learning_rate or num_ppo_epochs"
        )
    if metrics.get("sampling/importance_sampling_capped", 0.0) > 0.1:
        found["lag"] = (
            f"{metrics['sampling/importance_sampling_capped']:.0%} of the tokens are over importance_sampling_cap. One "
            "step off-policy, the policy moves faster than its samples follow: lower learning_rate or num_ppo_epochs. "
            "Otherwise the engine computes other probabilities: look at its precision"
        )
    if metrics["objective/scores_std"] == 0:
        found["reward"] = (
            f"all completions have the score {metrics['objective/scores']:.3g}: there is nothing to learn from this "
            "reward (is it constant, or does it read something that no completion has?)"
        )
    if metrics["rollout/unique_frac"] < 0.5:
        found["same"] = (
            f"only {metrics['rollout/unique_frac']:.0%} of the completions are different: the policy has collapsed; "
            "raise kl_coef, entropy_coef or temperature"
        )
    if metrics.get("val/explained_var", 0.0) < -1:
        found["critic"] = (
            f"the critic explains {metrics['val/explained_var']:.2f} of the returns' variance, worse than no critic: "
            "lower value_learning_rate, raise vf_coef, or set lam nearer to 1"
        )
    if metrics["rollout/truncated_rate"] > 0.5:
        found["truncated"] = (
            f"{metrics['rollout/truncated_rate']:.0%} of the completions never stop: raise max_new_tokens, or look "
            "whether the SFT model learnt its stop token"
        )
    return found


def guard(metrics: dict[str, float], config: PPOConfig) -> str | None:
    """The limit that a rollout breaks, as a sentence; None when all hold."""
    kl, eos, entropy = (metrics[k] for k in ("objective/kl", "rollout/eos_rate", "policy/entropy_avg"))
    if config.guard_max_kl is not None and not kl <= config.guard_max_kl:
        return f"KL {kl:.3g} nats per completion is above guard_max_kl {config.guard_max_kl}; raise kl_coef"
    if config.guard_min_eos_rate is not None and not eos >= config.guard_min_eos_rate:
        return f"the share of ended completions {eos:.3g} is below guard_min_eos_rate; raise missing_eos_penalty"
    if config.guard_min_entropy is not None and not entropy >= config.guard_min_entropy:
        return f"entropy {entropy:.3g} nats per token is below guard_min_entropy; raise kl_coef or entropy_coef"
    return None


def _reduced(sums: dict, accelerator: Accelerator) -> dict[str, float]:
    packed = torch.tensor([float(value) for value in sums.values()], dtype=torch.float64, device=accelerator.device)
    return dict(zip(sums, accelerator.reduce(packed, reduction="sum").tolist()))
