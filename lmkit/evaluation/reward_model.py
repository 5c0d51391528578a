"""A trained reward model: centring its scores, and judging it on held-out pairs."""

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedModel

from lmkit.evaluation.preference import calibration, correlation, share, wins
from lmkit.models.heads import last_token_scores


def centre(model: PreTrainedModel, pairs: Dataset, num_pairs: int = 1000) -> float:
    """Sets `config.score_mean` so that the mean score of the first pairs' completions is 0; returns what was removed.

    pairs: `chosen_ids` and `rejected_ids`, samples of the SFT model in equal parts. PPO's advantages do not depend on
    the constant, but a penalty for not stopping, and a person reading the scores, do.
    """
    some = pairs.select(range(min(num_pairs, len(pairs))))
    model.config.score_mean = 0.0
    mean = float(last_token_scores(model, list(some["chosen_ids"]) + list(some["rejected_ids"])).mean())
    model.config.score_mean = mean
    return mean


@torch.no_grad()
def judge(model: PreTrainedModel, pairs: Dataset) -> tuple[dict[str, float], list[dict[str, float]]]:
    """Metrics on pairs of `chosen_ids` and `rejected_ids`, and the bins of the reliability diagram.

    Accuracy with its 95 % bootstrap interval, calibration error, the correlation of score and length over all
    completions, accuracy on the half of the pairs whose lengths differ least, mean and deviation of the scores.
    """
    chosen, rejected = ([list(ids) for ids in pairs[column]] for column in ("chosen_ids", "rejected_ids"))
    scores = last_token_scores(model, chosen + rejected).double().numpy()
    lengths = np.array([len(ids) for ids in chosen + rejected])
    half = len(chosen)
    right, gaps = wins(scores[:half], scores[half:]), np.abs(lengths[:half] - lengths[half:])
    bins, error = calibration(scores[:half] - scores[half:])
    metrics = {
        **share("accuracy", right),
        "accuracy_like_length": float(right[gaps <= np.median(gaps)].mean()),
        "calibration_error": error,
        "length_correlation": correlation(scores, lengths),
        "score_mean": float(scores.mean()),
        "score_std": float(scores.std()),
        "num_heldout": half,
    }
    return metrics, bins
