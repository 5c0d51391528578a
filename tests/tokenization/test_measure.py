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
    lines = table({"ours": tokenizer, "theirs": letters}, {"some.txt": documents, "b": ["zzzz"]}).splitlines()
    assert lines[0].split() == ["bytes", "per", "token", "ours", "theirs"]
    facts = measure(letters, {"some.txt": documents})
    assert lines[1].split()[0::2] == ["some.txt", f"{facts['bytes_per_token']['some.txt']:.3f}"]
    assert lines[2].split()[1] == "1.000"
    assert len({len(line) for line in lines}) == 1
