"""How far annotators agree, and what else tells whether their labels can be believed."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence

from lmkit.label.store import ANSWERS, Pair, decided

LABELS = ("first", "second", "tie")


def kappa(a: Sequence[str], b: Sequence[str]) -> tuple[float, float]:
    """Cohen's kappa of two annotators' labels of the same items, and its standard error (Cohen 1960).

    (p - e) / (1 - e), where p is the share of items labelled alike and e what it would be by chance, given how often
    each annotator uses each label. 1 is full agreement, 0 that of chance; nan when one label is all that both use.

    >>> kappa(["x", "x", "y", "y"], ["x", "x", "y", "x"])[0]
    0.5
    """
    n = len(a)
    p = sum(x == y for x, y in zip(a, b, strict=True)) / n
    e = sum(a.count(label) * b.count(label) for label in set(a)) / n**2
    if e == 1:
        return math.nan, math.nan
    return (p - e) / (1 - e), math.sqrt(p * (1 - p) / n) / (1 - e)


def report(pairs: list[Pair], answers: dict[str, dict[str, dict]]) -> str:
    """Text for a person: what each annotator answered, their agreement two by two, and how many pairs are decided."""
    known = {pair.id for pair in pairs}
    strangers = sum(key not in known for own in answers.values() for key in own)
    answers = {name: {k: row for k, row in own.items() if k in known} for name, own in answers.items()}
    header = ["annotator", "answered", *ANSWERS, "left chosen", "median s"]
    rows = [[name, *_habits(own, len(pairs))] for name, own in answers.items()]
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in (header, *rows)]

    for one, other in itertools.combinations(answers, 2):
        shared = [k for k in answers[one] if k in answers[other]]
        both = [(answers[one][k]["answer"], answers[other][k]["answer"]) for k in shared]
        both = [labels for labels in both if set(labels) <= set(LABELS)]
        if not both:
            lines.append(f"{one} and {other}: no pair labelled by both")
            continue
        alike = sum(x == y for x, y in both) / len(both)
        value, error = kappa(*map(list, zip(*both)))
        stated = "not defined, both use one label only" if math.isnan(value) else f"{value:.2f} +- {1.96 * error:.2f}"
        lines.append(f"{one} and {other}: {len(both)} labelled by both, {alike:.0%} alike, Cohen's kappa {stated}")
    labelled = sum(any(pair.id in own for own in answers.values()) for pair in pairs)
    lines.append(f"{len(pairs)} pairs, {labelled} answered by somebody, {len(list(decided(pairs, answers)))} decided")
    if strangers:
        lines.append(f"{strangers} answers belong to no pair of this file (was it changed?) and are left out")
    return "\n".join(lines)


def _habits(own: dict[str, dict], num_pairs: int) -> list[str]:
    """An annotator's row: counts, the share of preferences for the left side with its 95 % interval, the pace."""
    given = [row["answer"] for row in own.values()]
    left = [(row["answer"] == "second") == row["swapped"] for row in own.values() if row["answer"] in LABELS[:2]]
    share = "-"
    if left:
        mean = sum(left) / len(left)
        share = f"{mean:.0%} +- {1.96 * math.sqrt(mean * (1 - mean) / len(left)):.0%}"
    pace = f"{statistics.median(row['seconds'] for row in own.values()):.1f}" if own else "-"
    return [f"{len(own)}/{num_pairs}", *(str(given.count(answer)) for answer in ANSWERS), share, pace]
