"""The movie reviews' files: pairs that differ in opinion alone, and a held-out tenth that nothing else has seen."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "recipes/configs/reviews/prepare.py"
REVIEWS = ROOT.parent / "shared/data/sentiment"


def prepare(source, target):
    subprocess.run([sys.executable, SCRIPT, source, target], check=True, capture_output=True)
    names = ("pairs", "sft", "sft.heldout")
    rows = [[json.loads(line) for line in (target / f"{n}.jsonl").read_text().splitlines()] for n in names]
    return [*rows, *((target / f"text{end}.txt").read_text().strip().split("\n\n") for end in ("", ".heldout"))]


def check(pairs, sft, held_sft, text, held_text):
    kept, held = ([f"{row['prompt']} {row['completion']}" for row in rows] for rows in (sft, held_sft))
    assert sorted(kept) == sorted(text)
    assert sorted(held) == sorted(held_text)
    assert not set(kept) & set(held)
    sides = [[f"{row['prompt']} {row[side]}" for row in pairs] for side in ("chosen", "rejected")]
    both = sides[0] + sides[1]
    assert len(set(both)) == len(both)
    assert set(both) <= set(kept)
    assert all(1 <= len(row["prompt"].split()) <= 3 for row in pairs)
    for one, other in zip(*sides):
        assert max(len(one), len(other)) <= 1.25 * min(len(one), len(other))
    return sides


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_pairs_share_their_beginning_and_are_of_like_length(tmp_path, encoding):
    good = [f"the film is good and fine number {n} ." for n in range(20)] + ["short one"]
    bad = [*(f"the film was bad and dull number {n} \x85 ." for n in range(20)), "it is a clich\xe9 to its end ."]
    for name, lines in (("pos", good), ("neg", bad)):
        (tmp_path / f"rt-polarity.{name}").write_bytes("\n".join([*lines, lines[0], ""]).encode(encoding))
    pairs, sft, held_sft, text, held_text = prepare(tmp_path, tmp_path / "made")
    chosen, rejected = check(pairs, sft, held_sft, text, held_text)
    assert len(chosen) == min(sum(line.startswith(words) for line in text) for words in ("the film is", "the film was"))
    assert all("good" in line for line in chosen)
    assert all("bad" in line and "\N{HORIZONTAL ELLIPSIS}" in line for line in rejected)
    assert {row["prompt"] for row in pairs} == {"the film"}
    assert len(held_text) == 5  # every tenth of 20 and of 21
    assert "short one" not in text + held_text


@pytest.mark.realdata
@pytest.mark.skipif(not REVIEWS.is_dir(), reason="../shared/data is not here")
def test_the_published_sentences_give_what_the_page_says(tmp_path):
    rows = prepare(REVIEWS, tmp_path)
    check(*rows)
    assert [len(part) for part in rows] == [2684, 9430, 1049, 9430, 1049]
