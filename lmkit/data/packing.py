"""Which pieces of documents share a block: best-fit decreasing, so that few documents are cut.

Ding et al., Fewer truncations improve language modeling (arXiv:2404.10830). Documents longer than a block are divided
into whole blocks and a rest; rests and short documents are then placed whole, the longest first, each into the block
with the least room that holds it. Nothing is lost; what stays free at the end of a block is padding.
"""

from __future__ import annotations

import numpy as np


def pieces_of(document_offsets: np.ndarray, block_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Starts and lengths of the pieces of all documents, none longer than `block_size`; one of all but long documents.

    >>> pieces_of(np.array([0, 3, 11]), 4)
    (array([0, 3, 7]), array([3, 4, 4]))
    """
    offsets = np.asarray(document_offsets, np.int64)
    lengths = np.diff(offsets)
    counts = -(-lengths // block_size)
    document = np.repeat(np.arange(len(lengths)), counts)
    number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)  # of the piece in its document
    starts = offsets[document] + number * block_size
    return starts, np.minimum(offsets[document + 1] - starts, block_size)


def best_fit(lengths: np.ndarray, block_size: int) -> tuple[np.ndarray, np.ndarray]:
    """(pieces in the order of their blocks, first [num_blocks + 1]): block b holds `pieces[first[b]:first[b + 1]]`.

    lengths: [num_pieces], from 1 to block_size. Pieces of one length are placed together and blocks with as much room
    stand on one pile, so that the time is that of sorting, not pieces times blocks.

    >>> pieces, first = best_fit(np.array([2, 5, 3, 4, 1]), 5)
    >>> [pieces[a:b].tolist() for a, b in zip(first, first[1:])]
    [[1], [3, 4], [2, 0]]
    """
    order = np.argsort(-lengths, kind="stable")
    sizes, counts = np.unique(-lengths, return_counts=True)
    block_of = np.empty(len(lengths), np.int64)
    piles: dict[int, list[np.ndarray]] = {}  # room left -> blocks
    num_blocks = placed = 0
    for size, count in zip((-sizes).tolist(), counts.tolist()):
        while count:
            room = min((room for room in piles if room >= size), default=block_size)
            each = room // size
            wanted = -(-count // each)
            if room in piles:
                blocks, rest = np.split(np.concatenate(piles.pop(room)), [wanted])
                if len(rest):
                    piles[room] = [rest]
            else:
                blocks = np.arange(num_blocks, num_blocks + wanted)
                num_blocks += wanted
            taken = min(count, each * len(blocks))
            block_of[order[placed : placed + taken]] = np.repeat(blocks, each)[:taken]
            placed, count = placed + taken, count - taken
            # All are filled with `each` pieces but for the last one, which may hold fewer.
            in_last = taken - each * (len(blocks) - 1)
            for filled, group in ((each, blocks[:-1]), (in_last, blocks[-1:])):
                if len(group) and (left := room - filled * size):
                    piles.setdefault(left, []).append(group)
    pieces = order[np.argsort(block_of[order], kind="stable")]
    return pieces, np.concatenate([[0], np.cumsum(np.bincount(block_of, minlength=num_blocks))])
