"""Labelling pairs of completions: by a score for each and an imperfect annotator's preference, or by people."""

import importlib
import itertools
import json
import sys
from collections.abc import Callable, Collection, Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from numpy.typing import ArrayLike

from lmkit.errors import BadInput, Interrupted
from lmkit.evaluation.preference import expected_accuracy, gold_scores, preference_probability
from lmkit.label.agreement import report
from lmkit.label.store import all_answers, decided, read_pairs

Scorer = Callable[[Sequence[Any], Sequence[str]], Sequence[float]]


def scorer(labeler: str, device: Any = "cpu") -> Scorer:
    """The function (prompts, completions) -> scores that `labeler` names: module:function or a reward model."""
    if Path(labeler).is_dir():
        return _reward_model_scorer(Path(labeler), device)
    module, colon, name = labeler.partition(":")
    if not colon:
        raise BadInput(f"labeler {labeler!r}: wanted gold, people, module:function or a reward model's directory.")
    if "" not in sys.path:
        sys.path.insert(0, "")  # a function beside the configuration, as the other stages find it
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
    from lmkit.models.heads import completion_scores
    from lmkit.models.load import load_reward_model
    from lmkit.tokenization.chat import render

    model, tokenizer = load_reward_model(path, device)

    def score(prompts: Sequence[Any], completions: Sequence[str], cut_off: Collection[str] = ()) -> list[float]:
        parts = [render(tokenizer, prompt, completion) for prompt, completion in zip(prompts, completions)]
        # What was cut off has no end to be judged by.
        ends = [part[1][:-1] if text in cut_off else part[1] for part, text in zip(parts, completions)]
        return completion_scores(model, [part[0] for part in parts], ends).tolist()

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


def pairs_of(num_prompts: int, num_generations: int, num_pairs: int) -> np.ndarray:
    """Which completions to compare: [num_pairs, 2], where those of prompt i are numbered from i * num_generations on.

    Each two completions of a prompt are a pair (Ouyang et al. 2022, section 3.5); the last prompt's may be cut short.

    >>> pairs_of(num_prompts=2, num_generations=3, num_pairs=4).tolist()
    [[0, 1], [0, 2], [1, 2], [3, 4]]
    """
    inside = np.array(list(itertools.combinations(range(num_generations), 2)))
    starts = num_generations * np.arange(num_prompts)
    return (starts[:, None, None] + inside).reshape(-1, 2)[:num_pairs]


def label_pairs(
    prompts: Sequence[Any],
    completions: Sequence[str],
    pairs: np.ndarray,
    score: Scorer,
    temperature: float,
    flip: float,
    seed: int,
    cut_off: Collection[str] = (),
) -> tuple[Dataset, dict[str, float]]:
    """Labelled pairs of completions, and facts about the labels.

    prompts, completions: [N], side by side. pairs: [P, 2], numbers of completions. cut_off: those that end where
    sampling was ended. Returns rows of prompt, chosen, rejected, score_chosen and score_rejected without ties, and
    where anything was cut off the list cut_off, which the reward stage leaves open; the facts are `ties` and `ceiling`,
    the expected accuracy of a scorer that agrees with `score`, which is what a reward model can reach. BadInput when
    all pairs are ties, or when `score` gives anything but one finite number for each completion.
    """
    scores = _checked(score, prompts, completions)[pairs]
    chosen, kept = prefer(scores, temperature, flip, seed)
    if not kept.any():
        raise BadInput(f"all {len(kept)} pairs are ties: the labeler gave both completions of each the same score.")
    rows = [
        {
            "prompt": prompts[pair[0]],
            "chosen": completions[pair[one]],
            "rejected": completions[pair[1 - one]],
            "score_chosen": both[one],
            "score_rejected": both[1 - one],
        }
        | _cut(cut_off, completions, pair)
        for pair, one, both in zip(pairs[kept], chosen[kept], scores[kept])
    ]
    ceiling = expected_accuracy(scores[kept, 0] - scores[kept, 1], temperature, flip)
    return Dataset.from_list(rows), {"ties": int((~kept).sum()), "ceiling": ceiling}


def _cut(cut_off: Collection[str], completions: Sequence[str], pair: Sequence[int]) -> dict[str, list[str]]:
    """The column of that name, where anything was cut off."""
    return {"cut_off": [completions[n] for n in pair if completions[n] in cut_off]} if cut_off else {}


def _checked(score: Scorer, prompts: Sequence[Any], completions: Sequence[str]) -> np.ndarray:
    name, given = getattr(score, "__qualname__", repr(score)), score(prompts, completions)
    try:
        scores = np.asarray(given, dtype=float)
    except (TypeError, ValueError):
        raise BadInput(f"the labeler {name} gave {str(given)[:80]!r}; wanted one number for each completion.") from None
    if scores.shape != (len(completions),):
        raise BadInput(f"the labeler {name} gave {scores.shape} numbers for {len(completions)} completions.")
    if not np.isfinite(scores).all():
        row = int((~np.isfinite(scores)).argmax())
        raise BadInput(f"the labeler {name} gave {scores[row]} for completion {row}: {str(completions[row])[:200]!r}.")
    return scores


def write_pairs(
    path: Path, prompts: Sequence[Any], completions: Sequence[str], pairs: np.ndarray, cut_off: Collection[str] = ()
) -> None:
    """Writes pairs for people to compare, as `lmkit.label.store` reads them; two equal completions are no pair.

    cut_off: as in `label_pairs`; the column travels with the row.
    """
    rows = [
        {"prompt": prompts[one], "completions": [completions[one], completions[other]]}
        | _cut(cut_off, completions, (one, other))
        for one, other in pairs
        if completions[one] != completions[other]
    ]
    if not rows:
        raise BadInput(f"both completions of all {len(pairs)} pairs are the same; there is nothing to compare.")
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    temporary.replace(path)


def people_labelled(path: Path, say: Callable[[str], None]) -> tuple[Dataset, dict[str, float]]:
    """Rows of prompt, chosen, rejected as people decided, and facts; `say` is given the report (see `lmkit.label`).

    Raises Interrupted, with what to do, until each pair has the answer of somebody.
    """
    pairs, answers = read_pairs(path), all_answers(path)
    left = sum(not any(pair.id in own for own in answers.values()) for pair in pairs)
    if left:
        raise Interrupted(
            f"{left} of {len(pairs)} pairs wait for a person: `lmkit label {path}`, several people each with their own "
            "--annotator NAME. A part is enough with `--export OUT.jsonl`, then --data OUT.jsonl in another run."
        )
    if not (rows := list(decided(pairs, answers))):
        raise BadInput(f"no pair of {path} is decided: every answer is a tie, a skip or met by its opposite.")
    say(report(pairs, answers))
    return Dataset.from_list(rows), {"undecided": len(pairs) - len(rows), "num_annotators": len(answers)}


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
