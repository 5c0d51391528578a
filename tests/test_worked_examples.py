"""The page of worked examples is what lmkit computes: each of its lines is run, and each number compared."""

import doctest
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "worked_examples.md").read_text(encoding="utf-8")
OWN, SHAKESPEARE = PAGE.split("## Tiny-shakespeare by n-grams")


def run(text):
    """(lines that failed, lines run), and what the failures say."""
    said = []
    examples = doctest.DocTestParser().get_doctest(text, {}, "worked_examples.md", None, 0)
    results = doctest.DocTestRunner(verbose=False).run(examples, out=said.append)
    return results.failed, results.attempted, "".join(said)


def test_every_number_of_the_page_is_what_comes_out():
    failed, attempted, said = run(OWN)
    assert failed == 0, said
    assert attempted > 40


@pytest.mark.parametrize(
    ("right", "wrong"),
    [("0.4073", "0.2561"), ("'ZbYYa'", "'ZbZyZya'"), ("9, 9, 9, 7", "9, 9, 8, 7"), ("1.8500", "2.0")],
)
def test_a_number_that_is_changed_is_found(right, wrong):
    assert OWN.count(right) == 1
    assert run(OWN.replace(right, wrong))[0] == 1


@pytest.mark.realdata
@pytest.mark.skipif(
    not (ROOT.parent / "shared/data/text/tinyshakespeare.txt").exists(), reason="tiny-shakespeare is not here"
)
def test_the_n_gram_lines_are_what_comes_out(monkeypatch):
    monkeypatch.chdir(ROOT)
    failed, attempted, said = run(SHAKESPEARE)
    assert (failed, attempted) == (0, 8), said
