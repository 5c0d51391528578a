"""Judging completions: accuracy, win rate, best-of-n, calibration, the relation to length, and the gold score of tales.

Pure functions on numbers; a score is one number per completion, P prompts, n samples per prompt.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from lmkit.data.tales import gold


def bootstrap_interval(
    values: ArrayLike, level: float = 0.95, num_resamples: int = 4000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `values` [P], resampling the rows.

    >>> bootstrap_interval([0.5] * 20)
    (0.5, 0.5)
    """
    values = np.asarray(values, dtype=float)
    rows = np.random.default_rng(seed).integers(len(values), size=(num_resamples, len(values)))
    low, high = np.quantile(values[rows].mean(1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def wins(ours: ArrayLike, theirs: ArrayLike) -> np.ndarray:
    """1 where our score is higher, 0 where theirs is, 0.5 where they tie: [P]. Its mean is the win rate, or, for the
    scores of chosen and rejected completions, the accuracy.

    >>> wins([1, 2, 3], [0, 2, 4]).tolist()
    [1.0, 0.5, 0.0]
    """
    return (np.sign(np.subtract(ours, theirs)) + 1) / 2


def share(name: str, values: ArrayLike) -> dict[str, float]:
    """The mean of `values` with its 95 % bootstrap interval, as three metrics.

    >>> share("win_rate", [1.0, 1.0])
    {'win_rate': 1.0, 'win_rate_low': 1.0, 'win_rate_high': 1.0}
    """
    low, high = bootstrap_interval(values)
    return {name: float(np.mean(values)), f"{name}_low": low, f"{name}_high": high}


def expected_accuracy(gaps: ArrayLike, temperature: float, flip: float) -> float:
    """The most any scorer can agree with annotators who prefer the completion that is better by `gap` with probability
    sigmoid(gap / temperature) (Bradley and Terry 1952), or 1 at temperature 0, and err with probability `flip`.

    >>> round(expected_accuracy([0.0, 100.0], temperature=1.0, flip=0.05), 3)
    0.725
    """
    gaps = np.abs(np.asarray(gaps, dtype=float))
    right = preference_probability(gaps, temperature)
    return float(np.mean((1 - flip) * right + flip * (1 - right)))


def preference_probability(gaps: ArrayLike, temperature: float) -> np.ndarray:
    """Bradley-Terry probability that the first is preferred, for score gaps first - second.

    >>> preference_probability([0.0, 2.0], temperature=0).tolist()
    [0.5, 1.0]
    """
    gaps = np.asarray(gaps, dtype=float)
    if temperature == 0:
        return (np.sign(gaps) + 1) / 2
    return 1 / (1 + np.exp(-np.clip(gaps / temperature, -60, 60)))


def calibration(margins: ArrayLike, num_bins: int = 10) -> tuple[list[dict[str, float]], float]:
    """Reliability of a reward model's own probabilities: (bins, expected calibration error).

    A margin, score of chosen - score of rejected, claims that the higher-scored completion is preferred with the
    confidence sigmoid(|margin|), between 0.5 and 1; it is right where the margin is positive. A bin has the mean
    confidence and the accuracy of its pairs; the error is the mean distance between them, weighted by count
    (Guo et al. 2017).

    >>> bins, error = calibration([100.0, 100.0, 100.0, -100.0])
    >>> bins, error
    ([{'confidence': 1.0, 'accuracy': 0.75, 'count': 4}], 0.25)
    """
    margins = np.asarray(margins, dtype=float)
    confidence, right = preference_probability(np.abs(margins), 1.0), (np.sign(margins) + 1) / 2
    index = np.minimum(((confidence - 0.5) * 2 * num_bins).astype(int), num_bins - 1)
    members = [index == number for number in range(num_bins) if (index == number).any()]
    bins = [
        {"confidence": float(confidence[m].mean()), "accuracy": float(right[m].mean()), "count": int(m.sum())}
        for m in members
    ]
    return bins, sum(b["count"] * abs(b["confidence"] - b["accuracy"]) for b in bins) / len(margins)


def correlation(scores: ArrayLike, lengths: ArrayLike) -> float:
    """Pearson correlation, 0 when either side is constant. A reward model that merely likes long answers has it near 1.

    >>> round(correlation([1, 2, 3], [10, 20, 30]), 6), correlation([1, 1], [3, 4])
    (1.0, 0.0)
    """
    if np.ptp(scores) == 0 or np.ptp(lengths) == 0:
        return 0.0
    return float(np.corrcoef(scores, lengths)[0, 1])


def is_weak(accuracy: float, ceiling: float) -> bool:
    """Whether an accuracy on pairs has gone less than half of the way from chance to the most that the labels allow.

    An accuracy by itself says little: 0.65 is poor where annotators never err and as good as any where they agree with
    themselves on two pairs in three.

    >>> is_weak(0.65, ceiling=1.0), is_weak(0.65, ceiling=0.7)
    (True, False)
    """
    return accuracy - 0.5 < (ceiling - 0.5) / 2


def member_agreement(margins: ArrayLike) -> float:
    """How often two members of an ensemble order a pair alike: the mean over all two of the K. margins: [K, P], K > 1.

    >>> member_agreement([[1.0, 2.0, -1.0, 3.0], [2.0, -1.0, -1.0, 1.0]])
    0.75
    """
    signs = np.sign(np.asarray(margins, dtype=float))
    alike = [(one == other).mean() for one, other in itertools.combinations(signs, 2)]
    return float(np.mean(alike))


def best_of(scores: ArrayLike, values: ArrayLike, n: int) -> np.ndarray:
    """Expected value of the completion with the highest score among n of the N samples of each prompt: [P].

    scores, values: [P, N]; n <= N. Exact over all subsets of n samples rather than one drawn (Nakano et al. 2021,
    equation 4 of appendix I); n = N is plain best-of-N.

    >>> best_of([[3.0, 1.0]], [[10.0, 20.0]], 2).tolist(), best_of([[3.0, 1.0]], [[10.0, 20.0]], 1).tolist()
    ([10.0], [15.0])
    """
    scores, values = np.asarray(scores), np.asarray(values, dtype=float)
    total = scores.shape[1]
    ranked = np.take_along_axis(values, scores.argsort(axis=1, kind="stable"), axis=1)
    weights = np.array([math.comb(rank, n - 1) / math.comb(total, n) for rank in range(total)])
    return ranked @ weights


def best_of_kl(n: int) -> float:
    """KL divergence in nats of best-of-n from the model it samples: log n - (n - 1) / n (Stiennon et al. 2020), an
    upper bound that is tight when completions seldom repeat.

    >>> round(best_of_kl(1), 6), round(best_of_kl(8), 3)
    (0.0, 1.204)
    """
    return math.log(n) - (n - 1) / n


def gold_scores(prompts: Sequence[Any], completions: Sequence[str]) -> list[dict[str, float]] | None:
    """The gold score of tales (`gold`) and its components, for each completion; None if a prompt is not of tales."""
    if not all(isinstance(prompt, str) for prompt in prompts):
        return None
    try:
        return [gold(prompt, completion) for prompt, completion in zip(prompts, completions)]
    except ValueError:
        return None


def component_means(golds: Sequence[dict[str, float]]) -> dict[str, float]:
    """Mean of every component over completions.

    >>> component_means([{"animal": 1.0, "gold": 2.0}, {"animal": 0.0, "gold": 1.0}])
    {'animal': 0.5, 'gold': 1.5}
    """
    return {name: float(np.mean([gold[name] for gold in golds])) for name in golds[0]}
