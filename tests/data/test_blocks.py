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
    blocks = Blocks(documents, context_length=4, packing="pad")
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
