"""Best-fit packing loses nothing, overfills nothing, and packs as tightly as a slow best fit does."""

import itertools
import time

import numpy as np
import pytest

from lmkit.data.packing import best_fit, pieces_of


def slow_best_fit(lengths, block_size):
    """Number of blocks when every piece, the longest first, looks at all blocks."""
    rooms = []
    for length in sorted(lengths, reverse=True):
        holding = [i for i, room in enumerate(rooms) if room >= length]
        if holding:
            rooms[min(holding, key=lambda i: rooms[i])] -= length
        else:
            rooms.append(block_size - length)
    return sorted(rooms)


@pytest.mark.parametrize(("block_size", "longest"), [(1, 1), (7, 7), (64, 20), (64, 64), (100, 60)])
@pytest.mark.parametrize("count", [1, 2, 500])
def test_every_piece_is_in_one_block_and_blocks_are_those_of_a_slow_best_fit(block_size, longest, count):
    lengths = np.random.default_rng(count).integers(1, longest + 1, count)
    pieces, first = best_fit(lengths, block_size)
    assert sorted(pieces) == list(range(count))
    filled = [int(lengths[pieces[a:b]].sum()) for a, b in itertools.pairwise(first)]
    assert sorted(block_size - f for f in filled) == slow_best_fit(lengths, block_size)


def test_long_documents_become_whole_blocks_and_a_rest():
    starts, lengths = pieces_of(np.array([0, 3, 14, 18]), 4)
    assert starts.tolist() == [0, 3, 7, 11, 14]
    assert lengths.tolist() == [3, 4, 4, 3, 4]


def test_the_plan_takes_seconds_per_million_documents():
    lengths = np.minimum(np.random.default_rng(0).geometric(1 / 300, 300_000), 2048)
    start = time.process_time()
    _, first = best_fit(lengths, 2048)
    assert time.process_time() - start < 3
    assert lengths.sum() / (2048 * (len(first) - 1)) > 0.99
