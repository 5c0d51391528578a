"""Tales: the embedded corpus, its requests and demonstrations, and the gold reward that reads a story by its grammar.

    python -m lmkit.data.tales --output data/tales        # rebuilds the files of data/tales from the seed

A story is an opening, a wish, a problem, up to two attempts, a kind or unkind act, and a happy or sad end, each one
sentence. A request names an animal and an object. Nothing here is imported by training: the gold reward is for
labelling and evaluation.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from lmkit.artifact import MANIFEST, seal, sha256, verify
from lmkit.data.tales_grammar import (
    ANIMALS,
    HELD_OUT_PHRASING,
    NAMES,
    OBJECTS,
    PHRASINGS,
    TEMPLATES,
    TITLES,
    WORDS,
)
from lmkit.errors import BadInput

SEED = 20261120
COMPONENTS = ("animal", "object", "kindness", "ending", "hero", "grammar", "repetition", "length")
MIN_SENTENCES, MAX_SENTENCES = 4, 8
# Each animal and each object is held out with four partners, and seen with twenty.
HELD_OUT = {(a, o) for i, a in enumerate(ANIMALS) for j, o in enumerate(OBJECTS) if (i + j) % 6 == 0}
SEEN = [(a, o) for a in ANIMALS for o in OBJECTS if (a, o) not in HELD_OUT]

_ROLE = re.compile(r"\{(\w+)\}")
_CLASS = {"friend": "hero", "friend_animal": "animal"}  # roles that draw from another role's words
_WORD_CLASS = {word: f"<{role}>" for role, words in WORDS.items() if role not in _CLASS for word in words}
_ORDER = {"opening": 0, "wish": 1, "problem": 2, "attempt": 3, "kind": 4, "unkind": 4, "happy": 5, "sad": 5}

# ------------------------------------------------------------------------------------------------------ telling


class Story(NamedTuple):
    """A told story and what it is about."""

    text: str
    animal: str
    object: str
    hero: str
    slots: tuple[str, ...]


def _pick(rng: Random, items: Any) -> Any:
    # Only `random()` is promised to give the same numbers in every Python.
    return items[int(rng.random() * len(items))]


def _shuffled(rng: Random, items: list) -> list:
    keys = [(rng.random(), index) for index in range(len(items))]
    return [items[index] for _, index in sorted(keys)]


def _word(rng: Random, role: str) -> str:
    words = WORDS[role]
    return words[int(len(words) * rng.random() ** (1 if role == "place" else 3))]


def with_articles(text: str) -> str:
    """The text with `a` before a vowel written `an`.

    >>> with_articles("A owl had a drum and a apron.")
    'An owl had a drum and an apron.'
    """
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)


def tell(
    rng: Random, pairs: list[tuple[str, str]], *, kind: float = 0.5, happy: float = 0.5, repeat: float = 0.0
) -> Story:
    """A story about one of the (animal, object) `pairs`.

    kind, happy, repeat: the chances of a kind act, of a happy end, and of one inner sentence told twice.
    """
    animal, thing = _pick(rng, pairs)
    hero, friend = _shuffled(rng, NAMES)[:2]
    cast = {"animal": animal, "object": thing, "hero": hero, "friend": friend}
    cast["friend_animal"] = _pick(rng, [other for other in ANIMALS if other != animal])
    act = "kind" if rng.random() < kind else "unkind"
    end = "happy" if rng.random() < happy else "sad"
    attempts = _pick(rng, (0, 0, 0, 0, 1, 1, 2))
    slots = ["opening", "wish", "problem", *["attempt"] * attempts, act, end]
    sentences: list[str] = []
    unused = {slot: _shuffled(rng, templates) for slot, templates in TEMPLATES.items()}
    for slot in slots:
        filled = _ROLE.sub(lambda m: cast.get(m[1]) or _word(rng, m[1]), unused[slot].pop())
        sentences.append(with_articles(filled))
    if rng.random() < repeat:
        index = 1 + int(rng.random() * (len(slots) - 2))
        sentences.insert(index, sentences[index])
        slots.insert(index, slots[index])
    return Story(" ".join(sentences), animal, thing, hero, tuple(slots))


def request(phrasing: str, animal: str, thing: str) -> str:
    """A request for a story.

    >>> request("Tell me a story about a {animal} and a {object}.", "owl", "drum")
    'Tell me a story about an owl and a drum.'
    """
    return with_articles(phrasing.format(animal=animal, object=thing))


# ------------------------------------------------------------------------------------------------------ reading


def _skeleton(template: str) -> tuple[str, tuple[str, ...]]:
    """(template with classes for roles, its roles in order)."""
    return _ROLE.sub(lambda m: f"<{_CLASS.get(m[1], m[1])}>", template), tuple(_ROLE.findall(template))


_SENTENCES = {}
for _slot, _templates in TEMPLATES.items():
    for _template in _templates:
        _key, _roles = _skeleton(_template)
        _SENTENCES[_key] = (_slot, _roles)
_REQUESTS = dict(_skeleton(phrasing) for phrasing in [*PHRASINGS, HELD_OUT_PHRASING])
_WORD = re.compile(r"[A-Za-z]+")
_WRONG_ARTICLE = re.compile(r"\b(?:[Aa] (?=[aeiou])|[Aa]n (?![aeiou]))")
_ARTICLE = re.compile(r"\b([Aa])n ")
_SPLIT = re.compile(r"[^.!?]*[.!?]|[^.!?]+$")


def _gaps(text: str) -> tuple[str, list[str]]:
    """The text with each listed word replaced by its class, and those words in order."""
    words = [word for word in _WORD.findall(text) if word in _WORD_CLASS]
    skeleton = _WORD.sub(lambda m: _WORD_CLASS.get(m[0], m[0]), text)
    return _ARTICLE.sub(r"\1 ", skeleton), words


def read_sentence(sentence: str) -> tuple[str, dict[str, str]] | None:
    """(slot, word of each role) of a sentence the grammar can make, None for any other text.

    >>> read_sentence("Jack and Rosa never spoke again.")
    ('sad', {'hero': 'Jack', 'friend': 'Rosa'})
    """
    skeleton, words = _gaps(sentence)
    if skeleton not in _SENTENCES or _WRONG_ARTICLE.search(sentence):
        return None
    slot, roles = _SENTENCES[skeleton]
    found: dict[str, str] = {}
    for role, word in zip(roles, words):
        if found.setdefault(role, word) != word:
            return None
    return None if found.get("friend") == found["hero"] else (slot, found)


def requested(prompt: str) -> tuple[str, str]:
    """(animal, object) that a request asks for; ValueError when the prompt is not one of the requests.

    >>> requested("Tell me a story about an owl and a drum.")
    ('owl', 'drum')
    """
    skeleton, words = _gaps(prompt)
    if skeleton not in _REQUESTS or _WRONG_ARTICLE.search(prompt):
        raise ValueError(
            f"The gold reward reads requests of the tales, such as {request(PHRASINGS[0], 'owl', 'drum')!r}; "
            f"found the prompt {prompt[:200]!r}. For other prompts judge by a reward model or a reward function."
        )
    found = dict(zip(_REQUESTS[skeleton], words))
    return found["animal"], found["object"]


def gold(prompt: str, completion: str) -> dict[str, float]:
    """The gold reward of a story, from its text alone: each component, and their sum as `gold` (at most 6).

    animal      1 if the first sentence is an opening about the requested animal
    object      1 if a sentence of the grammar is about the requested object
    kindness    1 for a kind act, -1 for an unkind one
    ending      1 if the story ends with a happy end, -1 if it has a sad one
    hero        share of the sentences after the opening that are about the opening's hero
    grammar     share of the sentences that the grammar can make, in an order that it allows
    repetition  -1 for each sentence told before
    length      -1 for fewer than 4 or more than 8 sentences

    ValueError when the prompt is not a request of the tales.
    """
    animal, thing = requested(prompt)
    sentences = [stripped for s in _SPLIT.findall(completion) if (stripped := s.strip())]
    readings = [read_sentence(s) for s in sentences]
    count = len(sentences)
    slots = [reading[0] if reading else None for reading in readings]
    told = _in_order(slots)
    opening = readings[0][1] if slots[:1] == ["opening"] else {}
    scores = {
        "animal": float(opening.get("animal") == animal),
        "object": float(any(r and r[1].get("object") == thing for r in readings)),
        "kindness": -1.0 if "unkind" in slots else float("kind" in told),
        "ending": -1.0 if "sad" in slots else float("happy" in told and slots[-1] == "happy"),
        "hero": sum(_same_hero(r, opening) for r in readings[1:]) / max(count - 1, 1) if opening else 0.0,
        "grammar": len(told) / max(count, 1),
        "repetition": float(len(set(sentences)) - count),
        "length": 0.0 if MIN_SENTENCES <= count <= MAX_SENTENCES else -1.0,
    }
    return scores | {"gold": sum(scores.values())}


def _in_order(slots: list[str | None]) -> list[str]:
    """The slots that follow each other as in a story; what is unknown, or comes too late or too often, is left out."""
    told: list[str] = []
    for slot in slots:
        step = _ORDER[slot] - (_ORDER[told[-1]] if told else -1) if slot else 0
        if step > 0 or (slot == "attempt" and step == 0 and told.count("attempt") < 2):
            told.append(slot)
    return told


def _same_hero(reading: tuple[str, dict[str, str]] | None, opening: dict[str, str]) -> bool:
    if reading is None:
        return False
    words = reading[1]
    return words["hero"] == opening["hero"] and words.get("animal", opening["animal"]) == opening["animal"]


def prefer(gold_a: float, gold_b: float, rng: Random, temperature: float = 1.0, flip: float = 0.05) -> bool | None:
    """Whether a Bradley-Terry annotator chooses a over b; None for a tie, which such an annotator cannot label.

    a is chosen with probability sigmoid((gold_a - gold_b) / temperature) (Bradley and Terry 1952,
    https://doi.org/10.2307/2334029), and the label is then turned round with probability `flip`.
    """
    if gold_a == gold_b:
        return None
    # The hyperbolic tangent form of the sigmoid cannot overflow.
    chosen = rng.random() < 0.5 * (1 + math.tanh((gold_a - gold_b) / (2 * temperature)))
    return chosen != (rng.random() < flip)


# ------------------------------------------------------------------------------------------------------ files

_DEMONSTRATORS = {"kind": 0.5, "happy": 0.5, "repeat": 0.15}


def corpus(rng: Random, num_stories: int) -> Iterator[str]:
    """Stories for pretraining, none about a held-out combination, each under a title.

    The titles are what teaches a small model to bind a request's animal and object to the story that follows.
    """
    for _ in range(num_stories):
        story = tell(rng, SEEN)
        title = with_articles(_pick(rng, TITLES).format(animal=story.animal, object=story.object))
        yield f"{title}\n{story.text}"


def demonstrations(rng: Random, num_rows: int) -> Iterator[dict[str, str]]:
    """Rows of prompt and completion by uneven demonstrators: half unkind, half sad, 15 % repeat a sentence."""
    for _ in range(num_rows):
        story = tell(rng, SEEN, **_DEMONSTRATORS)
        prompt = request(_pick(rng, PHRASINGS), story.animal, story.object)
        yield {"prompt": prompt, "completion": story.text}


def requests(rng: Random, held_out: bool) -> list[dict[str, str]]:
    """Rows of prompt, animal, object and phrasing (`seen` or `held-out`), each prompt once, in a shuffled order.

    held_out: three requests for each held-out combination, one in the held-out phrasing; else every seen combination
    in every seen phrasing.
    """
    rows = []
    for animal, thing in sorted(HELD_OUT) if held_out else SEEN:
        phrasings = [*_shuffled(rng, PHRASINGS)[:2], HELD_OUT_PHRASING] if held_out else PHRASINGS
        for phrasing in phrasings:
            name = "held-out" if phrasing == HELD_OUT_PHRASING else "seen"
            prompt = request(phrasing, animal, thing)
            rows.append({"prompt": prompt, "animal": animal, "object": thing, "phrasing": name})
    return _shuffled(rng, rows)


def sample_pairs(rng: Random, num_rows: int) -> Iterator[dict[str, Any]]:
    """Pairs of demonstrations of one request, labelled by `prefer`: to look at, not what the chain trains on."""
    while num_rows:
        pair = _pick(rng, SEEN)
        prompt = request(_pick(rng, PHRASINGS), *pair)
        stories = [tell(rng, [pair], **_DEMONSTRATORS).text for _ in range(2)]
        golds = [round(gold(prompt, story)["gold"], 4) for story in stories]
        choice = prefer(*golds, rng)
        if choice is None:
            continue
        num_rows -= 1
        chosen, rejected = (0, 1) if choice else (1, 0)
        yield {
            "prompt": prompt,
            "chosen": stories[chosen],
            "rejected": stories[rejected],
            "gold_chosen": golds[chosen],
            "gold_rejected": golds[rejected],
        }


def build() -> dict[str, tuple[int, str]]:
    """(number of rows, text) of every data file by its name; the same on every machine."""

    def rng(name: str) -> Random:
        return Random(f"{SEED} {name}")

    def lines(rows: Any) -> tuple[int, str]:
        rows = list(rows)
        return len(rows), "".join(json.dumps(row) + "\n" for row in rows)

    stories = {"text.txt": 18_000, "text.validation.txt": 400}
    files = {name: (count, "\n\n".join(corpus(rng(name), count)) + "\n") for name, count in stories.items()}
    files["sft.jsonl"] = lines(demonstrations(rng("sft.jsonl"), 3_000))
    files["sft.validation.jsonl"] = lines(demonstrations(rng("sft.validation.jsonl"), 300))
    files["prompts.train.jsonl"] = lines(requests(rng("prompts.train.jsonl"), held_out=False))
    files["prompts.heldout.jsonl"] = lines(requests(rng("prompts.heldout.jsonl"), held_out=True))
    files["pairs.sample.jsonl"] = lines(sample_pairs(rng("pairs.sample.jsonl"), 200))
    return files


_README = """# Tales

18,000 short stories for pretraining, with requests, demonstrations and a gold reward: enough to run the whole chain
from raw text to an RLHF-trained model in minutes on a laptop, and to measure exactly what it did.

- Origin: written by a program, the grammar of `lmkit/data/tales_grammar.py` (seed {seed}). No person wrote a story.
  `python -m lmkit.data.tales` rebuilds this folder; the text is the same on every machine, and the compressed bytes
  are too wherever Python uses the same zlib.
- Licence: CC0 1.0 (https://creativecommons.org/publicdomain/zero/1.0/).
- Language: plain ASCII English, about 800 word types. A story is an opening, a wish, a problem, up to two attempts, a
  kind or unkind act, and a happy or sad end: 5 to 8 sentences.
- Gold reward: `lmkit.data.tales.gold(prompt, completion)` reads the text alone, at most 6.

| file | rows | columns | sha256 |
|---|---|---|---|
{table}

`text*.txt.gz` are documents separated by one blank line; each carries a title line, none a request.
Demonstrations are uneven on purpose, which leaves RLHF something to improve: half tell an unkind act, half end badly,
15 % repeat a sentence. They are never wrong in the requested animal and object or in the hero.
{held_out} of {combinations} combinations of animal and object appear in `prompts.heldout` alone, and one phrasing of
the request too (column `phrasing`). `pairs.sample` is to look at: the chain samples its own pairs from its own model.
The gold columns are never read by training.

What it cannot show: anything about natural language, facts, safety or people's preferences. The preferences are those
of a program. A model trained on it can tell these stories and nothing else.
"""


def compressed(text: str) -> bytes:
    """The text as gzip without time and name, so that equal text gives equal bytes."""
    buffer = io.BytesIO()
    # gzip.compress writes the operating system into the header in some versions of Python.
    with gzip.GzipFile("", "wb", compresslevel=9, fileobj=buffer, mtime=0) as file:
        file.write(text.encode("ascii"))
    return buffer.getvalue()


def write(output: Path) -> str:
    """Writes the data files, README.md and MANIFEST.json as the folder `output`; returns the manifest's id."""
    if output.exists() and any(output.iterdir()) and not (output / MANIFEST).is_file():
        raise BadInput(f"{output} holds other files and would be replaced whole. Pass --output a new or empty folder.")
    table = []
    with seal(output) as folder:
        for name, (count, text) in build().items():
            # The sample is to look at, so it stays readable.
            path = folder / (name if name == "pairs.sample.jsonl" else f"{name}.gz")
            path.write_bytes(text.encode("ascii") if path.suffix == ".jsonl" else compressed(text))
            columns = "documents" if ".txt" in name else ", ".join(json.loads(text[: text.index("\n")]))
            table.append(f"| {path.name} | {count:,} | {columns} | `{sha256(path)}` |")
        numbers = {"seed": SEED, "held_out": len(HELD_OUT), "combinations": len(HELD_OUT) + len(SEEN)}
        (folder / "README.md").write_text(_README.format(table="\n".join(table), **numbers), encoding="ascii")
    return verify(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("data/tales"), help="folder to write (replaced whole)")
    output = parser.parse_args().output
    print(f"{output}  manifest {write(output)}")


if __name__ == "__main__":
    main()
