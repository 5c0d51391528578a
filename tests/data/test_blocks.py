from types import SimpleNamespace

import numpy as np
import pytest

from lmkit.data.blocks import Blocks
from lmkit.errors import BadInput


def shards(num_tokens):
    return SimpleNamespace(tokens=np.arange(num_tokens, dtype=np.uint16))


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
