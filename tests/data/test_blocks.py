from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lmkit.data.blocks import Blocks
from lmkit.errors import BadInput


def shards(num_tokens):
    return SimpleNamespace(tokens=np.arange(num_tokens, dtype=np.uint16), document_offsets=None)


def test_padded_blocks_are_documents_behind_an_end_of_text_token():
    # Three documents, ended by 0, of 3, 6 and 2 tokens.
    tokens = np.array([5, 6, 0, 11, 12, 13, 14, 15, 0, 9, 0], dtype=np.uint16)
    documents = SimpleNamespace(tokens=tokens, document_offsets=np.array([0, 3, 9, 11]))
    blocks = Blocks(documents, context_length=8, packing="pad")
    blocks.context_length = 4  # a document is cut to it
    assert len(blocks) == 3
    batch = blocks.fetch(np.array([2, 0, 1]))
    assert batch["labels"].tolist() == [[9, 0, -100, -100], [5, 6, 0, -100], [11, 12, 13, 14]]
    inputs, counts = batch["input_ids"], batch["labels"] >= 0
    assert inputs[:, 0].tolist() == [0, 0, 0]
    assert torch.equal(inputs[:, 1:][counts[:, :-1]], batch["labels"][:, :-1][counts[:, :-1]])


def test_blocks_cover_the_stream_and_labels_are_the_next_tokens():
    blocks = Blocks(shards(31), context_length=10)
    assert len(blocks) == 3
    batch = blocks.fetch(np.array([2, 0, 1]))
    assert batch["input_ids"][[1, 2, 0]].flatten().tolist() == list(range(30))
    assert (batch["labels"] == batch["input_ids"] + 1).all()


def test_the_last_block_has_a_next_token():
    assert len(Blocks(shards(30), context_length=10)) == 2


def test_a_corpus_shorter_than_one_block_is_refused():
    with pytest.raises(BadInput, match=r"10 tokens, less than one block of 10 .*lower model.context_length"):
        Blocks(shards(10), context_length=10)


def documents(lengths, seed=0):
    """Shards of documents of these lengths, each ended by 0; every other token is its place in the corpus."""
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = np.arange(offsets[-1], dtype=np.uint32)
    tokens[offsets[1:] - 1] = 0
    return SimpleNamespace(tokens=tokens, document_offsets=offsets)


def test_best_fit_blocks_hold_every_token_once_behind_the_token_before_it():
    shards = documents([3, 9, 2, 2, 5, 4, 1])
    blocks = Blocks(shards, context_length=4, packing="bos_bestfit", document_mask=True)
    batch = blocks.fetch(np.arange(len(blocks)))
    inputs, labels, ids = batch["input_ids"], batch["labels"], batch["document_ids"]
    counted = labels >= 0
    assert sorted(labels[counted].tolist()) == sorted(shards.tokens.tolist())
    for row, label, inside in zip(inputs, labels, counted):
        for before, token in zip(row[inside].tolist(), label[inside].tolist()):
            assert before == (shards.tokens[token - 1] if token else before)
    # A document that fits a block is never cut; parts of one share an id, and the padding has one of its own.
    assert ((ids >= 0) == counted).all()
    whole = [label[ids[row] == i].tolist() for row, label in enumerate(labels) for i in range(int(ids[row].max()) + 1)]
    for begin, end in zip(shards.document_offsets, shards.document_offsets[1:]):
        if end - begin <= 4:
            assert shards.tokens[begin:end].tolist() in whole


def test_the_mask_of_a_stream_starts_a_document_at_each_end_of_text():
    shards = documents([3, 2, 4])
    batch = Blocks(shards, context_length=8, document_mask=True).fetch(np.array([0]))
    assert batch["input_ids"].tolist() == [[0, 1, 0, 3, 0, 5, 6, 7]]
    assert batch["document_ids"].tolist() == [[1, 1, 2, 2, 3, 3, 3, 3]]
    assert "document_ids" not in Blocks(shards, 8).fetch(np.array([0]))
    assert "document_ids" not in Blocks(shards, 8, "pad", document_mask=True).fetch(np.array([0]))


def test_what_padded_blocks_cut_off_is_counted_and_refused_above_one_percent():
    lengths = [60, 11, 100, 29]
    assert [Blocks(documents(lengths), n, "pad").num_lost for n in (100, 99, 98)] == [0, 1, 2]
    wanted = (
        r"nothing after them: 1\.5% of the 200 tokens .*more than 1%\. Use --packing bos_bestfit \(or stream\), or a"
    )
    with pytest.raises(BadInput, match=wanted):
        Blocks(documents(lengths), 97, "pad")
    assert [Blocks(documents(lengths), 20, packing).num_lost for packing in ("stream", "bos_bestfit")] == [0, 0]
