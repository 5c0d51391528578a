"""The tokenizer stage: artifacts as promised on the embedded and on one's own text, refusals, and running again."""

import json
import re
import shutil

import datasets
import numpy as np
import pytest
from datasets import Dataset
from pydantic import ValidationError
from tokenizer import TokenizerConfig, main
from transformers import AutoTokenizer

from lmkit.config import load, validate
from lmkit.data.mixture import open_mixture
from lmkit.data.shards import Shards
from lmkit.data.sources import read_text
from lmkit.errors import BadInput
from lmkit.stage import read_record, run
from lmkit.tokenization.chat import encode_text, stop_token_ids


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.txt"
    stories = [
        f"Story {i}.\nThe {a} met the {b} in the wood." for i in range(60) for a, b in (("owl", "fox"), ("fox", "hen"))
    ]
    path.write_text("\n\n".join(stories))
    return path


def config(tmp_path, corpus, **changes):
    source = corpus if isinstance(corpus, list) else str(corpus)
    values = {"output_dir": tmp_path / "out", "corpus": source, "num_processes": 1}
    learning = {} if "tokenizer" in changes else {"vocab_size": 384, "allow_smaller_vocab": True}
    return TokenizerConfig(**values | learning | changes)


def test_the_stage_on_the_embedded_corpus(tmp_path, capsys):
    held_out = shutil.copy("data/tales/text.validation.txt.gz", tmp_path / "held_out.txt.gz")
    values = {"corpus": "data/tales/text.validation.txt.gz", "validation": str(held_out)}
    directory = main(TokenizerConfig(output_dir=tmp_path / "out", vocab_size=512, num_processes=1, **values))
    tokenizer = AutoTokenizer.from_pretrained(directory / "tokenizer")
    shards = Shards.open(directory / "shards/train")
    shards.check_tokenizer(tokenizer)
    assert len(tokenizer) == 512
    assert stop_token_ids(tokenizer) == [2, 0]
    assert shards.meta["num_documents"] == 400
    metrics = read_record(directory)["metrics"]
    assert metrics["num_exact"] == metrics["num_documents"] == 400
    assert metrics["num_learnt"] == 512 - 20
    assert metrics["train/num_tokens"] == len(shards.tokens)
    output = capsys.readouterr().out
    assert "400 of 400 held-out documents come back exactly" in output
    assert "sample: " in output


@pytest.mark.parametrize("streaming", [False, True])
def test_a_corpus_of_the_hub_gives_what_its_texts_give(streaming, tmp_path, corpus, monkeypatch):
    rows = Dataset.from_dict({"text": corpus.read_text().split("\n\n")})
    asked = []

    def load_dataset(name, **where):
        asked.append((name, where["revision"], where["streaming"]))
        return rows.to_iterable_dataset() if streaming else rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    hub = main(config(tmp_path, "hub:org/name@0123abc", streaming=streaming))
    local = main(config(tmp_path, corpus, output_dir=tmp_path / "local"))
    for name in ("tokenizer/tokenizer.json", "shards/train/tokens.bin", "shards/validation/documents.bin"):
        assert (hub / name).read_bytes() == (local / name).read_bytes()
    assert set(asked) == {("org/name", "0123abc", streaming)}


def test_ones_own_text_is_divided_by_its_content(tmp_path, corpus):
    directory = main(config(tmp_path, corpus, validation_fraction=0.2))
    train, validation = (Shards.open(directory / "shards" / split) for split in ("train", "validation"))
    assert train.meta["num_documents"] + validation.meta["num_documents"] == 120
    assert 10 < validation.meta["num_documents"] < 40
    tokenizer = AutoTokenizer.from_pretrained(directory / "tokenizer")
    documents = [tokenizer.decode(ids) for ids in np.split(train.tokens, train.document_offsets[1:-1])]
    held = [tokenizer.decode(ids) for ids in np.split(validation.tokens, validation.document_offsets[1:-1])]
    assert not set(documents) & set(held)


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece_unigram"])
def test_the_order_of_the_files_does_not_change_the_tokenizer(kind, tmp_path, corpus):
    (tmp_path / "other.txt").write_text("A heron and a hare shared bread.\n\nThe heron slept." * 20)
    files = [str(corpus), str(tmp_path / "other.txt")]
    first = main(config(tmp_path, files, kind=kind))
    second = main(config(tmp_path, files[::-1], kind=kind, output_dir=tmp_path / "reversed"))
    name = "tokenizer/tokenizer.json"
    assert (first / name).read_bytes() == (second / name).read_bytes()


def test_a_given_tokenizer_is_taken_as_it_is(tmp_path, corpus):
    first = main(config(tmp_path, corpus))
    taken = config(tmp_path, corpus, output_dir=tmp_path / "second", tokenizer=first / "tokenizer")
    second = main(taken)
    texts = ["The owl <|im_end|>", "caf\u00e9"]
    old, new = (AutoTokenizer.from_pretrained(directory / "tokenizer") for directory in (first, second))
    assert [encode_text(old, text) for text in texts] == [encode_text(new, text) for text in texts]
    name = "shards/train/tokens.bin"
    assert (first / name).read_bytes() == (second / name).read_bytes()


def test_running_again_changes_nothing(tmp_path, corpus, capsys):
    main(config(tmp_path, corpus))
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*") if p.is_file()}
    main(config(tmp_path, corpus, trainer="tokenizers", num_processes=2))
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*") if p.is_file()} == before
    assert "skipped" in capsys.readouterr().out
    with pytest.raises(BadInput, match="split: qwen2, now gpt2"):
        main(config(tmp_path, corpus, split="gpt2"))


@pytest.mark.parametrize("kind", ["sentencepiece_bpe", "sentencepiece_unigram"])
def test_sentencepiece(kind, tmp_path, corpus, capsys):
    directory = main(config(tmp_path, corpus, kind=kind))
    assert read_record(directory)["metrics"]["hostile_changed"] == []


def test_a_lossy_tokenizer_is_warned_about(tmp_path, corpus, capsys):
    main(config(tmp_path, corpus, nfc=True))
    assert "warning: this tokenizer changes texts with combining marks" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 1000}, "Set it to 1024"),
        ({"vocab_size": 256}, "Set it to 384"),
        ({"special_tokens": ["the"]}, "not of the shape"),
        ({"special_tokens": ["<|a|>", "<|a|>"]}, "given twice"),
        ({"split": "bert"}, "qwen2"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_read(changes, message, tmp_path):
    with pytest.raises(ValidationError, match=message):
        config(tmp_path, "nowhere", **changes)


LEARNT = "not read, because a tokenizer is given and none is learnt. Leave it out"


@pytest.mark.parametrize(
    ("changes", "unread"),
    [
        (
            {"tokenizer": "t", "vocab_size": 2048, "special_tokens": ["<|a|>"]},
            {"vocab_size": LEARNT, "special_tokens": LEARNT},
        ),
        ({"tokenizer": "t", "kind": "sentencepiece_bpe", "split": "gpt2"}, {"kind": LEARNT, "split": LEARNT}),
        (
            {"tokenizer": "t", "nfc": True, "max_token_length": 9, "min_frequency": 3, "allow_smaller_vocab": True},
            dict.fromkeys(("nfc", "max_token_length", "min_frequency", "allow_smaller_vocab"), LEARNT),
        ),
        ({"tokenizer": "t", "trainer": "rustbpe"}, {"trainer": LEARNT}),
        (
            {"kind": "sentencepiece_unigram", "split": "gpt4", "min_frequency": 3, "trainer": "tokenizers"},
            dict.fromkeys(
                ("split", "min_frequency", "trainer"),
                "not read, because kind sentencepiece_unigram has no such step. Leave it out",
            ),
        ),
        (
            {"validation_fraction": 0.1},
            {"validation_fraction": "not read, because validation names the held-out texts. Leave it out"},
        ),
        ({"kind": "sentencepiece_bpe", "nfc": True, "max_token_length": 9, "special_tokens": ["<|a|>"]}, {}),
        ({"corpus": "mine", "validation_fraction": 0.1, "split": "gpt2", "min_frequency": 3}, {}),
        ({"tokenizer": "t", "vocab_size": 1024, "validation": None, "validation_fraction": 0.1}, {}),
    ],
)
def test_a_setting_that_would_not_be_read_is_refused(changes, unread):
    found = []
    try:
        validate(TokenizerConfig, changes)
    except BadInput as error:
        found = [line.strip() for line in str(error).split("\n")[1:]]
    assert sorted(found) == sorted(f"{name}: {why}" for name, why in unread.items())


def test_mistakes_are_listed_together():
    flags = ["--vocab_size", "1000", "--special_tokens", "[the]", "--kindd", "bpe"]
    with pytest.raises(BadInput, match=r"(?s)3 mistakes.*Set it to 1024.*not of the shape.*Did you mean kind") as error:
        load(TokenizerConfig, flags)
    assert "\n" in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no text"),
        (b" \n\n \n", "holds no text"),
        (b"good\n\nb\xe9d", r"corpus\.txt:3"),
        (b"one document", "held out"),
    ],
)
def test_a_bad_corpus_is_refused_and_nothing_is_made(content, message, tmp_path, corpus):
    corpus.write_bytes(content)
    with pytest.raises(BadInput, match=message):
        main(config(tmp_path, corpus))
    assert not (tmp_path / "out" / "tokenizer").exists()
    assert not (tmp_path / "out" / "shards").exists()


STORIES = b"\n\n".join(b"Story %d. The owl met the fox in the wood." % number for number in range(300))


@pytest.mark.parametrize(
    ("content", "flags", "message"),
    [
        (b"", [], "holds no text"),
        (b" \n\n\t\n", [], "holds no text"),
        (b"good\n\nb\xe9d", [], "corpus.txt:3:2  the byte 0xe9 is not UTF-8"),
        (STORIES, ["--vocab_size", "256"], "Set it to 384"),
        (STORIES, ["--vocab_size", "8192"], "allow_smaller_vocab"),
        (STORIES, ["--special_tokens", "['']"], "special token ''"),
        (STORIES, ["--special_tokens", "[' ']"], "special token ' '"),
        (STORIES, ["--special_tokens", "[the]"], "special token 'the'"),
        (STORIES, ["--special_tokens", "['<|a|>','<|a|>']"], "given twice"),
        (STORIES, ["--special_tokens", "['<|im_end|>']"], "is there already"),
        (STORIES, ["--special_tokens", "['<|im']"], "special token '<|im'"),
        (STORIES, ["--tokenizer", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_exit_code_2_and_nothing_is_made(content, flags, message, tmp_path, corpus, monkeypatch, capsys):
    corpus.write_bytes(content)
    output_dir = tmp_path / "out"
    options = ["--corpus", str(corpus), "--output_dir", str(output_dir), "--num_processes", "1"]
    size = [] if {"--vocab_size", "--tokenizer"} & set(flags) else ["--vocab_size", "384"]
    monkeypatch.setattr("sys.argv", ["tokenizer.py", *options, *size, *flags])
    monkeypatch.setattr("signal.signal", lambda number, handler: None)
    with pytest.raises(SystemExit) as ending:
        run(main, TokenizerConfig, None)
    assert ending.value.code == 2
    assert message in capsys.readouterr().err
    left = {path.name for path in output_dir.rglob("*")} if output_dir.exists() else set()
    assert not left & {"tokenizer", "shards", "stage.json", "tokenizer.json", "tokens.bin"}


def test_a_vocabulary_the_corpus_cannot_fill_is_refused(tmp_path, corpus):
    with pytest.raises(BadInput, match="allow_smaller_vocab") as refused:
        main(config(tmp_path, corpus, vocab_size=8192, allow_smaller_vocab=False))
    reached = int(re.search(r"supports a vocabulary of (\d+), not 8192", str(refused.value))[1])
    assert not (tmp_path / "out" / "tokenizer").exists()
    directory = main(config(tmp_path, corpus, vocab_size=8192, output_dir=tmp_path / "other"))
    meta = json.loads((directory / "shards/train/meta.json").read_text())
    assert meta["vocab_size"] == len(AutoTokenizer.from_pretrained(directory / "tokenizer")) < 8192
    assert read_record(directory)["metrics"]["num_learnt"] == reached - 20


def test_machines_encode_parts_of_a_corpus_that_are_together_the_whole(tmp_path, corpus):
    whole = main(config(tmp_path, corpus))
    given = {"tokenizer": whole / "tokenizer", "validation_fraction": 0.2}
    with pytest.raises(BadInput, match="part 1/3 needs --tokenizer"):
        main(config(tmp_path, corpus, part="1/3"))
    with pytest.raises(BadInput, match="part '4/3': wanted k/n"):
        main(config(tmp_path, corpus, part="4/3", **given))
    alone = Shards.open(main(config(tmp_path, corpus, output_dir=tmp_path / "alone", **given)) / "shards/train")
    parts = [
        main(config(tmp_path, corpus, output_dir=tmp_path / f"part-{k}", part=f"{k}/3", **given)) / "shards"
        for k in (1, 2, 3)
    ]
    tokenizer, how = AutoTokenizer.from_pretrained(whole / "tokenizer"), {"packing": "pad", "document_mask": False}

    def mixture(folders):
        return open_mixture(folders, "train", tokenizer, 64, weights=[], seed=0, **how)

    def texts(shards):
        pieces = np.split(shards.tokens, shards.document_offsets[1:-1])
        return sorted(piece.tobytes() for piece in pieces)

    opened = [Shards.open(folder / "train") for folder in parts]
    assert sorted(text for shards in opened for text in texts(shards)) == texts(alone)
    assert len(mixture(parts)) == alone.meta["num_documents"]
    with pytest.raises(BadInput, match="part 2/3 is missing"):
        mixture([parts[0], parts[2]])
    with pytest.raises(BadInput, match="part 1/3 of a corpus twice"):
        mixture([*parts, parts[0]])
    other = main(config(tmp_path, corpus, output_dir=tmp_path / "other", nfc=True))
    with pytest.raises(BadInput, match="encoded by another tokenizer"):
        mixture([*parts, other / "shards"])


def test_parts_are_files_where_there_are_enough_and_documents_where_not(tmp_path):
    for number in range(4):
        (tmp_path / f"{number}.txt").write_text(f"a{number}\n\nb{number}")
    assert list(read_text(tmp_path, part="2/4")) == ["a1", "b1"]
    assert list(read_text(tmp_path, part="1/3")) == ["a0", "b0", "a3", "b3"]
    assert list(read_text(tmp_path, part="8/8")) == ["b3"]
