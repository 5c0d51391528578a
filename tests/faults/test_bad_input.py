"""The corpus of bad inputs: each is refused with file and line, or read as stated; none is read as something else."""

import gzip
import json
import re
import time

import pytest

from lmkit.data.sources import load_demonstrations, load_pairs, load_rows, read_text
from lmkit.errors import BadInput

GOOD = '{"text": "one"}\n'

# (what, name of the file, its bytes, what is said)
ROWS = [
    ("invalid UTF-8 at the start", "a.jsonl", b"\xff\xfa\n", r"a.jsonl:1:1 .*UTF-8"),
    ("invalid UTF-8 after 12 MB", "a.jsonl", GOOD.encode() * 800_000 + b'{"text": "\xff"}\n', r"a.jsonl:800001:11 "),
    ("latin-1", "a.jsonl", '{"text": "é"}\n'.encode("latin-1"), r"a.jsonl:1:11 .*0xe9"),
    ("UTF-16", "a.jsonl", GOOD.encode("utf-16"), r"looks like UTF-16"),
    ("gzip under another name", "a.jsonl", gzip.compress(GOOD.encode()), r"looks like gzip"),
    ("text named .gz", "a.jsonl.gz", GOOD.encode(), r"does not hold such data"),
    ("cut gzip", "a.jsonl.gz", gzip.compress(GOOD.encode() * 999)[:-20], r"a.jsonl.gz:\d+ .*damaged"),
    ("malformed line", "a.jsonl", (GOOD + '{"text": }\n').encode(), r"a.jsonl:2:10 "),
    ("truncated last line", "a.jsonl", (GOOD + '{"text": "on').encode(), r"a.jsonl:2:\d+ "),
    ("key twice", "a.jsonl", b'{"text": "a", "text": "b"}\n', r"a.jsonl:1 .*'text' twice"),
    ("single quotes", "a.jsonl", b"{'text': 'a'}\n", r"a.jsonl:1:2 "),
    ("a list in each line", "a.jsonl", b'["a"]\n', r"a.jsonl:1 .*holds a list"),
    ("a string in each line", "a.jsonl", b'"a"\n', r"a.jsonl:1 .*holds a str"),
    ("raw NUL", "a.jsonl", b'{"text": "a\0b"}\n', r"a.jsonl:1 .*NUL"),
    ("escaped NUL", "a.jsonl", b'{"text": "a\\u0000b"}\n', r"a.jsonl:1 .*u0000"),
    ("half a surrogate pair", "a.jsonl", b'{"text": "\\ud800"}\n', r"a.jsonl:1 .*surrogate"),
    ("empty", "a.jsonl", b"", r"a.jsonl holds no rows"),
    ("white space only", "a.jsonl", b"\n \n\t\n", r"a.jsonl holds no rows"),
    ("a column missing in some rows", "a.jsonl", b'{"a": 1, "b": 2}\n{"a": 1}\n', r"a.jsonl:2 .*columns a"),
    ("an extra key", "a.jsonl", b'{"a": 1}\n{"a": 1, "b": 2}\n', r"a.jsonl:2 "),
    ("a late new column", "a.jsonl", b'{"a": 1}\n' * 50_000 + b'{"a": 1, "b": 2}\n', r"a.jsonl:50001 "),
    ("a late change of type", "a.jsonl", b'{"a": 1}\n' * 50_000 + b'{"a": "x"}\n', r"a.jsonl:50001 .*a str"),
    ("a list, then a string", "a.jsonl", b'{"a": ["x"]}\n{"a": "x"}\n', r"a.jsonl:2 .*holds a str"),
    ("NaN", "a.jsonl", b'{"a": NaN}\n', r"a.jsonl:1 .*NaN"),
    ("more than 64 bits", "a.jsonl", b'{"a": 123456789012345678901234567890}\n', r"a.jsonl:1 .*64 bits"),
    ("nested 2000 deep", "a.jsonl", b'{"a": ' + b"[" * 2000 + b"]" * 2000 + b"}\n", r"a.jsonl:1 .*nested deeper"),
    ("a line of 20 MB", "a.jsonl", b'{"text": "' + b"a" * (20 << 20) + b'"}\n', r"a.jsonl:1 .*longer than 16 MiB"),
    ("not parquet", "a.parquet", b"PAR1 and no more", r"not a readable parquet"),
    ("a header with a column twice", "a.csv", b"a,a\n1,2\n", r"a.csv:1 .*twice"),
    ("too few cells", "a.csv", b"a,b\n1\n", r"a.csv:2 "),
]


@pytest.mark.parametrize(("what", "name", "data", "said"), ROWS, ids=[row[0] for row in ROWS])
def test_rows(tmp_path, tally, what, name, data, said):
    """3B rows"""
    (tmp_path / name).write_bytes(data)
    with pytest.raises(BadInput) as caught:
        load_rows(str(tmp_path / name))
    assert tally.count(re.search(said, str(caught.value))), str(caught.value)
    assert "\n" not in str(caught.value)


TEXTS = [
    ("byte order mark", b"\xef\xbb\xbfa fox\n", ["a fox"]),
    ("CR and LF", b"a\r\nb\r\n\r\nc\r\n", ["a\nb", "c"]),
    ("CR alone", b"a\rb\r\rc\r", ["a\nb", "c"]),
    ("no end of line", b"a\n\nb", ["a", "b"]),
    ("NEL, LS and form feed", "a\x85b\u2028c\x0cd\n".encode(), ["a\x85b\u2028c\x0cd"]),
    ("blank lines", b"\n\n\na\n\n\n\nb\n", ["a", "b"]),
    (
        "private use, joiners, right to left",
        "\ue000 a\u200db \u0627\u0644 e\u0301\n".encode(),
        ["\ue000 a\u200db \u0627\u0644 e\u0301"],
    ),
    ("a character on the 10 MiB border", b"a" * ((10 << 20) - 1) + "é".encode(), ["a" * ((10 << 20) - 1) + "é"]),
    ("CR LF on the 10 MiB border", b"a" * ((10 << 20) - 1) + b"\r\nb", ["a" * ((10 << 20) - 1) + "\nb"]),
]


@pytest.mark.parametrize(("what", "data", "documents"), TEXTS, ids=[text[0] for text in TEXTS])
def test_texts(tmp_path, tally, what, data, documents):
    """3B texts that are read as stated"""
    (tmp_path / "a.txt").write_bytes(data)
    assert tally.count(list(read_text(str(tmp_path / "a.txt"))) == documents)


@pytest.mark.parametrize("data", [b"", b" \n\t\n"], ids=["empty", "white space"])
def test_a_corpus_without_text(tmp_path, tally, data):
    """3B a corpus without text"""
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(BadInput, match="holds no text") as caught:
        list(read_text(str(tmp_path / "a.txt")))
    assert tally.count("a.txt" in str(caught.value))


CHATS = [
    ("an unknown role", {"messages": [{"role": "wizard", "content": "a"}]}, "wizard"),
    ("no assistant", {"messages": [{"role": "user", "content": "a"}]}, "assistant"),
    ("two systems", {"messages": [{"role": "system", "content": "a"}] * 2 + [{"role": "user", "content": "b"},
     {"role": "assistant", "content": "c"}]}, "system"),
    ("an empty answer", {"prompt": "a", "completion": ""}, "empty"),
    ("an empty prompt", {"prompt": "", "completion": "b"}, "empty|blank"),
    ("a number for a text", {"prompt": 1, "completion": "b"}, "a.jsonl:1 .*wanted"),
    ("null", {"prompt": None, "completion": "b"}, "a.jsonl:1 .*wanted"),
]  # fmt: skip


@pytest.mark.parametrize(("what", "row", "said"), CHATS, ids=[chat[0] for chat in CHATS])
def test_demonstrations(tmp_path, tally, what, row, said):
    """3B demonstrations"""
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    from lmkit.data.encode import encode_demonstrations

    tokenizer = chat_tokenizer()
    with pytest.raises(BadInput) as caught:
        encode_demonstrations(load_demonstrations(str(tmp_path / "a.jsonl")), tokenizer, 64)
    assert tally.count(re.search(said, str(caught.value))), str(caught.value)


def chat_tokenizer():
    from lmkit.tokenization.train import train_tokenizer

    return train_tokenizer(lambda: ["a b c wizard system"], vocab_size=384, allow_smaller_vocab=True)


def test_pairs_that_say_nothing(tmp_path, tally):
    """3B pairs whose two answers are one"""
    from lmkit.data.encode import encode_pairs

    row = {"prompt": "a", "chosen": "b", "rejected": "b"}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(BadInput) as caught:
        encode_pairs(load_pairs(str(tmp_path / "a.jsonl")), chat_tokenizer(), 64)
    assert tally.count(re.search("usable|same|equal|alike", str(caught.value))), str(caught.value)


def test_too_long_rows_never_train_on_nothing(tmp_path, tally):
    """3B a prompt longer than the context: an error or a counted drop, never a batch without a label"""
    from lmkit.data.encode import encode_demonstrations

    rows = [{"prompt": "a " * 200, "completion": "b"}, {"prompt": "a", "completion": "b"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    loaded, tokenizer = load_demonstrations(str(tmp_path / "a.jsonl")), chat_tokenizer()
    with pytest.raises(BadInput, match="longer than max_length"):
        encode_demonstrations(loaded, tokenizer, 32)
    for how in ("drop", "cut"):
        kept, counts = encode_demonstrations(loaded, tokenizer, 32, how)
        labelled = all(any(label != -100 for label in row["labels"]) for row in kept)
        assert tally.count(labelled and counts["over_max_length"] == 1)


@pytest.mark.parametrize("size", [100, 0, 300, -128])
def test_vocabularies_that_cannot_be(tally, size):
    """3B a vocabulary too small for the bytes"""
    from lmkit.tokenization.vocabulary import check_vocab_size

    with pytest.raises(BadInput, match="Set it to"):
        check_vocab_size(size)
    tally.count(True)


@pytest.mark.parametrize("name", ["the", "a", " ", "", "<||>", "<|pad|>", "<|a b|>"])
def test_special_tokens_that_would_cut_texts(tally, name):
    """3B special tokens that are words, blank, or there already"""
    from lmkit.tokenization.vocabulary import check_special_tokens

    with pytest.raises(BadInput):
        check_special_tokens([name])
    tally.count(True)


def test_a_large_vocabulary_on_a_small_corpus(tally):
    """3B a vocabulary that the corpus does not support"""
    from lmkit.tokenization.train import train_tokenizer

    with pytest.raises(BadInput, match="supports a vocabulary of"):
        train_tokenizer(lambda: ["a fox"] * 9, vocab_size=50_048)
    made = train_tokenizer(lambda: ["a fox"] * 9, vocab_size=50_048, allow_smaller_vocab=True)
    assert tally.count(
        len(made) < 500 and made.decode(made("über\x07 \U0001f98a")["input_ids"]) == "über\x07 \U0001f98a"
    )


def test_a_long_run_without_a_break(tally):
    """3B a run of 160,000 characters without a space takes no more than a few times what text takes"""
    from lmkit.tokenization.byte_level import fast_is_exact, make_encoder

    tokenizer = chat_tokenizer()
    spec = tokenizer.backend_tokenizer.to_str()
    texts = {"words": "a fox and a hen " * 10_000, "a run": "abcdefgh" * 20_000}
    seconds = {}
    for name, text in texts.items():
        encode = make_encoder(spec, fast_is_exact(spec, [text]))
        started = time.perf_counter()
        assert tokenizer.decode(encode([text])[0]) == text
        seconds[name] = time.perf_counter() - started
    tally.figure = ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items())
    assert tally.count(seconds["a run"] < 8 * seconds["words"] + 0.5), seconds
