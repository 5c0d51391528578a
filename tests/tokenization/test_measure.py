"""What is said about a tokenizer is so."""

import pytest

from lmkit.tokenization.chat import encode_text
from lmkit.tokenization.measure import HOSTILE, measure, round_trip, table
from lmkit.tokenization.train import train_tokenizer


def test_facts(tokenizer, documents):
    facts = measure(tokenizer, {"all": documents, "one": ["aaaa"]})
    num_tokens = sum(len(encode_text(tokenizer, document)) for document in documents)
    assert facts["bytes_per_token"]["all"] == sum(len(d.encode()) for d in documents) / num_tokens
    assert facts["num_documents"] == facts["num_exact"] == len(documents) + 1
    used = {i for document in [*documents, "aaaa"] for i in encode_text(tokenizer, document)}
    assert facts["vocabulary_used"] == len(used) / len(tokenizer)
    assert len(facts["longest_tokens"][0]) >= len(facts["longest_tokens"][9]) > 1
    assert facts["hostile_changed"] == []


def test_what_a_tokenizer_changes_is_named(documents):
    facts = measure(train_tokenizer(lambda: documents, vocab_size=384, nfc=True), {"x": ["e\u0301"]})
    assert facts["num_exact"] == 0
    assert facts["hostile_changed"] == ["combining marks"]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_texts_come_back_exactly(name, tokenizer):
    assert round_trip(tokenizer, HOSTILE[name])


def test_tokenizers_side_by_side(tokenizer, documents):
    letters = train_tokenizer(lambda: documents, vocab_size=384, kind="sentencepiece_bpe", allow_smaller_vocab=True)
    composing = train_tokenizer(lambda: documents, vocab_size=384, nfc=True)
    tokenizers = {"ours": tokenizer, "theirs": letters, "nfc": composing}
    texts = {"some.txt": lambda: iter(documents), "b": lambda: iter(["zzzz", "e\u0301"])}
    lines = table(tokenizers, texts).splitlines()
    assert lines[0].split() == ["bytes", "per", "token", "ours", "theirs", "nfc"]
    facts = measure(letters, {"some.txt": documents})
    assert lines[1].split()[0] == "some.txt"
    assert lines[1].split()[2] == f"{facts['bytes_per_token']['some.txt']:.3f}"
    cells = {line[:22].strip(): line[22:].split() for line in lines[1:8]}
    assert cells["b"][0] == "1.000"
    assert cells["documents"] == [str(len(documents) + 2)] * 3
    assert cells["documents changed"] == ["0", "0", "1"]
    assert cells["hostile texts changed"] == ["0", "0", "1"]
    assert len({len(line) for line in lines[:8]}) == 1
    assert lines[8].startswith("longest tokens of ours: '")
    assert lines[11:] == ["nfc changes texts with combining marks"]
