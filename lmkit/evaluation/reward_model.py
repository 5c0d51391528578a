"""A trained reward model: centring its scores, and judging it, or an ensemble, on held-out pairs.

Pairs are what `lmkit.data.encode.encode_pairs` gives; their scores are one array [2, P], chosen and rejected.
"""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedModel

from lmkit.errors import BadInput
from lmkit.evaluation.preference import calibration, correlation, is_weak, member_agreement, share, wins
from lmkit.generation.complete import complete
from lmkit.models.heads import completion_scores, last_token_scores
from lmkit.models.load import load_language_model
from lmkit.tokenization.chat import render

SIDES = ("chosen", "rejected")


def centre(model: PreTrainedModel, sequences: Sequence[list[int]]) -> float:
    """Sets `config.score_mean` so that the mean score of the sequences of ids is 0; returns what was removed.

    PPO's advantages do not depend on the constant, but a penalty for not stopping, and a person reading the scores, do.
    """
    model.config.score_mean = 0.0
    mean = float(last_token_scores(model, list(sequences)).mean())
    model.config.score_mean = mean
    return mean


def completions_of(pairs: Dataset, num_pairs: int = 1000) -> list[list[int]]:
    """The ids of both completions, with their prompts, of the first pairs."""
    some = pairs.select(range(min(num_pairs, len(pairs))))
    return [list(ids) for side in SIDES for ids in some[f"{side}_ids"]]


def samples_of(
    path: Path, prompts: Sequence[Any], max_length: int, seed: int, device: Any = "cpu", num_samples: int = 256
) -> list[list[int]]:
    """Ids of completions that the language model at `path` samples, each after those of its prompt.

    The prompts are the first that leave half of `max_length` for an answer; BadInput where none does.
    """
    model, tokenizer = load_language_model(path, device)
    fitting = [prompt for prompt in prompts if len(render(tokenizer, prompt)[0]) <= max_length // 2][:num_samples]
    if not fitting:
        raise BadInput(
            f"none of the {len(prompts):,} prompts has at most {max_length // 2} tokens, so none leaves half of "
            f"--max_length {max_length} for an answer. Raise it, or --center_on pairs."
        )
    drawn = complete(model, tokenizer, fitting, max_new_tokens=max_length - max_length // 2, seed=seed)
    return [c.prompt_ids + c.ids for c in drawn]


def pair_scores(model: PreTrainedModel, pairs: Dataset) -> np.ndarray:
    """Scores of the chosen and the rejected completions: float64 [2, P]."""
    sides = [[list(ids) for ids in pairs[f"{side}_ids"]] for side in SIDES]
    # The prompt, and where both begin alike more than it; a token of each is left to be scored.
    shared = [min(_alike(*both), len(both[0]) - 1, len(both[1]) - 1) for both in zip(*sides)]
    prompts = [ids[:end] for side in sides for ids, end in zip(side, shared)]
    rests = [ids[end:] for side in sides for ids, end in zip(side, shared)]
    return completion_scores(model, prompts, rests).double().numpy().reshape(2, -1)


def _alike(one: list[int], other: list[int]) -> int:
    """How many tokens two sequences begin with in common."""
    return sum(1 for _ in itertools.takewhile(lambda both: both[0] == both[1], zip(one, other)))


def judge(scores: np.ndarray, pairs: Dataset, rows: Dataset) -> tuple[dict[str, float], list[dict[str, float]]]:
    """Metrics on held-out pairs, and the bins of the reliability diagram.

    Accuracy with its 95 % bootstrap interval, also on the half of the pairs whose lengths differ least, calibration
    error, the correlation of score and length over all completions, mean and deviation of the scores. Where `rows`,
    which the pairs were encoded from, hold the labeler's own scores (`score_chosen`, `score_rejected`), also `ceiling`,
    how often these order a pair as its noisy label does, and `accuracy_noiseless`, how often the model orders it so.
    """
    chosen, rejected = scores
    lengths = np.array([[len(ids) for ids in pairs[f"{side}_ids"]] for side in SIDES])
    right, gaps = wins(chosen, rejected), np.abs(lengths[0] - lengths[1])
    bins, error = calibration(chosen - rejected)
    metrics = {
        **share("accuracy", right),
        **share("accuracy_like_length", right[gaps <= np.median(gaps)]),
        "calibration_error": error,
        "length_correlation": correlation(scores.ravel(), lengths.ravel()),
        "score_mean": float(scores.mean()),
        "score_std": float(scores.std()),
        "num_heldout": scores.shape[1],
    }
    if "score_chosen" in rows.column_names:
        kept = rows.select(pairs["row"])
        consistent = wins(kept["score_chosen"], kept["score_rejected"])
        metrics["ceiling"] = float(consistent.mean())
        metrics["accuracy_noiseless"] = float(np.mean(np.where(consistent == 0.5, 0.5, right == consistent)))
    return metrics, bins


def judge_ensemble(scores: Sequence[np.ndarray]) -> dict[str, float]:
    """How often two members order a pair alike, and the accuracy of the mean of their scores; nothing for one member.

    scores: [2, P] of each member.
    """
    if len(scores) < 2:
        return {}
    agreement = member_agreement([chosen - rejected for chosen, rejected in scores])
    return {"member_agreement": agreement, **share("accuracy_members_mean", wins(*np.mean(scores, axis=0)))}


def most_wrong(scores: np.ndarray, pairs: Dataset, rows: Dataset, num: int = 8) -> list[dict[str, Any]]:
    """The pairs whose rejected completion is scored furthest above the chosen one, the worst first."""
    chosen, rejected = scores
    worst = [int(i) for i in np.argsort(chosen - rejected)[:num] if chosen[i] < rejected[i]]
    return [
        {name: rows[pairs["row"][i]][name] for name in ("prompt", *SIDES)}
        | {"score": {"chosen": float(chosen[i]), "rejected": float(rejected[i])}}
        for i in worst
    ]


def summary(metrics: Mapping[str, Any]) -> str:
    """What a person must know of a reward model, on one line, and a warning on a second where one is due."""
    line = "reward: held-out accuracy {accuracy:.3f} [{accuracy_low:.3f}, {accuracy_high:.3f}]".format(**metrics)
    for name, label in (
        ("ceiling", "annotators' ceiling {:.3f}"),
        ("accuracy_noiseless", "{:.3f} without the labels' noise"),
        ("calibration_error", "calibration error {:.3f}"),
        ("length_correlation", "correlation with length {:.2f}"),
        ("member_agreement", "members agree on {:.3f}"),
        ("accuracy_members_mean", "their mean's accuracy {:.3f}"),
    ):
        line += f", {label.format(metrics[name])}" if name in metrics else ""
    advice = "expect little of PPO on it. Give more pairs, or pairs whose completions differ more clearly."
    if "ceiling" in metrics and is_weak(metrics["accuracy"], metrics["ceiling"]):
        line += (
            f"\nwarning: accuracy {metrics['accuracy']:.3f} is not half of the way from chance to the "
            f"{metrics['ceiling']:.3f} that the labels allow: {advice}"
        )
    elif metrics["accuracy_low"] <= 0.5:
        line += f"\nwarning: that accuracy may be chance, 0.5 lies in its interval: {advice}"
    return line
