"""A hundred malformed rows of twenty kinds: each is an error with file, line and reason, or a counted drop."""

import json
import re
import warnings

import pytest

from lmkit.data.sources import load_demonstrations, load_pairs
from lmkit.errors import BadInput

TEXT = {"prompt": "Hi", "completion": "Hello"}
PAIR = {"prompt": "Hi", "chosen": "Hello", "rejected": "Bye"}
USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
CHAT = {"messages": [USER, ANSWER]}
SHARE = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
ALPACA = {"instruction": "Say", "input": "Hi", "output": "Hello"}
HISTORY = {"instruction": "Say", "output": "Hello", "history": [["Hi", "Hello"]]}
QUESTION = {"question": "Hi", "answer": "Hello"}
WHOLE = {"chosen": [USER, ANSWER], "rejected": [USER, ANSWER | {"content": "Bye"}]}
OTHER = {"role": "user", "content": "Ho"}
# kind: (a good row, bad lines, what the error says). A bad line is bytes as they stand in the file, or a row.
KINDS = {
    "cut off": (TEXT, [b'{"prompt": "Hi", "comple', b'{"prompt": "Hi"', b"{"], "is not valid JSON"),
    "not JSON": (
        TEXT,
        [b"{'prompt': 'Hi'}", b"prompt,completion", b'{"prompt": "Hi",}', b"<html>"],
        "is not valid JSON",
    ),
    "two rows a line": (TEXT, [b'{"prompt": "a", "completion": "b"} {}', b'{"a": 1}{"b": 2}'], "is not valid JSON"),
    "no object": (TEXT, [b"[1]", b'"Hi"', b"3", b"null", b"true", b'["Hi", "Hello"]'], "wanted an object"),
    "not UTF-8": (TEXT, [b'{"prompt": "na\xefve", "completion": "b"}', b"\xff\xfe", b'{"\xc3": 1}'], "is not UTF-8"),
    "NUL byte": (TEXT, [b'{"prompt": "a\0", "completion": "b"}', b"\0"], "holds a NUL byte"),
    "not text": (TEXT, [TEXT | {"prompt": "\0"}, TEXT | {"completion": "\ud800"}, {"\udfff": 1}], "not text"),
    "no number": (
        TEXT,
        [b'{"prompt": "a", "completion": NaN}', b'{"prompt": Infinity, "completion": "b"}', b'{"a": -Infinity}'],
        "which is not JSON",
    ),
    "too large a number": (TEXT, [TEXT | {"n": 2**63}, TEXT | {"n": -(2**63) - 1}], "does not fit in 64 bits"),
    "a key twice": (TEXT, [b'{"prompt": "a", "prompt": "b", "completion": "c"}', b'{"a": {"b": 1, "b": 2}}'], "twice"),
    "too deep": (TEXT, [b'{"a": ' + b"[" * n + b"]" * n + b"}" for n in (64, 500, 5000)], "nested deeper than 64"),
    "other columns": (
        TEXT,
        [{"prompt": "a"}, {}, TEXT | {"extra": 1}, {"Prompt": "a", "completion": "b"}, {"text": "a"}],
        "has the columns",
    ),
    "other type": (
        TEXT,
        [{"prompt": v, "completion": "b"} for v in (1, 0.5, True, ["a"], {"a": 1})]
        + [{"prompt": "a", "completion": v} for v in (1, False, ["a"], {"role": "assistant", "content": "b"})],
        "Make them alike",
    ),
    "empty prompt": (TEXT, [TEXT | {"prompt": v} for v in ("", " ", "\n\t", "\u2003")], "has an empty prompt"),
    "no prompt": (TEXT, [TEXT | {"prompt": None}], "where a conversation was wanted"),
    "no completion": (TEXT, [TEXT | {"completion": None}], "has no answer"),
    "empty completion": (TEXT, [TEXT | {"completion": v} for v in ("", " ", "\n", "\r\n ")], "has an empty completion"),
    "a transcript without its end": (
        TEXT,
        [TEXT | {"prompt": f"\n\nHuman: Hi{v}"} for v in ("\n\nAssistant: Ho\n\nAssistant:",)],
        "has no user turn to answer",
    ),
    "no assistant turn": (
        CHAT,
        [{"messages": v} for v in ([USER], [USER, ANSWER, USER], [{"role": "system", "content": "a"}])],
        "ends without an assistant turn",
    ),
    "no user turn": (CHAT, [{"messages": v} for v in ([ANSWER], [ANSWER, ANSWER])], "no user turn to answer"),
    "no turns": (CHAT, [{"messages": v} for v in ([], None)], "where a conversation was wanted"),
    "unknown role": (
        CHAT,
        [{"messages": [USER | {"role": v}, ANSWER]} for v in ("narrator", "", "User", " user", "tool", None)],
        "has a turn of",
    ),
    "empty last turn": (
        CHAT,
        [{"messages": [USER, ANSWER | {"content": v}]} for v in ("", "  ", None)],
        "has an empty completion",
    ),
    "unlike turns": (
        CHAT,
        [{"messages": v} for v in (["Hi", "Hello"], [[USER]], [{"role": 1, "content": "a"}], [USER | {"content": 1}])],
        "nested value|has the turn",
    ),
    "no answers": (PAIR, [PAIR | {"chosen": None}, PAIR | {"rejected": None}], "has no answer"),
    "pair without prompt": (
        PAIR,
        [PAIR | {"prompt": v} for v in (None, "", " ")],
        "empty prompt|has no prompt",
    ),
    "conversations that part early": (
        WHOLE,
        [
            WHOLE | {"rejected": [OTHER, ANSWER]},
            WHOLE | {"rejected": [USER, ANSWER, USER, ANSWER]},
            WHOLE | {"chosen": [USER, ANSWER, OTHER, ANSWER]},
        ],
        "differ before their last turn",
    ),
    "answers by the user": (WHOLE, [{"chosen": [USER, OTHER], "rejected": [USER, USER]}], "one answer was wanted"),
    "nobody's turn": (
        SHARE,
        [{"conversations": [{"from": v, "value": "Hi"}]} for v in ("narrator", "function_call", "")],
        "has a turn of",
    ),
    "nothing to say": (ALPACA, [ALPACA | {"output": v} for v in ("", " \n", None)], "empty completion|no answer"),
    "nothing to do": (ALPACA, [{"instruction": v, "input": "", "output": "a"} for v in ("", None)], "empty prompt"),
    "no history": (HISTORY, [HISTORY | {"history": [v]} for v in (["a"], ["a", "b", "c"], [])], "in its history"),
    "no question": (QUESTION, [QUESTION | {"question": v} for v in ("", "  ")], "has an empty prompt"),
    "too long a line": (TEXT, [TEXT | {"completion": "x" * 400}], "the line is longer"),
}
CASES = [(kind, bad) for kind, (_, lines, _) in KINDS.items() for bad in lines]
NEVER_SKIPPED = {"unlike turns", "too long a line"}  # what comes after such a line cannot be trusted or told apart


@pytest.fixture(autouse=True)
def short_lines(monkeypatch):
    monkeypatch.setattr("lmkit.data.strict.MAX_LINE_BYTES", 12_000)


def file_with(path, kind, bad):
    good, _, _ = KINDS[kind]
    bad = bad if isinstance(bad, bytes) else json.dumps(bad).encode()
    if kind == "too long a line":
        bad = bad.replace(b"x", b"x" * 40)
    lines = [json.dumps(good).encode()] * 4
    lines.insert(2, bad)
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path, load_pairs if "chosen" in good else load_demonstrations


def test_a_hundred_of_twenty_kinds():
    assert len(KINDS) >= 20
    assert len(CASES) >= 100


@pytest.mark.parametrize(("kind", "bad"), CASES, ids=[f"{kind}-{n}" for n, (kind, _) in enumerate(CASES)])
def test_a_malformed_row(tmp_path, kind, bad):
    path, load = file_with(tmp_path / "a.jsonl", kind, bad)
    with pytest.raises(BadInput, match=KINDS[kind][2]) as error:
        load(path)
    assert re.search(rf"{re.escape(str(path))}:3\b", str(error.value)), error.value
    if kind in NEVER_SKIPPED:
        return
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        rows = load(path, on_bad="skip")
    assert len(rows) == 4
    assert any("left out 1 " in str(one.message) and f"{path}:3" in str(one.message) for one in told), told


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_but_malformed_rows_is_an_error(tmp_path, kind):
    path, load = file_with(tmp_path / "a.jsonl", kind, KINDS[kind][1][0])
    bad = path.read_bytes().split(b"\n")[2]
    path.write_bytes((bad + b"\n") * 3)
    for on_bad in ("error", "skip"):
        with pytest.raises(BadInput):
            load(path, on_bad=on_bad)
