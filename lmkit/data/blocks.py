"""Training rows cut from memory-mapped shards; only the rows asked for are read."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lmkit.data.shards import Shards
from lmkit.errors import BadInput

Packing = Literal["stream", "pad"]
WIDTHS = 16  # padded batches are a multiple of this wide: a compiled model meets few shapes


class Blocks:
    """Blocks of `context_length` input tokens and as many labels, numbered from 0.

    packing "stream": the corpus as one stream, cut anywhere; every token is used, and a block may start inside a
    document. packing "pad": a block is one document behind an end-of-text token, cut to length, or padded to the
    longest of its batch; for short documents.
    """

    def __init__(self, shards: Shards, context_length: int, packing: Packing = "stream"):
        self.tokens, self.context_length = shards.tokens, context_length
        self.starts = shards.document_offsets if packing == "pad" else None
        self.num_blocks = (len(self.tokens) - 1) // context_length if self.starts is None else len(self.starts) - 1
        if not self.num_blocks:
            raise BadInput(
                f"The corpus has {len(self.tokens):,} tokens, less than one block of {context_length} and its next "
                "token. Give more text, or lower model.context_length."
            )

    def __len__(self) -> int:
        return self.num_blocks

    def fetch(self, numbers: np.ndarray) -> dict[str, Tensor]:
        """input_ids and labels [B, T] of the blocks [B]; a label is the next token, or -100 in the padding."""
        numbers = np.asarray(numbers)
        if self.starts is None:
            places = numbers[:, None] * self.context_length + np.arange(self.context_length + 1)
            rows = torch.from_numpy(self.tokens[places].astype(np.int64))
            return {"input_ids": rows[:, :-1], "labels": rows[:, 1:]}
        starts, ends = self.starts[numbers], self.starts[numbers + 1]
        width = min(-(-int((ends - starts).max()) // WIDTHS) * WIDTHS, self.context_length)
        places = starts[:, None] + np.arange(width)
        inside = torch.from_numpy(places < ends[:, None])
        last = len(self.tokens) - 1  # the end-of-text token of the last document
        rows = torch.from_numpy(self.tokens[np.minimum(places, last)].astype(np.int64))
        end_of_text = torch.full((len(rows), 1), int(self.tokens[last]))
        return {"input_ids": torch.cat([end_of_text, rows[:, :-1]], dim=1), "labels": rows.where(inside, -100)}
