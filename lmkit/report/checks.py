"""What a reader should know before believing a run: the stages' own warnings, and what their numbers say together."""

from __future__ import annotations

import math
from collections.abc import Iterator

from lmkit.report.read import Run, series

MIN_PAIRS = MIN_PROMPTS = 100
MIN_EOS_RATE = 0.9
MAX_LENGTH_RATIO = 1.3
MAX_LENGTH_CORRELATION = 0.5
MAX_CALIBRATION_ERROR = 0.1
MAX_FALL = 0.2  # from the best gold score seen during PPO, as a share of the gain
MAX_TAX = 0.1  # rise of bits per byte over the base model, as a share


def warnings(run: Run) -> list[str]:
    """Warnings as sentences, those about the run itself first; none when no check found anything."""
    return [*_endings(run), *_logged(run), *_non_finite(run), *_reward_model(run), *_collapse(run), *_outcome(run)]


def _endings(run: Run) -> Iterator[str]:
    for name, stage in run.stages.items():
        if stage.record is None and stage.ending and stage.ending["code"]:
            yield f"{name} ended with exit code {stage.ending['code']}: {stage.ending['reason']}"


def _logged(run: Run) -> Iterator[str]:
    for name, stage in run.stages.items():
        for line in dict.fromkeys(stage.log):
            if line.startswith("warning: "):
                yield f"{name}: {line.removeprefix('warning: ')}"


def _non_finite(run: Run) -> Iterator[str]:
    for name, stage in run.stages.items():
        broken = sorted({key for row in stage.rows for key, value in row.items() if value in ("nan", "inf", "-inf")})
        if broken:
            yield f"{name}: {', '.join(broken)} had values that are not finite; the curves have gaps there."


def _reward_model(run: Run) -> Iterator[str]:
    found = run.metrics("reward")
    if (pairs := found.get("num_heldout", MIN_PAIRS)) < MIN_PAIRS:
        yield f"The reward model was judged on {pairs} held-out pair(s): too few to say how accurate it is."
    if (error := found.get("calibration_error", 0.0)) > MAX_CALIBRATION_ERROR:
        yield f"The reward model is not calibrated: its confidence is off by {error:.1%} on average."
    if abs(found.get("length_correlation", 0)) > MAX_LENGTH_CORRELATION:
        yield (
            f"The reward model's scores follow length (correlation {found['length_correlation']:.2f}): PPO may learn "
            "to write longer or shorter rather than better."
        )


def _collapse(run: Run) -> Iterator[str]:
    steps, values = series(run.rows("ppo"), "eval/gold")
    if len(values) > 2 and max(values) - values[-1] > MAX_FALL * max(max(values) - values[0], 0.0):
        best = values.index(max(values))
        yield (
            f"ppo: gold on held-out prompts was highest at iteration {steps[best]} ({values[best]:.2f}) and ended at "
            f"{values[-1]:.2f}: over-optimisation, or noise. Raise kl_coef, or stop there."
        )


def _outcome(run: Run) -> Iterator[str]:
    found, judge = run.evaluation, run.judge
    if not found:
        return
    if (prompts := found.get("num_prompts", MIN_PROMPTS)) < MIN_PROMPTS:
        yield f"The models were compared on {prompts} prompts: too few for the intervals to be trusted."
    if judge is None:
        yield "No judge independent of the reward model scored the answers: nothing here shows that they are better."
    low, high = (found.get(f"win_rate/ppo_vs_sft_{end}") for end in ("low", "high"))
    if low is not None and high <= 0.5:
        yield f"PPO loses to SFT: win rate {found['win_rate/ppo_vs_sft']:.2f} [{low:.2f}, {high:.2f}]."
    elif low is not None and low <= 0.5:
        yield f"No difference between PPO and SFT is shown: the interval of the win rate is [{low:.2f}, {high:.2f}]."
    score, value = _gain(found, "score"), _gain(found, judge)
    if score > 0 > value:
        yield f"Over-optimisation: PPO gained {score:.2f} by the reward model and lost {-value:.2f} by {judge}."
    for name in run.components:
        if (loss := -_gain(found, f"gold_{name}")) > 0.05:
            yield f"PPO is worse than SFT in the component {name}: {loss:.2f} lower."
    for model in ("sft", "ppo"):
        if found.get(f"eos_rate/{model}", 1.0) < MIN_EOS_RATE:
            yield f"{1 - found[f'eos_rate/{model}']:.0%} of the answers of {model} were cut off: they never ended."
    before, after = found.get("length/sft", 0), found.get("length/ppo", 0)
    if before and not 1 / MAX_LENGTH_RATIO <= after / before <= MAX_LENGTH_RATIO:
        yield f"PPO changed the length of answers from {before:.0f} to {after:.0f} tokens, which alone can win or lose."
    if found.get("kl/ppo", 0.0) < 0:
        yield f"The measured KL is {found['kl/ppo']:.2f}; it cannot be negative, so sampling and scoring disagree."
    tax = found.get("bits_per_byte/ppo", 0.0) / found.get("bits_per_byte/base", math.inf) - 1
    if tax > MAX_TAX:
        yield f"Alignment tax: PPO needs {tax:.0%} more bits per byte than the base model on the pretraining text."


def _gain(found: dict, key: str | None) -> float:
    return found.get(f"{key}/ppo", 0.0) - found.get(f"{key}/sft", 0.0)
