"""The embedded corpus is what its README says, and its gold reward is hard to fool."""

import gzip
import json
import re
from pathlib import Path
from random import Random

import pytest

from lmkit.artifact import sha256, verify
from lmkit.data import tales
from lmkit.data.tales_grammar import HELD_OUT_PHRASING, PHRASINGS, TEMPLATES, TITLES, WORDS
from lmkit.errors import BadInput

DATA = Path(__file__).parents[2] / "data"
TEXT_COLUMNS = ("prompt", "completion", "chosen", "rejected")
PROMPT = "Tell me a story about an owl and a drum."
PERFECT = (
    "Long ago, a shy owl called Jack lived by the mill. Jack wanted a drum more than anything. "
    "The only drum belonged to Rosa the cat, not to Jack. Jack gladly lent Rosa a hand. "
    "At last Jack held the drum, and the baker cheered."
)


def text(name: str) -> str:
    raw = (DATA / "tales" / name).read_bytes()
    return (gzip.decompress(raw) if name.endswith(".gz") else raw).decode("ascii")


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in text(name).splitlines()]


def without(sentence: str) -> str:
    return " ".join(s for s in re.findall(r"[^.]+\.", PERFECT) if sentence not in s)


def combination(text: str) -> tuple[str, str]:
    """(animal, object) of a story, found by plain search, not by the reader under test."""
    animal = re.search(rf"\b({'|'.join(WORDS['animal'])})\b", text)[1]
    return animal, re.search(rf"\b({'|'.join(WORDS['object'])})\b", text)[1]


# ------------------------------------------------------------------------------------------------------ files


def test_generator_rebuilds_the_committed_files():
    built = tales.build()
    for name, (count, content) in built.items():
        committed = next((DATA / "tales").glob(f"{name}*")).name
        assert text(committed) == content, name
        assert len(content.strip().split("\n\n") if ".txt" in name else content.splitlines()) == count
    assert sum(f.stat().st_size for f in (DATA / "tales").iterdir()) <= 1_500_000


def test_sha256_in_the_readmes_are_true():
    table = dict(re.findall(r"^\| ([\w.]+) \|.*`([0-9a-f]{64})` \|$", (DATA / "tales/README.md").read_text(), re.M))
    files = {f.name for f in (DATA / "tales").iterdir()} - {"README.md", "MANIFEST.json"}
    assert set(table) == files
    assert len(files) == 7
    assert all(sha256(DATA / "tales" / name) == digest for name, digest in table.items())
    assert verify(DATA / "tales") in (DATA / "README.md").read_text()


def test_compressed_files_carry_no_time_and_no_name():
    assert tales.compressed("a\n")[:10] == b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x02\xff"


def test_write_does_not_replace_a_folder_it_did_not_make(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(BadInput, match="would be replaced"):
        tales.write(tmp_path)
    assert (tmp_path / "thesis.txt").exists()


# ------------------------------------------------------------------------------------------------------ content


def test_number_of_word_types():
    assert 750 <= len(set(re.findall(r"[a-z]+", text("text.txt.gz").lower()))) <= 850


def test_word_lists_have_no_word_in_common_and_no_word_of_a_template():
    lists = [words for role, words in WORDS.items() if role not in ("friend", "friend_animal")]
    everything = [word for words in lists for word in words]
    assert len(everything) == len(set(everything))
    sentences = [*PHRASINGS, HELD_OUT_PHRASING, *TITLES, *(t for ts in TEMPLATES.values() for t in ts)]
    literal = {word for s in sentences for word in re.findall(r"[A-Za-z]+", re.sub(r"\{\w+\}", "", s))}
    assert not literal & set(everything)


def test_every_template_names_the_hero_and_reads_back():
    assert set(map(len, TEMPLATES.values())) == {12}
    rng = Random(0)
    seen = set()
    for _ in range(2000):
        story = tales.tell(rng, tales.SEEN)
        sentences = re.findall(r"[^.]+\.", story.text)
        for sentence, slot in zip(sentences, story.slots, strict=True):
            found, words = tales.read_sentence(sentence.strip())
            assert found == slot
            assert words["hero"] == story.hero
            assert words.get("object", story.object) == story.object
            seen.add(re.sub("|".join(words.values()), "", sentence.strip()))
    assert len(seen) > 96


def test_a_name_that_begins_a_sentence_is_the_heros():
    assert not [t for templates in TEMPLATES.values() for t in templates if t.startswith("{friend")]
    told = [tales.tell(Random(number), tales.SEEN) for number in range(200)]
    starts = [(word, story.hero) for story in told for word in re.findall(r"(?:^|\. )([A-Z]\w+)", story.text)]
    assert all(word == hero for word, hero in starts if word in WORDS["hero"])
    assert sum(word == hero for word, hero in starts) > 200


def test_held_out_combinations_and_phrasing_appear_nowhere_else():
    held_out = rows("prompts.heldout.jsonl.gz")
    combinations = {(row["animal"], row["object"]) for row in held_out}
    phrase = re.compile(re.escape(HELD_OUT_PHRASING).replace(r"\{animal\}", r"\w+").replace(r"\{object\}", r"\w+"))
    trained = [*rows("sft.jsonl.gz"), *rows("sft.validation.jsonl.gz"), *rows("pairs.sample.jsonl")]
    trained += rows("prompts.train.jsonl.gz")
    documents = [*text("text.txt.gz").split("\n\n"), *text("text.validation.txt.gz").split("\n\n")]
    texts = documents + [value for row in trained for key, value in row.items() if key in TEXT_COLUMNS]
    assert len(combinations) == 96
    assert len({row["prompt"] for row in held_out}) == len(held_out) == 288
    assert sum(bool(phrase.fullmatch(row["prompt"])) for row in held_out) == 96
    assert sum(row["phrasing"] == "held-out" for row in held_out) == 96
    assert not combinations & {combination(t) for t in texts}
    assert not any(phrase.search(t) for t in texts)


def test_corpus_has_titles_and_no_request():
    documents = text("text.txt.gz").split("\n\n")
    assert all(d.strip().count("\n") == 1 for d in documents)
    openings = tuple(phrasing.split("{")[0] for phrasing in PHRASINGS)
    assert not any(line.startswith(openings) for d in documents for line in d.splitlines())


def test_demonstrators_are_uneven_and_never_wrong_in_the_request():
    golds = [tales.gold(row["prompt"], row["completion"]) for row in rows("sft.jsonl.gz")]
    share = {k: sum(g[k] for g in golds) / len(golds) for k in golds[0]}
    assert share["animal"] == share["object"] == share["hero"] == 1
    assert share["length"] == 0
    assert abs(share["kindness"]) < 0.06
    assert abs(share["ending"]) < 0.06
    assert 0.13 < -share["repetition"] < 0.17
    assert sum(g["kindness"] == g["ending"] for g in golds) / len(golds) == pytest.approx(0.5, abs=0.03)
    assert share["gold"] == pytest.approx(3.83, abs=0.1)
    assert max(g["gold"] for g in golds) == 6
    assert all(g["gold"] == pytest.approx(sum(g[k] for k in tales.COMPONENTS)) for g in golds)


def test_sample_pairs_mostly_prefer_the_better_story():
    pairs = rows("pairs.sample.jsonl")
    assert len(pairs) == 200
    assert all(p["gold_chosen"] != p["gold_rejected"] for p in pairs)
    assert 0.7 < sum(p["gold_chosen"] > p["gold_rejected"] for p in pairs) / 200 < 0.95


# ------------------------------------------------------------------------------------------------------ gold


def test_perfect_story():
    assert tales.gold(PROMPT, PERFECT) == {
        "animal": 1,
        "object": 1,
        "kindness": 1,
        "ending": 1,
        "hero": 1,
        "grammar": 1,
        "repetition": 0,
        "length": 0,
        "gold": 6,
    }
    # A decoded completion may start or end with white space.
    assert tales.gold(PROMPT, f"\n {PERFECT} ")["gold"] == 6


@pytest.mark.parametrize(
    ("change", "component", "value"),
    [
        (("shy owl", "shy cat"), "animal", 0),
        (("drum", "flute"), "object", 0),
        (("gladly lent Rosa a hand", "told a cruel lie about Rosa"), "kindness", -1),
        (("At last Jack held the drum, and the baker cheered", "Jack and Rosa never spoke again"), "ending", -1),
        ((" At last", " At last at last"), "ending", 0),
        ((" At last Jack held", " At last Hugo held"), "hero", 0.75),
        ((" At last Jack held", " At last Hugo keeps"), "grammar", 0.8),
        (("a shy owl", "an shy owl"), "grammar", 0.8),
        (("a shy owl", "a angry owl"), "grammar", 0.8),
        (("lent Rosa", "lent Jack"), "grammar", 0.8),
    ],
)
def test_each_component_sees_its_change(change, component, value):
    assert change[0] in PERFECT
    assert tales.gold(PROMPT, PERFECT.replace(*change))[component] == pytest.approx(value)


def test_length_counts_sentences():
    assert tales.gold(PROMPT, without("lent"))["length"] == 0
    assert tales.gold(PROMPT, " ".join(PERFECT.split(". ")[:1]))["length"] == -1
    assert tales.gold(PROMPT, f"{PERFECT} {PERFECT}")["length"] == -1


def test_repetition_costs_each_copy_and_its_place_in_the_grammar():
    wish = "Jack wanted a drum more than anything."
    score = tales.gold(PROMPT, PERFECT.replace(wish, f"{wish} {wish} {wish}"))
    assert score["repetition"] == -2
    assert score["grammar"] == pytest.approx(5 / 7)


def test_third_attempt_and_a_second_act_are_outside_the_grammar():
    third = (
        "Jack dug a tunnel, yet the ground was frozen. Jack made a secret plan, which failed. Jack cooked soup, and "
    )
    story = PERFECT.replace("Jack gladly", f"{third}it burned. Jack gladly")
    assert tales.gold(PROMPT, story)["grammar"] == pytest.approx(7 / 8)
    story = PERFECT.replace("At last", "Jack forgave Rosa and smiled. At last")
    assert tales.gold(PROMPT, story)["grammar"] == pytest.approx(5 / 6)


@pytest.mark.parametrize(
    "fake",
    [
        "",
        "   \n",
        "...",
        "owl drum kind happy friends owl drum Jack Jack Jack",
        "owl. drum. Jack. friends. happy.",
        # the failure seen when PPO ran without a KL penalty: two rewarded phrases glued together
        "Jack gladly lent Rosa a hand of bread with Jack the owl and the drum and the baker cheered.",
        PERFECT.replace(". ", " and "),
        PERFECT.replace(" ", ""),
        PERFECT.lower(),
        " ".join(sorted(PERFECT.split())),
    ],
)
def test_soup_is_worth_nothing(fake):
    score = tales.gold(PROMPT, fake)
    assert score["gold"] <= 0
    assert all(score[k] <= 0 for k in ("animal", "object", "kindness", "ending", "hero"))


def test_only_good_sentences_do_not_make_a_story():
    happy_only = "At last Jack held the drum, and the baker cheered. From then on, Jack and Rosa were best friends. "
    assert tales.gold(PROMPT, happy_only + "Jack forgave Rosa and smiled. Jack gladly lent Rosa a hand.")["gold"] < 2


def test_text_of_another_request_loses_what_was_asked():
    other = tales.gold("Give me a story with a wolf and a map.", PERFECT)
    assert (other["animal"], other["object"], other["gold"]) == (0, 0, 4)


@pytest.mark.parametrize(
    "prompt",
    ["", "What is 2 + 2?", "Tell me a story about a owl and a drum.", "Tell me a story about a car and a pen."],
)
def test_gold_refuses_other_prompts(prompt):
    with pytest.raises(ValueError, match="reads requests of the tales"):
        tales.gold(prompt, PERFECT)


def test_every_request_is_understood():
    for name in ("prompts.train.jsonl.gz", "prompts.heldout.jsonl.gz"):
        assert all(tales.requested(row["prompt"]) == (row["animal"], row["object"]) for row in rows(name))


# ------------------------------------------------------------------------------------------------------ preferences


def test_prefer_follows_bradley_terry():
    def rate(a, b, **settings):
        rng = Random(0)
        return sum(tales.prefer(a, b, rng, **settings) for _ in range(4000)) / 4000

    assert rate(2.0, 1.0, flip=0.0) == pytest.approx(0.7311, abs=0.02)  # sigmoid(1)
    assert rate(2.0, 1.0, temperature=0.5, flip=0.0) == pytest.approx(0.8808, abs=0.02)  # sigmoid(2)
    assert rate(1e6, 0.0) == pytest.approx(0.95, abs=0.01)
    assert rate(0.0, 1e6) == pytest.approx(0.05, abs=0.01)
    assert tales.prefer(1.5, 1.5, Random(0)) is None
