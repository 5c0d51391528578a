"""Averaged weights: smoother than the last ones at a constant learning rate, and often better."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from lmkit.training.sharding import full, is_empty


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

    def fill(self, module: nn.Module, prepared: nn.Module) -> None:
        """Goes over from a sharded module to the one it was made of, with whole averages; see `sharding.fill`."""
        if prepared is not module and is_empty(module):
            self.average = [full(average) for average in self.average]
            self.parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Inside the block the module has the averaged parameters; afterwards, to the bit, its own."""
        own = [parameter.detach().clone() for parameter in self.parameters]
        self._set(self.average)
        try:
            yield
        finally:
            self._set(own)

    @torch.no_grad()
    def _set(self, values: list[torch.Tensor]) -> None:
        for parameter, value in zip(self.parameters, values):
            parameter.copy_(value)
