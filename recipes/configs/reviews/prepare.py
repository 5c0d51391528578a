"""Movie-review sentences (Pang and Lee 2005) as the files of the chain beside this script.

    python recipes/configs/reviews/prepare.py ../shared/data/sentiment runs/reviews-data

Reads   rt-polarity.pos and rt-polarity.neg, a sentence a line
Writes  text.txt (sentences, for the tokenizer and pretraining), sft.jsonl (first words -> the rest, both opinions),
        pairs.jsonl (a positive sentence preferred to a negative one that begins with the same words and is of like
        length), and of every tenth sentence, which none of these holds: text.heldout.txt and sft.heldout.jsonl
"""

import json
import random
import sys
from collections import defaultdict
from pathlib import Path

MAX_PROMPT_WORDS = 3
MAX_LENGTH_RATIO = 1.25
HELD_OUT_EVERY = 10
# The published file held Windows-1252; copies in circulation took it for Latin-1 and have control characters instead.
WINDOWS = {i: bytes([i]).decode("cp1252") for i in (0x85, *range(0x91, 0x98))}


def sentences(path: Path) -> list[list[str]]:
    """The words of every sentence that leaves something to say after the longest prompt, each sentence once."""
    data = path.read_bytes()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        text = data.decode("latin-1")
    lines = dict.fromkeys(text.translate(WINDOWS).split("\n"))  # splitlines() would also divide at a stray \x85
    return [words for line in lines if len(words := line.split()) > MAX_PROMPT_WORDS + 1]


def pairs(positive: list[list[str]], negative: list[list[str]]) -> list[dict[str, str]]:
    """Pairs of no sentence twice, those with the longest common beginning first, sorted by length within one."""
    rows, used = [], set()
    for count in range(MAX_PROMPT_WORDS, 0, -1):
        groups = defaultdict(lambda: ([], []))
        for side, group in enumerate((positive, negative)):
            for words in sorted(group, key=lambda words: len(" ".join(words))):
                if tuple(words) not in used:
                    groups[" ".join(words[:count])][side].append(words)
        for prompt, (good, bad) in groups.items():
            for one in good:
                other = next((b for b in bad if tuple(b) not in used and alike(one, b)), None)
                if other is not None:
                    used |= {tuple(one), tuple(other)}
                    rows.append({"prompt": prompt, "chosen": rest(one, count), "rejected": rest(other, count)})
    return rows


def alike(one: list[str], other: list[str]) -> bool:
    short, long = sorted((len(" ".join(one)), len(" ".join(other))))
    return long <= MAX_LENGTH_RATIO * short


def rest(words: list[str], count: int) -> str:
    return " ".join(words[count:])


def write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    print(f"{path} written")


def main(source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    draw, kept, held = random.Random(0), [], []
    for name in ("rt-polarity.pos", "rt-polarity.neg"):
        found = sentences(source / name)
        draw.shuffle(found)
        held.append(found[::HELD_OUT_EVERY])
        kept.append([words for number, words in enumerate(found) if number % HELD_OUT_EVERY])
    for suffix, (positive, negative) in (("", kept), (".heldout", held)):
        both = positive + negative
        draw.shuffle(both)
        write(target / f"text{suffix}.txt", "\n\n".join(" ".join(words) for words in both) + "\n")
        counts = [draw.randint(1, MAX_PROMPT_WORDS) for _ in both]
        rows = [{"prompt": " ".join(words[:k]), "completion": rest(words, k)} for words, k in zip(both, counts)]
        write(target / f"sft{suffix}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    rows = pairs(*kept)
    write(target / "pairs.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    print(f"{sum(map(len, kept))} sentences and {len(rows)} pairs to learn from, {sum(map(len, held))} held out")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
