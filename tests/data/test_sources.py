"""Files are read exactly or refused with file, line and remedy."""

import codecs
import gzip
import json
import re
import tracemalloc
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset

from lmkit.artifact import seal
from lmkit.data import sources, strict
from lmkit.data.sources import load_demonstrations, load_pairs, load_prompts, load_rows, read_text
from lmkit.errors import BadInput, CorruptInput

REAL = Path(__file__).parents[3] / "shared" / "data"
realdata = pytest.mark.realdata
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="../shared/data is absent")


@pytest.fixture
def write(tmp_path):
    def write(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


# ------------------------------------------------------------------------------------------------------ text


@pytest.mark.parametrize(
    ("separator", "documents"),
    [
        ("\n\n", ["one\ntwo", "three", "four"]),
        ("\n\n\n", ["one\ntwo\n\nthree", "four"]),
        ("\n", ["one", "two", "three", "four"]),
        (None, ["one\ntwo\n\nthree\n\n\nfour"]),
    ],
)
def test_documents_stand_between_separators(write, separator, documents):
    path = write("a.txt", "one\ntwo\n\nthree\n\n\nfour\n")
    assert list(read_text(path, document_separator=separator)) == documents


def test_separator_of_text_is_a_line_of_its_own(write):
    path = write("a.txt", "one\n\ntwo <|endoftext|> inside\n<|endoftext|>\nthree\n<|endoftext|>\n")
    assert list(read_text(path, document_separator="<|endoftext|>")) == ["one\n\ntwo <|endoftext|> inside", "three"]


def test_separator_must_say_something(write):
    with pytest.raises(BadInput, match="wanted newlines"):
        read_text(write("a.txt", "x"), document_separator=" ")


@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
def test_line_ends_and_byte_order_mark(write, ends):
    raw = codecs.BOM_UTF8 + ends.join(["one", "two", "", "three"]).encode()
    assert list(read_text(write("a.txt", raw))) == ["one\ntwo", "three"]


def test_unusual_characters_come_back_exactly(write):
    text = "a\u0085b\u2028c\x0cd \ufeff e\u200d \U0001f600 \u05d0\ue000"
    assert list(read_text(write("a.txt", text))) == [text]


def test_files_folders_patterns_in_order(write, tmp_path):
    write("b.txt", "bee")
    write("a.jsonl", '{"text": "ay"}\n{"text": "  "}\n{"text": "ei\\r\\nei"}\n')
    write("deep/c.txt.gz", gzip.compress(b"sea"))
    write(".hidden/d.txt", "no")
    write("notes.md", "no")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["par", "quet"]}), tmp_path / "d.parquet")
    assert list(read_text(tmp_path)) == ["ay", "ei\nei", "bee", "par", "quet", "sea"]
    assert list(read_text([tmp_path / "deep", str(tmp_path / "*.txt")])) == ["sea", "bee"]
    assert list(read_text(tmp_path / "notes.md")) == ["no"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "", r"a\.txt holds no text"),
        ("a.txt", " \n\n \n", "holds no text"),
        ("a.jsonl", "", "holds no text"),
        ("a.txt", b"fine\nna\xefve\n", r"a\.txt:2:3  the byte 0xef is not UTF-8.*iconv"),
        ("a.txt", (b"x" * 999 + b"\n\n") * 13_000 + b"\xff", r"a\.txt:26001:1  the byte 0xff"),
        ("a.txt", b"fine\n\0\n", r"a\.txt:2  holds a NUL"),
        ("a.txt", "text".encode("utf-16"), "looks like UTF-16 text"),
        ("a.jsonl", gzip.compress(b"{}", mtime=0), "looks like gzip data: name it .gz"),
        ("a.txt", b"PAR1....", "looks like a parquet file"),
        ("a.txt.gz", "plain text", "named .gz but does not hold such data"),
        ("a.txt.gz", gzip.compress(b"text " * 1000, mtime=0)[:-20], r"a\.txt\.gz:1  the compressed data is damaged"),
        ("a.parquet", "PAR1 but no more", "not a readable parquet file"),
        ("a.jsonl", '{"text": "a"}\n{"texts": "b"}\n', r"a\.jsonl:2  has no text in a column `text`.*texts"),
        ("a.jsonl", '{"text": "a"}\n{"text": null}\n', r"a\.jsonl:2  has no text"),
    ],
)
def test_bad_text_is_refused(write, name, content, message):
    with pytest.raises(BadInput, match=message):
        list(read_text(write(name, content)))


@pytest.mark.parametrize("source", ["absent.txt", "nothing*.txt", "org/name", ".", []])
def test_missing_sources_are_refused_before_reading(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: pytest.fail("asked the Hub"))
    for read in (read_text, load_rows):
        with pytest.raises(BadInput, match=r"does not exist|matches no file|has no file|is empty") as error:
            read(source)
    assert ("write hub:org/name" in str(error.value)) == (source == "org/name")


def test_skip_leaves_out_bad_lines_and_says_how_many(write):
    path = write("a.txt", b"one\n\xff\ntwo\n\0\n")
    with pytest.warns(UserWarning, match=r"left out 2 bad lines, the first: .*a\.txt:2"):
        assert list(read_text(path, on_bad="skip")) == ["one\ntwo"]
    path = write("a.jsonl", '{"text": "one"}\n{"text"\n{"text": 2}\n{"text": "two"}\n')
    with pytest.warns(UserWarning, match="left out 2 bad lines"):
        assert list(read_text(path, on_bad="skip")) == ["one", "two"]
    with pytest.raises(BadInput, match="on_bad"):
        read_text(path, on_bad="ignore")


def test_limits_on_lines_and_documents(write, monkeypatch):
    monkeypatch.setattr(strict, "MAX_LINE_BYTES", 100)
    assert list(read_text(write("a.txt", "x" * 99 + "\n"))) == ["x" * 99]
    with pytest.raises(BadInput, match=r"a\.txt:2  the line is longer"):
        list(read_text(write("a.txt", "ok\n" + "x" * 101)))
    monkeypatch.setattr(sources, "MAX_DOCUMENT_CHARS", 100)
    path = write("a.txt", ("x" * 50 + "\n\n") * 3)
    assert len(list(read_text(path))) == 3
    with pytest.raises(BadInput, match=r"a\.txt:3  the document is longer.*document_separator"):
        list(read_text(path, document_separator=None))


def test_memory_does_not_grow_with_the_file(write):
    path = write("a.txt", ("x" * 1000 + "\n\n") * 20_000)
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_text(path)) == 20_000
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def packed(content, form):
    return gzip.compress(content) if form == "gz" else pyarrow.compress(content, codec="zstd", asbytes=True)


@pytest.mark.parametrize("form", ["gz", "zst"])
def test_packed_files_are_read_as_they_were(write, tmp_path, form):
    lines = b'{"text": "four"}\n{"text": "five"}\n'
    pyarrow.parquet.write_table(pyarrow.table({"text": ["six", "seven"]}), tmp_path / "plain")
    write(f"a.txt.{form}", packed(b"one\n\n", form) + packed(b"two\n\nthree", form))
    write(f"b.jsonl.{form}", packed(lines, form))
    write(f"c.parquet.{form}", packed((tmp_path / "plain").read_bytes(), form))
    assert list(read_text(tmp_path)) == ["one", "two", "three", "four", "five", "six", "seven"]


@pytest.mark.parametrize("form", ["gz", "zst"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_damaged_packed_files_are_refused(write, form, name):
    whole = packed("".join(f'{{"text": "{i * i}"}}\n' for i in range(20_000)).encode(), form)
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes(255 - byte for byte in whole[middle : middle + 20]) + whole[middle + 20 :]
    for damaged in (whole[:-200], flipped):
        with pytest.raises(BadInput, match=r"data is damaged|not a readable parquet|not UTF-8|not valid JSON"):
            list(read_text(write(f"{name}.{form}", damaged)))


# ------------------------------------------------------------------------------------------------------ rows

ROWS = [{"a": "x", "n": 1}, {"a": "y, z", "n": 2}]


def test_every_kind_of_file_gives_the_same_rows(write, tmp_path):
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    Dataset.from_list(ROWS).to_parquet(tmp_path / "d.parquet")
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    for path in (
        write("a.jsonl", lines),
        write("a.json", json.dumps(ROWS, indent=1)),
        write("lines.json", lines),
        write("a.jsonl.gz", gzip.compress(lines.encode())),
        tmp_path / "d.parquet",
        tmp_path / "saved",
    ):
        assert load_rows(path).to_list() == ROWS, path
    assert load_rows(write("a.csv", 'a,n\nx,1\n"y, z",2\n')).to_list() == [
        {"a": "x", "n": "1"},
        {"a": "y, z", "n": "2"},
    ]
    assert load_rows(str(tmp_path / "a.json*")).to_list() == ROWS + ROWS + ROWS


def test_null_and_whole_numbers_among_fractions_are_fine(write):
    rows = load_rows(write("a.jsonl", '{"a": null, "n": 1}\n{"a": "x", "n": 0.5}\n')).to_list()
    assert rows == [{"a": None, "n": 1.0}, {"a": "x", "n": 0.5}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a": 1}\n{"a": \n', r"a\.jsonl:2:\d+  is not valid JSON"),
        ("{'a': 1}\n", r"a\.jsonl:1:2  is not valid JSON"),
        ('{"a": 1}\n[1]\n', r"a\.jsonl:2  holds a list; wanted an object"),
        ('"text"\n', r"a\.jsonl:1  holds a str; wanted an object"),
        ('{"a": 1}\n{"a": 1, "a": 2}\n', r"a\.jsonl:2  gives the key 'a' twice"),
        ('{"a": {"b": 1, "b": 1}}\n', "gives the key 'b' twice"),
        ('{"a": 1}\n{"a": NaN}\n', r"a\.jsonl:2  holds NaN"),
        ('{"a": -Infinity}\n', "holds -Infinity"),
        ('{"a": 123456789012345678901}\n', "does not fit in 64 bits"),
        ('{"a": ' + "[" * 2000 + "]" * 2000 + "}\n", "nested deeper than 64"),
        ('{"a": ' + "[" * 64 + "]" * 64 + "}\n", "nested deeper than 64"),
        ('{"a": "\\ud800"}\n', r"a\.jsonl:1  holds .* half a surrogate"),
        ('{"a": "\\u0000"}\n', "not text"),
        (b'{"a": "\0"}\n', r"a\.jsonl:1  holds a NUL"),
        ('{"a": 1}\n\n{"b": 1}\n', r"a\.jsonl:3  has the columns b, the rows before it a"),
        ('{"a": 1}\n{"a": 1, "b": 2}\n', r"a\.jsonl:2  has the columns a, b"),
        ('{"a": "x"}\n{"a": ["x"]}\n', r"a\.jsonl:2  column a holds a list, in the rows before a str"),
        ('{"a": {"b": 1}}\n{"a": {"b": "x"}}\n', r"a\.jsonl:2  differs .* types of a nested value"),
        ('{"a": [1]}\n' * 9 + '{"a": ["x"]}\n' + '{"a": [1]}\n' * 9, r"a\.jsonl:10  differs"),
        ("\n \n", "holds no rows"),
    ],
)
def test_bad_rows_are_refused(write, content, message):
    with pytest.raises(BadInput, match=message):
        load_rows(write("a.jsonl", content))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '[\n {"a": 1},\n {"a" 2}\n]', r"a\.json:3:\d+  is not valid JSON"),
        ("a.json", '[{"a": 1}, 2]', r"a\.json row 2  holds a int"),
        ("a.json", "[]", "holds no rows"),
        ("a.csv", "a,b\n1,2\n3\n", r"a\.csv:3  has 1 cells where the header has 2"),
        ("a.csv", "a,a\n1,2\n", "names a column twice"),
        ("a.csv", 'a\n"x" y\n', r"a\.csv:2  is not valid CSV"),
        ("a.csv", "a,b\n", "holds no rows"),
        ("a.docx", "x", r"not a file of rows; wanted \.jsonl"),
    ],
)
def test_bad_files_of_rows_are_refused(write, name, content, message):
    with pytest.raises(BadInput, match=message):
        load_rows(write(name, content))


def test_skip_leaves_out_bad_rows_and_says_how_many(write):
    for path, place in (
        (write("a.jsonl", '{"a": 1}\n{"b": 1}\n{"a": "x"}\n{\n{"a": 2}\n{"a": 3}\n{"a": 4}\n'), r"a\.jsonl:2"),
        (write("a.json", '[{"a": 1}, 2, {"a": 2}, {"a": [1]}, {"b": 1}, {"a": 3}, {"a": 4}]'), "a.json row 2"),
    ):
        with pytest.raises(BadInput, match=place):
            load_rows(path)
        with pytest.warns(UserWarning, match=rf"left out 3 bad rows beside 4 good ones, the first: .*{place}"):
            assert load_rows(path, "skip")["a"][:] == [1, 2, 3, 4]
    with pytest.warns(UserWarning, match=r"left out 1 bad rows .*a\.csv:3  has 1 cells"):
        assert load_rows(write("a.csv", "a,b\n1,2\n3\n4,5\n"), "skip").to_list() == [
            {"a": "1", "b": "2"},
            {"a": "4", "b": "5"},
        ]
    with pytest.raises(BadInput, match=r"left out 2 bad rows beside 1 good .* More bad than good"):
        load_rows(write("b.jsonl", '{"a": 1}\n{\n{\n'), "skip")


def test_a_row_without_a_target_is_found_in_its_file(write, tmp_path):
    good, bad = {"prompt": "Hi", "completion": "Hello"}, {"prompt": "Hi", "completion": ""}
    write("d/1.jsonl", json.dumps(good) + "\n\n" + json.dumps(good) + "\n")
    write("d/2.json", json.dumps([good, bad], indent=1))
    with pytest.raises(BadInput, match=r"1 of 4 rows cannot be used; \S+2\.json row 2  has an empty completion"):
        load_demonstrations(tmp_path / "d")
    Dataset.from_list([good, bad]).to_parquet(tmp_path / "d.parquet")
    with pytest.raises(BadInput, match=r"d\.parquet row 2  has an empty"):
        load_demonstrations(tmp_path / "d.parquet")
    Dataset.from_list([good, bad]).save_to_disk(tmp_path / "saved")
    with pytest.raises(BadInput, match=r"saved: 1 of 2 rows cannot be used; row 2  has"):
        load_demonstrations(tmp_path / "saved")
    with pytest.raises(BadInput, match="on_bad is 'drop'"):
        load_demonstrations(tmp_path / "d", on_bad="drop")


def test_parquet_files_must_agree(tmp_path):
    Dataset.from_dict({"a": [1]}).to_parquet(tmp_path / "1.parquet")
    Dataset.from_dict({"b": [1]}).to_parquet(tmp_path / "2.parquet")
    with pytest.raises(BadInput, match=r"2\.parquet has the columns b, .*1\.parquet a"):
        load_rows(tmp_path)


def test_saved_folders_are_verified_and_splits_named(tmp_path):
    with seal(tmp_path / "data") as folder:
        datasets.DatasetDict(train=Dataset.from_list(ROWS), test=Dataset.from_list(ROWS[:1])).save_to_disk(folder)
    with pytest.raises(BadInput, match="holds the splits test, train"):
        load_rows(tmp_path / "data")
    assert load_rows(tmp_path / "data/train").to_list() == ROWS
    arrow = next((tmp_path / "data/train").glob("*.arrow"))
    arrow.write_bytes(arrow.read_bytes()[:-1] + b"x")
    with pytest.raises(CorruptInput, match="damaged"):
        load_rows(tmp_path / "data/train")


def test_only_hub_names_ask_the_hub(monkeypatch):
    asked = []

    def load_dataset(name, split, revision, streaming):
        asked.append((name, split, revision))
        return Dataset.from_dict({"text": ["one", " ", "two"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(load_rows("hub:org/name")) == 3
    load_rows("hub:name@0123abc:test")
    assert list(read_text("hub:org/name:validation")) == ["one", "two"]
    assert asked == [("org/name", "train", None), ("name", "test", "0123abc"), ("org/name", "validation", None)]
    for bad in ("hub:", "hub:../secret", "hub:a/b/c"):
        with pytest.raises(BadInput, match="not a hub name"):
            load_rows(bad)


def test_a_stream_is_read_as_it_comes_and_never_held(monkeypatch):
    num_read = 0

    def rows(column):
        nonlocal num_read
        for _ in range(2_000):
            num_read += 1
            yield {column: "x" * 10_000}

    def load_dataset(name, split, revision, streaming):
        assert streaming
        return datasets.IterableDataset.from_generator(rows, gen_kwargs={"column": name})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    documents = read_text("hub:text", streaming=True)
    next(documents)
    assert num_read < 10
    tracemalloc.start()
    try:
        assert sum(1 for _ in documents) == 1_999
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()
    with pytest.raises(BadInput, match="has the columns texts; wanted documents in `text`"):
        read_text("hub:texts", streaming=True)


def test_the_first_rows_of_the_hub_are_streamed(monkeypatch):
    taken = []

    def load_dataset(name, split, revision, streaming):
        def rows():
            for number in range(1000):
                taken.append(number)
                yield {"prompt": f"{split} {number}", "completion": "a"}

        assert streaming
        return datasets.IterableDataset.from_generator(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = load_demonstrations("hub:org/name@0123abc:test[:3]")
    assert rows["prompt"][:] == ["test 0", "test 1", "test 2"]
    assert len(taken) < 10
    with pytest.raises(BadInput, match="holds no rows"):
        load_rows("hub:org/name:test[:0]")
    with pytest.raises(BadInput, match=r"split\[:1000\] for its first rows"):
        load_rows("hub:org/name:test[5:]")


def test_hub_failure_is_bad_input(monkeypatch):
    def load_dataset(name, split, revision, streaming):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(BadInput, match=r"hub:org/name could not be loaded.*no route"):
        load_rows("hub:org/name")


# ------------------------------------------------------------------------------------------------------ real files


@realdata
@needs_real
def test_real_rows():
    alpaca = load_demonstrations(REAL / "instruct/alpaca_en_demo.json")
    assert (len(alpaca), alpaca.column_names) == (999, ["prompt", "completion"])
    math = load_demonstrations(REAL / "math/gsm8k_train.jsonl")
    assert len(math) == 7473
    assert all("####" in answer for answer in math["completion"])
    assert load_prompts(REAL / "math/gsm8k_train.jsonl").column_names == ["prompt", "answer"]
    pairs = load_pairs(REAL / "preferences/dpo_en_demo.json")
    assert (len(pairs), pairs.column_names) == (300, ["prompt", "chosen", "rejected"])
    assert {turns[-1]["role"] for turns in pairs["prompt"]} == {"user"}
    assert {turns[0]["role"] for turns in pairs["prompt"]} == {"user", "system"}


@realdata
@needs_real
def test_real_text():
    chapters = list(read_text(REAL / "text/books", document_separator="\n\n\n"))
    assert len(chapters) == 868
    whole = "".join(read_text(REAL / "text/tinyshakespeare.txt", document_separator=None))
    assert whole == (REAL / "text/tinyshakespeare.txt").read_text().rstrip("\n")
    reviews = list(read_text(REAL / "sentiment/rt-polarity.neg", document_separator="\n"))
    assert len(reviews) == 5331
    assert any("\x85" in review for review in reviews)
    assert not any(re.search(r"[\r\n]", review) for review in reviews)
