"""Training rows cut from memory-mapped shards."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lmkit.data.shards import Shards
from lmkit.errors import BadInput


class Blocks:
    """The corpus as one stream of tokens, cut into blocks of `context_length`; only the blocks asked for are read."""

    def __init__(self, shards: Shards, context_length: int):
        self.tokens, self.context_length = shards.tokens, context_length
        self.num_blocks = (len(shards.tokens) - 1) // context_length
        if not self.num_blocks:
            raise BadInput(
                f"The corpus has {len(shards.tokens):,} tokens, less than one block of {context_length} and its next "
                "token. Give more text, or lower model.context_length."
            )

    def __len__(self) -> int:
        return self.num_blocks

    def fetch(self, numbers: np.ndarray) -> dict[str, Tensor]:
        """input_ids and labels [B, T] of the blocks [B]; labels[b, t] is the token that follows input_ids[b, t]."""
        places = np.asarray(numbers)[:, None] * self.context_length + np.arange(self.context_length + 1)
        rows = torch.from_numpy(self.tokens[places].astype(np.int64))
        return {"input_ids": rows[:, :-1], "labels": rows[:, 1:]}
