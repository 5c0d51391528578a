"""Training rows cut from memory-mapped shards; only the rows asked for are read."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lmkit.data.packing import best_fit, pieces_of
from lmkit.data.shards import Shards
from lmkit.errors import BadInput

Packing = Literal["stream", "bos_bestfit", "pad"]
MAX_LOST = 0.01  # share of the tokens that stand beyond the blocks of their documents
WIDTHS = 16  # padded batches are a multiple of this wide: a compiled model meets few shapes


class Blocks:
    """Blocks of `context_length` input tokens and as many labels, numbered from 0.

    packing "stream": the corpus as one stream, cut anywhere; every token is used, a block may start inside a document.
    packing "bos_bestfit": whole documents side by side (`lmkit.data.packing`), the end of a block padded; only a
    document longer than a block is divided, and every token is used. Its plan is made from the lengths of all
    documents, so that time and memory at the start grow with their number.
    packing "pad": a block is one document, cut to length, or padded to the longest of its batch; for short documents.
    BadInput where this cuts off more than 1 % of the tokens; `num_lost` is their number.

    document_mask: the batch has `document_ids`, by which no token attends to another document (one document a block
    needs none). The token a document is predicted from first, the end of text before it, belongs to that document.
    """

    def __init__(self, shards: Shards, context_length: int, packing: Packing = "stream", document_mask: bool = False):
        self.tokens, self.context_length, self.packing = shards.tokens, context_length, packing
        self.document_mask, self.num_lost = document_mask and packing != "pad", 0
        if packing == "stream":
            self.num_blocks = (len(self.tokens) - 1) // context_length
        elif packing == "pad":
            self.starts = shards.document_offsets
            self.num_blocks = len(self.starts) - 1
            self.num_lost = int(np.maximum(np.diff(self.starts) - context_length, 0).sum())
        else:
            self.starts, self.lengths = pieces_of(shards.document_offsets, context_length)
            self.pieces, self.first = best_fit(self.lengths, context_length)
            self.num_blocks = len(self.first) - 1
        if not self.num_blocks:
            raise BadInput(
                f"The corpus has {len(self.tokens):,} tokens, less than one block of {context_length} and its next "
                "token. Give more text, or lower model.context_length."
            )
        if self.num_lost > MAX_LOST * len(self.tokens):
            raise BadInput(
                f"packing pad would read {context_length} tokens of each document and nothing after them: "
                f"{self.num_lost / len(self.tokens):.1%} of the {len(self.tokens):,} tokens would be lost, more than "
                f"{MAX_LOST:.0%}. Use --packing bos_bestfit (or stream), or a longer model.context_length."
            )

    def __len__(self) -> int:
        return self.num_blocks

    def fetch(self, numbers: np.ndarray) -> dict[str, Tensor]:
        """input_ids and labels [B, T] of the blocks [B]; a label is the next token, or -100 in the padding."""
        numbers = np.asarray(numbers)
        places, documents = self._places(numbers)
        inside, places = torch.from_numpy(places >= 0), np.maximum(places, 0)
        # Before a document stands the end of the one before it; before the first, the end of the last.
        inputs, labels = (torch.from_numpy(self.tokens[p].astype(np.int64)) for p in (places - 1, places))
        batch = {"input_ids": inputs, "labels": labels.where(inside, -100)}
        if self.document_mask:
            end_of_text = int(self.tokens[-1])
            batch["document_ids"] = (inputs == end_of_text).cumsum(1) if documents is None else documents
        return batch

    def _places(self, numbers: np.ndarray) -> tuple[np.ndarray, Tensor | None]:
        """Where in the corpus the labels stand [B, T], -1 in the padding, and the document of each in its block."""
        if self.packing == "stream":
            return numbers[:, None] * self.context_length + np.arange(1, self.context_length + 1), None
        if self.packing == "pad":
            starts, ends = self.starts[numbers], self.starts[numbers + 1]
            width = min(-(-int((ends - starts).max()) // WIDTHS) * WIDTHS, self.context_length)
            places = starts[:, None] + np.arange(width)
            return np.where(places < ends[:, None], places, -1), None
        places = np.full((len(numbers), self.context_length), -1)
        documents = torch.full(places.shape, -1)
        for row, number in enumerate(numbers):
            pieces = self.pieces[self.first[number] : self.first[number + 1]]
            lengths = self.lengths[pieces]
            begin = np.repeat(self.starts[pieces] - (np.cumsum(lengths) - lengths), lengths)
            places[row, : len(begin)] = begin + np.arange(len(begin))
            documents[row, : len(begin)] = torch.from_numpy(np.repeat(np.arange(len(pieces)), lengths))
        return places, documents
