"""Averaged weights: smoother than the last ones at a constant learning rate, and often better."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


class EMA:
    """Exponential moving average of a module's trained parameters (Polyak and Juditsky, 1992).

        average <- d average + (1 - d) parameter,    d = min(decay, (1 + step) / (10 + step))

    The smaller d of the first steps lets go of the initial weights. `lmkit.training.loop.fit` calls `start` and
    `update`; before, during and after it `applied` puts the average into the module.
    """

    def __init__(self, decay: float):
        self.decay = decay
        self.parameters: list[nn.Parameter] = []
        self.average: list[torch.Tensor] = []

    def start(self, module: nn.Module) -> None:
        """Follows `module` from its present parameters on."""
        self.parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.average = [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes in the parameters after update `step`, counted from 1."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.average, self.parameters, 1 - decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Inside the block the module has the averaged parameters; afterwards, to the bit, its own."""
        own = [parameter.detach().clone() for parameter in self.parameters]
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, self.average)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self.parameters, own)
