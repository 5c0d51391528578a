"""Pairs and answers: strict reading, nothing lost at a crash, one answer a pair, fair sides."""

import json
import os

import pytest

from lmkit.errors import BadInput, Locked
from lmkit.label.store import Answers, all_answers, answers_path, decided, export, is_swapped, read_answers, read_pairs


def write(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_pairs_are_known_by_their_texts(tmp_path):
    row, other = {"prompt": "a", "completions": ["x", "y"]}, {"prompt": "a", "completions": ["x", "z"]}
    first, second = read_pairs(write(tmp_path / "a.jsonl", row | {"n": 1}, other, row))
    assert (first.prompt, first.completions, first.columns) == ("a", ("x", "y"), {"n": 1})
    (again,) = read_pairs(write(tmp_path / "b.jsonl", {"prompt": "a", "chosen": "x", "rejected": "y"}))
    assert first.id == again.id != second.id


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "completions": ["x"]}, r"p\.jsonl:2  has no pair of texts; wanted two `completions`"),
        ({"prompt": "a", "completions": ["x", None]}, "has no pair of texts"),
        ({"prompt": "a", "chosen": "x"}, "has no pair of texts"),
        ({"prompt": "a", "chosen": "x", "rejected": 3}, "has no pair of texts"),
        ({"completions": ["x", "y"]}, r"p\.jsonl:2  has no `prompt`"),
        ({"prompt": [], "completions": ["x", "y"]}, "has no `prompt`"),
        ({"prompt": [{"role": "user"}], "completions": ["x", "y"]}, "messages with role and content"),
        ("{", r"p\.jsonl:2:\d+  is not valid JSON"),
    ],
)
def test_rows_that_are_no_pairs(tmp_path, row, message):
    with pytest.raises(BadInput, match=message):
        read_pairs(write(tmp_path / "p.jsonl", {"prompt": "a", "completions": ["x", "y"]}, row))


def test_a_file_without_pairs_and_no_file(tmp_path):
    with pytest.raises(BadInput, match="holds no pairs"):
        read_pairs(write(tmp_path / "p.jsonl"))
    with pytest.raises(BadInput, match="does not exist"):
        read_pairs(tmp_path / "q.jsonl")


def test_one_answer_a_pair_and_what_undo_does(tmp_path):
    answers = Answers(tmp_path / "a")
    assert answers.add("p", "first", False, 1.234)
    assert answers.add("p", "first", False, 9)  # a request that was sent again
    assert not answers.add("p", "second", False, 2)
    assert answers.add("q", "tie", True, 1)
    assert answers.last == "q"
    answers.undo("q")
    answers.undo("q")
    assert answers.last == "p"
    assert answers.add("q", "skip", True, 1)
    answers.close()
    rows = [json.loads(line) for line in (tmp_path / "a").read_text().splitlines()]
    assert [(row["pair"], row["answer"]) for row in rows] == [
        ("p", "first"),
        ("q", "tie"),
        ("q", "undo"),
        ("q", "skip"),
    ]
    assert rows[0]["seconds"] == 1.23
    assert read_answers(tmp_path / "a") == {"p": rows[0], "q": rows[3]}


def test_a_line_cut_off_by_a_crash_is_dropped_and_the_next_is_whole(tmp_path):
    path = tmp_path / "a"
    answers = Answers(path)
    answers.add("p", "first", False, 1)
    answers.close()
    whole = path.read_bytes()
    for cut in range(1, len(whole)):
        path.write_bytes(whole + whole[:cut])
        assert list(read_answers(path)) == ["p"]
    answers = Answers(path)
    assert path.read_bytes() == whole
    answers.add("q", "second", False, 1)
    answers.close()
    assert list(read_answers(path)) == ["p", "q"]


def test_a_full_disk_leaves_no_half_line(tmp_path, monkeypatch):
    answers = Answers(tmp_path / "a")
    answers.add("p", "first", False, 1)
    before, write = (tmp_path / "a").read_bytes(), os.write
    monkeypatch.setattr(os, "write", lambda file, line: write(file, line[:7]))
    with pytest.raises(OSError, match="a part of a line"):
        answers.add("q", "first", False, 1)
    monkeypatch.undo()
    assert (tmp_path / "a").read_bytes() == before
    assert "q" not in answers.standing
    assert answers.add("q", "second", False, 1)
    answers.close()


def test_an_answer_is_flushed_to_the_disk_before_it_counts(tmp_path, monkeypatch):
    answers, synced = Answers(tmp_path / "a"), []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append((tmp_path / "a").read_bytes()))
    answers.add("p", "first", False, 1)
    assert synced == [(tmp_path / "a").read_bytes()] != [b""]
    answers.close()


def test_a_second_labelling_by_the_same_annotator_is_refused(tmp_path):
    answers = Answers(tmp_path / "a")
    with pytest.raises(Locked, match="--annotator"):
        Answers(tmp_path / "a")
    answers.close()
    Answers(tmp_path / "a").close()


@pytest.mark.parametrize("line", ["{", "[]", "3", '{"pair": "p"}', '{"pair": "p", "answer": "both"}'])
def test_changed_answers_are_named(tmp_path, line):
    path = write(tmp_path / "a", {"pair": "p", "answer": "tie"}, line)
    with pytest.raises(BadInput, match=r"a:2  (is no answer|holds the answer 'both')"):
        read_answers(path)


def test_answers_lie_beside_the_pairs(tmp_path):
    pairs = tmp_path / "my.pairs.jsonl.gz"
    assert answers_path(pairs, "anna").name == "my.pairs.answers.anna.jsonl"
    write(tmp_path / "my.pairs.answers.anna.jsonl", {"pair": "p", "answer": "tie"})
    write(tmp_path / "my.other.answers.ben.jsonl", {"pair": "p", "answer": "tie"})
    write(tmp_path / "my.pairs.answers.cy.jsonl")  # opened the page and left
    assert list(all_answers(pairs)) == ["anna"]
    for name in ("", "../x", "a b", "-rf", "x" * 41):
        with pytest.raises(BadInput, match="--annotator NAME"):
            answers_path(pairs, name)


def test_sides_are_a_fair_coin_of_pair_and_annotator():
    sides = {name: [is_swapped(name, str(pair)) for pair in range(2000)] for name in ("anna", "ben")}
    for own in sides.values():
        assert 900 < sum(own) < 1100
    assert 900 < sum(a != b for a, b in zip(*sides.values())) < 1100


def test_the_majority_decides_and_ties_do_not(tmp_path):
    path = write(tmp_path / "p.jsonl", *({"prompt": str(i), "completions": ["x", "y"], "n": i} for i in range(5)))
    pairs = read_pairs(path)
    votes = {"anna": "first first tie skip second", "ben": "first second tie second second", "cy": "second tie"}
    answers = {
        name: {pair.id: {"answer": vote} for pair, vote in zip(pairs, words.split())} for name, words in votes.items()
    }
    assert export(tmp_path / "out.jsonl", pairs, answers) == 3
    assert [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()] == [
        {"n": 0, "prompt": "0", "chosen": "x", "rejected": "y", "num_votes": 3, "agreement": 2 / 3},
        {"n": 3, "prompt": "3", "chosen": "y", "rejected": "x", "num_votes": 1, "agreement": 1.0},
        {"n": 4, "prompt": "4", "chosen": "y", "rejected": "x", "num_votes": 2, "agreement": 1.0},
    ]
    with pytest.raises(BadInput, match="exists already"):
        export(tmp_path / "out.jsonl", pairs, answers)
    with pytest.raises(BadInput, match="No pair is decided"):
        export(tmp_path / "none.jsonl", pairs, {})
    assert list(decided(pairs, {})) == []
