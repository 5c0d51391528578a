"""Corpora mixed by weight, sample by sample: computed from the position alone, so that resuming needs one integer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lmkit.data.blocks import Blocks, Packing
from lmkit.data.order import shuffled
from lmkit.data.parts import check_complete
from lmkit.data.shards import Shards
from lmkit.errors import BadInput

CYCLE = 4096  # samples in which every corpus has exactly its share


class Mixture:
    """An endless sequence of blocks from several corpora, `weights[k]` of them from corpus k.

    Each cycle of 4,096 positions is a shuffled deal of slots, of which corpus k owns its share; the blocks of a corpus
    come in its own shuffled epochs, however often the others are repeated. Empty weights: by the numbers of blocks.

    num_samples: None, as `lmkit.training.loop.fit` takes it. A single corpus is no mixture: `fetch` takes the numbers
    of its blocks then, and there are `num_samples` of them.
    """

    def __init__(self, corpora: Sequence[Blocks], weights: Sequence[float], seed: int):
        self.corpora, self.seed = corpora, seed
        self.num_samples = len(corpora[0]) if len(corpora) == 1 else None
        weights = np.array(weights or [len(corpus) for corpus in corpora], float)
        if len(weights) != len(corpora):
            raise BadInput(f"weights has {len(weights)} numbers for {len(corpora)} shards. Give one for each.")
        self.slots = apportion(weights, CYCLE)
        if not self.slots.all():
            low = int(np.argmin(self.slots))
            raise BadInput(
                f"weights: {weights[low]:g} of {weights.sum():g} is less than one sample in {CYCLE}. Raise it, or "
                "leave this corpus out."
            )

    def __len__(self) -> int:
        return sum(map(len, self.corpora))

    def size(self) -> str:
        """The tokens that are taught, in words, and those that are not."""
        num_lost = sum(corpus.num_lost for corpus in self.corpora)
        taught = sum(len(corpus.tokens) for corpus in self.corpora) - num_lost
        beyond = f" ({num_lost:,} more are beyond their blocks)" if num_lost else ""
        return f"{taught:,} tokens in {len(self):,} blocks of {self.corpora[0].context_length}{beyond}"

    def draw(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Corpus and block [N] read at the positions [N], counted from the start of training."""
        positions = np.asarray(positions)
        slots = shuffled(positions, CYCLE, self.seed)
        ends = np.cumsum(self.slots)
        corpora = np.searchsorted(ends, slots, side="right")
        turns = positions // CYCLE * self.slots[corpora] + slots - (ends - self.slots)[corpora]
        blocks = np.empty_like(turns)
        for k, corpus in enumerate(self.corpora):
            # A key of its own: two corpora of one size do not go in step.
            blocks[corpora == k] = shuffled(turns[corpora == k], len(corpus), self.seed + ((k + 1) << 32))
        return corpora, blocks

    def fetch(self, positions: np.ndarray) -> dict[str, Tensor]:
        """The batch at the positions [B], in their order; narrower rows are padded to the widest."""
        if self.num_samples is not None:
            return self.corpora[0].fetch(positions)
        corpora, blocks = self.draw(positions)
        present = np.unique(corpora)
        parts = [self.corpora[k].fetch(blocks[corpora == k]) for k in present]
        width = max(part["labels"].shape[1] for part in parts)
        back = torch.from_numpy(np.argsort(np.concatenate([np.flatnonzero(corpora == k) for k in present])))
        padding = {"input_ids": 0, "labels": -100, "document_ids": -1}
        return {
            name: torch.cat(
                [torch.nn.functional.pad(p[name], (0, width - p[name].shape[1]), value=padding[name]) for p in parts]
            )[back]
            for name in parts[0]
        }


def open_mixture(
    folders: Sequence[Path],
    split: str,
    tokenizer: PreTrainedTokenizerBase,
    context_length: int,
    *,
    packing: Packing,
    document_mask: bool,
    weights: Sequence[float],
    seed: int,
) -> Mixture:
    """The mixture of one split of the shards in `folders`.

    BadInput when another tokenizer made one of them, or when they are parts of a corpus and not all of its parts.
    """
    corpora = [Shards.open(folder / split) for folder in folders]
    check_complete([shards.meta for shards in corpora])
    for shards in corpora:
        shards.check_tokenizer(tokenizer)
    return Mixture([Blocks(shards, context_length, packing, document_mask) for shards in corpora], weights, seed)


def apportion(weights: np.ndarray, total: int) -> np.ndarray:
    """`total` seats by weight, the remainders by size (Hamilton's method).

    >>> apportion(np.array([1.0, 2.0, 4.0]), 10).tolist()
    [1, 3, 6]
    """
    shares = weights / weights.sum() * total
    seats = np.floor(shares).astype(np.int64)
    order = np.argsort(seats - shares, kind="stable")
    seats[order[: total - seats.sum()]] += 1
    return seats
