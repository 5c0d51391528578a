"""Cohen's kappa by hand and against scikit-learn, and what the report says."""

import math
import random
import re

import pytest

from lmkit.label.agreement import kappa, report
from lmkit.label.store import ANSWERS, Pair


def test_kappa_by_hand():
    """20 both yes, 15 both no, 5 and 10 otherwise: 0.7 alike, 0.5 by chance."""
    a = ["y"] * 20 + ["y"] * 5 + ["n"] * 10 + ["n"] * 15
    b = ["y"] * 20 + ["n"] * 5 + ["y"] * 10 + ["n"] * 15
    value, error = kappa(a, b)
    assert value == pytest.approx(0.4)
    assert error == pytest.approx(math.sqrt(0.7 * 0.3 / (50 * 0.25)))


def test_kappa_at_its_ends():
    assert kappa(["a", "b"], ["a", "b"])[0] == 1
    assert kappa(["a", "b"], ["b", "a"])[0] == -1
    assert math.isnan(kappa(["a", "a"], ["a", "a"])[0])


def test_kappa_is_scikit_learns():
    metrics = pytest.importorskip("sklearn.metrics")
    draw = random.Random(0)
    for _ in range(20):
        a, b = ([draw.choice(("first", "second", "tie")) for _ in range(37)] for _ in range(2))
        assert kappa(a, b)[0] == pytest.approx(metrics.cohen_kappa_score(a, b))


def test_the_report():
    pairs = [Pair(str(i), "p", ("x", "y"), {}) for i in range(4)]

    def row(answer, swapped, seconds=2.0):
        return {"answer": answer, "swapped": swapped, "seconds": seconds}

    answers = {
        "anna": {
            "0": row("first", False),
            "1": row("second", True, 4.0),
            "2": row("tie", True),
            "3": row("skip", True),
        },
        "ben": {"0": row("first", True), "1": row("first", True), "3": row("first", False), "gone": row("tie", False)},
        "cy": {},
    }
    lines = report(pairs, answers).splitlines()
    assert re.split("  +", lines[0]) == ["annotator", "answered", *ANSWERS, "left chosen", "median s"]
    assert lines[1].split() == ["anna", "4/4", "1", "1", "1", "1", "100%", "+-", "0%", "2.0"]
    assert lines[2].split()[:7] == ["ben", "3/4", "3", "0", "0", "0", "33%"]
    assert lines[3].split() == ["cy", "0/4", "0", "0", "0", "0", "-", "-"]
    assert lines[4:] == [
        "anna and ben: 2 labelled by both, 50% alike, Cohen's kappa 0.00 +- 1.39",
        "anna and cy: no pair labelled by both",
        "ben and cy: no pair labelled by both",
        "4 pairs, 4 answered by somebody, 2 decided",
        "1 answers belong to no pair of this file (was it changed?) and are left out",
    ]
