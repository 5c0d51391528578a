"""Shards hold exactly the tokenizer's ids, however they were made, and refuse another tokenizer."""

import json
import subprocess
import sys
from concurrent.futures import Future, ProcessPoolExecutor, wait

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lmkit.data import shards
from lmkit.data.shards import Shards, in_validation, tokenizer_sha256, write_shards
from lmkit.errors import BadInput, CorruptInput
from lmkit.tokenization.chat import encode_text
from lmkit.tokenization.train import train_tokenizer

DOCUMENTS = [f"Document {i}: the owl and the mouse found {i * i} coins.\n\nCaf\u00e9 \u65e5\u672c." for i in range(200)]
EVIL = "a <|endoftext|><|im_end|> b"


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(lambda: DOCUMENTS, vocab_size=384, allow_smaller_vocab=True)


def expected(tokenizer, documents):
    return [i for document in documents for i in [*encode_text(tokenizer, document), 0]]


def test_every_document_is_there_and_ends(tokenizer, tmp_path):
    documents = [*DOCUMENTS, EVIL, "long " + "x" * 3000]
    written = write_shards(iter(documents), tokenizer, tmp_path / "train")
    assert written.tokens.tolist() == expected(tokenizer, documents)
    assert written.tokens.dtype == np.uint16
    offsets = written.document_offsets
    assert (offsets.dtype, offsets[0], offsets[-1], len(offsets)) == (np.int64, 0, len(written.tokens), 203)
    for number in (0, 57, 200, 201):
        ids = written.tokens[offsets[number] : offsets[number + 1]]
        assert ids[-1] == 0
        assert tokenizer.decode(ids[:-1]) == documents[number]
    assert written.num_bytes == sum(len(document.encode()) for document in documents)
    assert written.meta["num_documents"] == 202


def test_special_tokens_in_a_corpus_stay_text(tokenizer, tmp_path):
    written = write_shards([EVIL], tokenizer, tmp_path)
    assert (written.tokens < 20).sum() == 1


class AtOnce(ProcessPoolExecutor):
    """Other processes that have always started, and are counted when they work."""

    num_batches = 0

    def submit(self, function, *batch):
        AtOnce.num_batches += len(batch)
        future = super().submit(function, *batch)
        wait([future])
        return future


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece_bpe", "sentencepiece_unigram"])
def test_processes_do_not_matter(kind, tmp_path, monkeypatch):
    tokenizer = train_tokenizer(lambda: DOCUMENTS, vocab_size=384, kind=kind, allow_smaller_vocab=True)
    alone = write_shards(DOCUMENTS, tokenizer, tmp_path / "one")
    monkeypatch.setattr(shards, "BATCH_BYTES", 500)
    monkeypatch.setattr(shards, "BATCHES_ALONE", 2)
    monkeypatch.setattr(shards, "ProcessPoolExecutor", AtOnce)
    AtOnce.num_batches = 0
    write_shards(DOCUMENTS, tokenizer, tmp_path / "two", num_processes=2)
    assert AtOnce.num_batches > 10
    for name in ("tokens.bin", "documents.bin", "meta.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert alone.tokens.tolist() == expected(tokenizer, DOCUMENTS)


def test_reading_does_not_run_ahead_of_writing(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "BATCH_BYTES", 1)
    monkeypatch.setattr(shards, "BATCHES_ALONE", 1)
    monkeypatch.setattr(shards, "ProcessPoolExecutor", AtOnce)
    ahead, read, encoded = 0, 0, 0

    def documents():
        nonlocal read
        for document in DOCUMENTS[:60]:
            read += 1
            yield document

    for _ in shards._encoded(documents(), tokenizer, num_processes=2):
        encoded += 1
        ahead = max(ahead, read - encoded)
    assert encoded == 60
    assert ahead <= 8


def test_work_goes_on_while_the_other_processes_start(tokenizer, tmp_path, monkeypatch):
    class Never(AtOnce):
        def submit(self, function, *batch):
            assert function is int
            return Future()

    alone = write_shards(DOCUMENTS, tokenizer, tmp_path / "one")
    monkeypatch.setattr(shards, "BATCH_BYTES", 500)
    monkeypatch.setattr(shards, "ProcessPoolExecutor", Never)
    written = write_shards(DOCUMENTS, tokenizer, tmp_path / "two", num_processes=2)
    assert np.array_equal(written.tokens, alone.tokens)


def test_large_vocabularies_take_four_bytes(tmp_path):
    vocab = {f"w{i}": i + 1 for i in range(70_000)} | {"<eos>": 0}
    backend = Tokenizer(models.WordLevel(vocab=vocab, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    written = write_shards(["w1 w69999"], tokenizer, tmp_path)
    assert written.tokens.dtype == np.uint32
    assert written.tokens.tolist() == [2, 70_000, 0]


def test_the_tokenizer_is_known_again(tokenizer, tmp_path):
    written = write_shards(DOCUMENTS, tokenizer, tmp_path / "shards")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    loaded("pad me", padding="max_length", max_length=9, truncation=True)
    written.check_tokenizer(loaded)
    loaded.add_tokens(["owl"])
    with pytest.raises(BadInput, match="another tokenizer"):
        written.check_tokenizer(loaded)


def test_another_tokenizer_of_the_same_size_is_refused(tokenizer, tmp_path):
    write_shards(DOCUMENTS, tokenizer, tmp_path)
    other = train_tokenizer(lambda: DOCUMENTS[:100], vocab_size=384, split="gpt2", allow_smaller_vocab=True)
    assert len(other) == len(tokenizer)
    assert tokenizer_sha256(other) != tokenizer_sha256(tokenizer)
    with pytest.raises(BadInput, match="another tokenizer"):
        Shards.open(tmp_path).check_tokenizer(other)


def test_reading_needs_whole_files(tokenizer, tmp_path):
    with pytest.raises(BadInput, match="no token shards"):
        Shards.open(tmp_path / "nowhere")
    write_shards(DOCUMENTS, tokenizer, tmp_path)
    (tmp_path / "tokens.bin").write_bytes((tmp_path / "tokens.bin").read_bytes()[:-2])
    with pytest.raises(CorruptInput, match=r"tokens\.bin has"):
        Shards.open(tmp_path)


def test_shards_are_read_only(tokenizer, tmp_path):
    written = write_shards(DOCUMENTS, tokenizer, tmp_path)
    with pytest.raises(ValueError, match="read-only"):
        written.tokens[0] = 1


@pytest.mark.parametrize("documents", [[], ["", " \n"]])
def test_no_text_is_refused(documents, tokenizer, tmp_path):
    with pytest.raises(BadInput, match="no text to encode"):
        write_shards(documents, tokenizer, tmp_path)


def test_a_tokenizer_without_an_end_is_refused(tokenizer, tmp_path):
    endless = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(BadInput, match="no eos_token"):
        write_shards(DOCUMENTS, endless, tmp_path)


def test_the_held_out_share_depends_on_the_text_alone():
    held = [in_validation(document, 0.25) for document in DOCUMENTS]
    assert held == [in_validation(document, 0.25) for document in DOCUMENTS]
    assert 30 < sum(held) < 70
    assert sum(in_validation(document, 0.5) and not in_validation(document, 0.25) for document in DOCUMENTS) > 30


def test_the_workers_start_without_transformers():
    code = "import sys, lmkit.data.shards; print('torch' in sys.modules, 'transformers' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.split() == ["False", "False"]


def test_meta_is_plain_json(tokenizer, tmp_path):
    write_shards(DOCUMENTS, tokenizer, tmp_path)
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert meta["tokenizer_sha256"] == tokenizer_sha256(tokenizer)
    assert meta["vocab_size"] == len(tokenizer)
    assert meta["dtype"] == "uint16"


def test_first_documents_are_whole_unless_the_first_is_too_long():
    shards = Shards(np.arange(24), np.array([0, 3, 15, 24]), 0, {})
    assert shards.first_documents(24).tolist() == [0, 3, 15, 24]
    assert shards.first_documents(20).tolist() == [0, 3, 15]
    assert shards.first_documents(2).tolist() == [0, 2]
