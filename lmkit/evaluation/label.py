"""Labelling pairs of completions: a score for each, then which of the two an imperfect annotator prefers."""

import importlib
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from numpy.typing import ArrayLike

from lmkit.errors import BadInput
from lmkit.evaluation.preference import expected_accuracy, gold_scores, preference_probability

Scorer = Callable[[Sequence[Any], Sequence[str]], Sequence[float]]


def scorer(labeler: str, device: Any = "cpu") -> Scorer:
    """The function (prompts, completions) -> scores that `labeler` names: module:function or a reward model."""
    if Path(labeler).is_dir():
        return _reward_model_scorer(Path(labeler), device)
    module, colon, name = labeler.partition(":")
    if not colon:
        raise BadInput(f"labeler {labeler!r}: wanted module:function, or the directory of a reward model.")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise BadInput(f"labeler {labeler!r} cannot be imported: {error}. Is its folder on PYTHONPATH?") from None


def gold(prompts: Sequence[Any], completions: Sequence[str]) -> list[float]:
    """The default labeler: the gold score of tales."""
    golds = gold_scores(prompts, completions)
    if golds is None:
        raise BadInput(
            "the gold score knows the prompts of tales alone. Set --labeler to a module:function or a reward model's "
            "directory, or give the pairs with --data."
        )
    return [scores["gold"] for scores in golds]


def _reward_model_scorer(path: Path, device: Any) -> Scorer:
    from lmkit.models.heads import last_token_scores
    from lmkit.models.load import load_reward_model
    from lmkit.tokenization.chat import render

    model, tokenizer = load_reward_model(path, device)

    def score(prompts: Sequence[Any], completions: Sequence[str]) -> list[float]:
        parts = [render(tokenizer, prompt, completion) for prompt, completion in zip(prompts, completions)]
        return last_token_scores(model, [prompt + completion for prompt, completion in parts]).tolist()

    return score


def prefer(scores: ArrayLike, temperature: float, flip: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Which completion of each pair is chosen, and which pairs to keep: (chosen [P] of 0 or 1, kept [P] of bool).

    scores: [P, 2]. The first is preferred with the Bradley-Terry probability of the scores' gap, then a share `flip`
    of the labels is turned round. Pairs with equal scores are ties and not kept.

    >>> chosen, kept = prefer([[3.0, 1.0], [0.0, 2.0], [1.0, 1.0]], temperature=0, flip=0, seed=0)
    >>> chosen[:2].tolist(), kept.tolist()
    ([0, 1], [True, True, False])
    """
    scores, generator = np.asarray(scores, dtype=float), np.random.default_rng(seed)
    gaps = scores[:, 0] - scores[:, 1]
    second = generator.random(len(gaps)) >= preference_probability(gaps, temperature)
    return (second ^ (generator.random(len(gaps)) < flip)).astype(int), gaps != 0


def label_pairs(
    prompts: Sequence[Any], completions: Sequence[str], score: Scorer, temperature: float, flip: float, seed: int
) -> tuple[Dataset, dict[str, float]]:
    """Pairs from two completions of each prompt, and facts about the labels.

    completions: [2P], those of one prompt side by side. Returns rows of prompt, chosen, rejected, score_chosen and
    score_rejected without ties; the facts are `ties` and `ceiling`, the expected accuracy of a scorer that agrees with
    `score`, which is what a reward model can reach.
    """
    scores = np.asarray(score([p for p in prompts for _ in range(2)], completions), dtype=float).reshape(-1, 2)
    chosen, kept = prefer(scores, temperature, flip, seed)
    if not kept.any():
        raise BadInput(f"all {len(kept)} pairs are ties: the labeler gave both completions of each the same score.")
    rows = [
        {
            "prompt": prompts[i],
            "chosen": completions[2 * i + chosen[i]],
            "rejected": completions[2 * i + 1 - chosen[i]],
            "score_chosen": scores[i, chosen[i]],
            "score_rejected": scores[i, 1 - chosen[i]],
        }
        for i in kept.nonzero()[0]
    ]
    ceiling = expected_accuracy(scores[kept, 0] - scores[kept, 1], temperature, flip)
    return Dataset.from_list(rows), {"ties": int((~kept).sum()), "ceiling": ceiling}


def heldout_rows(keys: Sequence[Hashable], fraction: float, seed: int) -> np.ndarray:
    """True for the rows of a random share of the distinct keys, at least one: [N]. Rows of one key are never divided.

    Raises BadInput when there are not two keys to divide.

    >>> heldout_rows(["a", "b", "a", "b"], 0.5, seed=0).tolist() in ([True, False] * 2, [False, True] * 2)
    True
    """
    distinct = list(dict.fromkeys(keys))
    if len(distinct) < 2:
        raise BadInput(f"found {len(distinct)} different prompts; wanted at least 2, so that one can be held out.")
    order = np.random.default_rng(seed).permutation(len(distinct))
    held = {distinct[i] for i in order[: max(round(fraction * len(distinct)), 1)]}
    return np.array([key in held for key in keys])
