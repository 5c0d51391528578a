"""The weights that scored best so far, kept on disk, so that a run that was stopped still knows them."""

from __future__ import annotations

import math
from pathlib import Path

from torch import nn

from lmkit.stage import latest_checkpoint, rotate
from lmkit.training import checkpoint


class Best:
    """The best of the models offered; `step` says when it was seen, 0 before the first.

    A run that goes on from a checkpoint older than the best meets the same scores again, and keeps it.
    """

    def __init__(self, folder: Path):
        self.folder, self.value, self.step = Path(folder), -math.inf, 0
        if (path := latest_checkpoint(self.folder)) is not None:
            _, state = checkpoint.load(path)
            self.value, self.step = state["value"], state["step"]

    def offer(self, model: nn.Module, value: float, step: int) -> None:
        """Keeps the weights if `value` is above that of all before. Call it in the main process."""
        if value <= self.value:
            return
        self.value, self.step = value, step
        tensors = {"model": model.state_dict()}
        # The value in the name: plain and averaged weights are offered at the same step.
        name = f"step-{step:06d}-{value:.6f}"
        checkpoint.save(self.folder / name, tensors=tensors, state={"value": value, "step": step})
        rotate(self.folder, keep=1)

    def restore(self, model: nn.Module) -> None:
        """Gives `model` the weights kept."""
        tensors, _ = checkpoint.load(latest_checkpoint(self.folder))
        model.load_state_dict(tensors["model"])
