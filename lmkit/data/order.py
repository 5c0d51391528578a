"""Which sample comes when: a shuffled order that is computed, not stored.

Position p of training reads sample `shuffled(p)`. Every epoch is its own permutation of all samples, so resuming needs
only the position, and the order is the same for any number of processes, any accumulation and any number of workers.
"""

from __future__ import annotations

import numpy as np

_ROUNDS = 6


def shuffled(positions: np.ndarray, num_samples: int, seed: int) -> np.ndarray:
    """Samples read at `positions` (counted over all epochs) of an endless shuffled pass over `num_samples` samples.

    A Feistel network, keyed by seed and epoch, permutes the smallest 4^k >= num_samples numbers; results outside the
    range are sent through again until they fall inside ("cycle walking"), which keeps it a permutation of the samples.
    Black and Rogaway, Ciphers with arbitrary finite domains, 2002.

    >>> shuffled(np.arange(5), 5, seed=0).tolist(), shuffled(np.arange(5, 10), 5, seed=0).tolist()
    ([1, 0, 2, 4, 3], [0, 2, 4, 1, 3])
    """
    if num_samples < 1:
        raise ValueError(f"an order needs at least one sample, found {num_samples}")
    positions = np.asarray(positions, dtype=np.uint64)
    epochs, values = np.divmod(positions, np.uint64(num_samples))
    keys = _mix(epochs + _mix(np.full_like(epochs, seed % 2**64)))
    half_bits = max(1, ((num_samples - 1).bit_length() + 1) // 2)
    values = _feistel(values, keys, half_bits)
    while (outside := values >= num_samples).any():
        values[outside] = _feistel(values[outside], keys[outside], half_bits)
    return values.astype(np.int64)


def batch_positions(step: int, micro_batch: int, rank: int, *, size: int, accumulation: int, world: int) -> np.ndarray:
    """Positions that process `rank` reads as its micro-batch of `size` samples.

    The positions of one step are the same set however they are split into processes and micro-batches.

    >>> [batch_positions(1, m, r, size=2, accumulation=2, world=2).tolist() for m in (0, 1) for r in (0, 1)]
    [[8, 9], [10, 11], [12, 13], [14, 15]]
    """
    first = ((step * accumulation + micro_batch) * world + rank) * size
    return np.arange(first, first + size)


def _feistel(values: np.ndarray, keys: np.ndarray, half_bits: int) -> np.ndarray:
    shift, mask = np.uint64(half_bits), np.uint64(2**half_bits - 1)
    left, right = values >> shift, values & mask
    for number in range(_ROUNDS):
        left, right = right, left ^ (_mix(right + keys + np.uint64(number << 32)) & mask)
    return left << shift | right


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's output function: every input bit changes every output bit (Steele, Lea, Flood, 2014)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
