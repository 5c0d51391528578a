"""A mixture has its shares, its epochs and its order from the position alone."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lmkit.data.blocks import Blocks
from lmkit.data.mixture import CYCLE, Mixture, apportion
from lmkit.data.order import batch_positions
from lmkit.errors import BadInput


def corpus(num_blocks, first=0, packing="stream", context_length=4):
    tokens = np.arange(first, first + num_blocks * 4 + 1, dtype=np.uint32)
    return Blocks(
        SimpleNamespace(tokens=tokens, document_offsets=np.array([0, 3, len(tokens)])), context_length, packing
    )


def test_every_cycle_has_exactly_the_shares():
    mixture = Mixture([corpus(10), corpus(1000), corpus(3)], [1, 2, 1], seed=0)
    corpora, _ = mixture.draw(np.arange(3 * CYCLE))
    for cycle in corpora.reshape(3, CYCLE):
        assert np.bincount(cycle).tolist() == [CYCLE // 4, CYCLE // 2, CYCLE // 4]
    early = np.bincount(corpora[:200]) / 200
    assert abs(early - [0.25, 0.5, 0.25]).max() < 0.1


def test_each_corpus_goes_through_its_own_epochs():
    mixture = Mixture([corpus(10), corpus(300)], [], seed=0)
    corpora, blocks = mixture.draw(np.arange(4 * CYCLE))
    for k, size in ((0, 10), (1, 300)):
        read = blocks[corpora == k]
        # Within a cycle the turns of a corpus are dealt in shuffled order; over whole cycles all turns are taken.
        counts = np.bincount(read, minlength=size)
        assert counts.max() - counts.min() <= 1


def test_without_weights_every_block_counts_alike():
    mixture = Mixture([corpus(100), corpus(300)], [], seed=0)
    assert mixture.slots.tolist() == [CYCLE // 4, 3 * CYCLE // 4]


@pytest.mark.parametrize(("accumulation", "world"), [(4, 1), (1, 4), (2, 2)])
def test_a_step_reads_the_same_samples_however_it_is_split(accumulation, world):
    mixture = Mixture([corpus(50), corpus(70, first=1000)], [1, 3], seed=7)
    whole = mixture.fetch(np.arange(16, 32))["input_ids"]
    parts = [
        mixture.fetch(batch_positions(1, m, r, size=16 // 4, accumulation=accumulation, world=world))["input_ids"]
        for m in range(accumulation)
        for r in range(world)
    ]
    assert torch.equal(torch.cat(parts), whole)


def test_rows_come_in_the_order_of_their_positions_and_narrow_ones_are_padded():
    mixture = Mixture([corpus(8, packing="pad", context_length=30), corpus(50, first=500)], [1, 1], seed=0)
    mixture.corpora[0].context_length = 16
    positions = np.arange(12)
    corpora, blocks = mixture.draw(positions)
    batch = mixture.fetch(positions)
    assert batch["labels"].shape == batch["input_ids"].shape == (12, 16)
    for row, (k, block) in enumerate(zip(corpora, blocks)):
        alone = mixture.corpora[k].fetch(np.array([block]))["labels"][0]
        assert batch["labels"][row][batch["labels"][row] >= 0].tolist() == alone[alone >= 0].tolist()


def test_seats_are_all_given():
    assert apportion(np.array([1, 1, 1.0]), 10).tolist() == [4, 3, 3]


def test_its_size_is_what_is_taught_and_what_is_not():
    assert Mixture([corpus(100), corpus(300)], [], seed=0).size() == "1,602 tokens in 400 blocks of 4"
    parts = [corpus(500, packing="pad", context_length=length) for length in (1998, 1990)]
    assert Mixture(parts[:1], [], seed=0).size() == "2,001 tokens in 2 blocks of 1998"
    said = Mixture(parts[1:], [], seed=0).size()
    assert said == "1,993 tokens in 2 blocks of 1990 (8 more are beyond their blocks)"


def test_wrong_weights_are_refused():
    with pytest.raises(BadInput, match="weights has 1 numbers for 2 shards"):
        Mixture([corpus(8), corpus(8)], [1], seed=0)
    with pytest.raises(BadInput, match=r"weights: 1e-05 of 1.* less than one sample in 4096"):
        Mixture([corpus(8), corpus(8)], [1e-5, 1], seed=0)
