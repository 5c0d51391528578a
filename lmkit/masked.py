"""Sums, means and whitening over the positions a mask counts.

True means "this position counts". Values at uncounted positions, NaN included, never reach a result or a gradient.
Every function takes `all_reduce`: a function that sums a tensor over all processes (`accelerator.reduce` fits), so
that a mean is a global mean. By default one process is the whole world.
"""

from collections.abc import Callable

import torch
from torch import Tensor

AllReduce = Callable[[Tensor], Tensor]


def alone(tensor: Tensor) -> Tensor:
    """The sum over processes when there is one process: the tensor itself."""
    return tensor


def masked_sum(values: Tensor, mask: Tensor, all_reduce: AllReduce = alone) -> Tensor:
    """Sum of `values` where `mask` is True. Shapes: equal, any; returns a scalar of the values' dtype.

    >>> masked_sum(torch.tensor([1.0, 2.0, float("nan")]), torch.tensor([True, True, False])).item()
    3.0
    """
    return all_reduce(values.masked_fill(~mask, 0).sum())


def masked_mean(values: Tensor, mask: Tensor, all_reduce: AllReduce = alone) -> Tensor:
    """Mean of `values` where `mask` is True, over all processes; 0 when nothing counts.

    >>> masked_mean(torch.tensor([[1.0, 9.0], [3.0, 5.0]]), torch.tensor([[True, False], [True, True]])).item()
    3.0
    """
    total = torch.stack([masked_sum(values, mask), mask.sum().to(values.dtype)])
    total, count = all_reduce(total).unbind()
    return total / count.clamp(min=1)


def whiten(
    values: Tensor, mask: Tensor, *, shift_mean: bool = True, epsilon: float = 1e-8, all_reduce: AllReduce = alone
) -> Tensor:
    """`values` scaled to variance 1 and (with `shift_mean`) mean 0 over the counted positions; 0 elsewhere.

    The variance is the biased one, over all processes, summed in float64. Shape and dtype as given.

    >>> whiten(torch.tensor([1.0, 3.0, 99.0]), torch.tensor([True, True, False]))
    tensor([-1.,  1.,  0.])
    >>> whiten(torch.tensor([1.0, 3.0]), torch.tensor([True, True]), shift_mean=False)
    tensor([1., 3.])
    """
    wide = values.double().masked_fill(~mask, 0)
    mean = masked_mean(wide, mask, all_reduce)
    variance = masked_mean((wide - mean) ** 2, mask, all_reduce)
    scaled = (wide - mean if shift_mean else wide) / (variance + epsilon).sqrt()
    return scaled.masked_fill(~mask, 0).to(values.dtype)
