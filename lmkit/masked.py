"""Sums, means and whitening over the positions a mask counts.

True means "this position counts". Values at uncounted positions, NaN included, never reach a result or a gradient.
"""

from torch import Tensor


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum of `values` where `mask` is True. Shapes: equal, any; returns a scalar of the values' dtype.

    >>> import torch
    >>> masked_sum(torch.tensor([1.0, 2.0, float("nan")]), torch.tensor([True, True, False])).item()
    3.0
    """
    return values.masked_fill(~mask, 0).sum()


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of `values` where `mask` is True; 0 when nothing counts.

    >>> import torch
    >>> masked_mean(torch.tensor([[1.0, 9.0], [3.0, 5.0]]), torch.tensor([[True, False], [True, True]])).item()
    3.0
    """
    return masked_sum(values, mask) / mask.sum().clamp(min=1)


def whiten(values: Tensor, mask: Tensor, *, shift_mean: bool = True, epsilon: float = 1e-8) -> Tensor:
    """`values` scaled to variance 1 and (with `shift_mean`) mean 0 over the counted positions; 0 elsewhere.

    The variance is the biased one, summed in float64. Shape and dtype as given.

    >>> import torch
    >>> whiten(torch.tensor([1.0, 3.0, 99.0]), torch.tensor([True, True, False]))
    tensor([-1.,  1.,  0.])
    >>> whiten(torch.tensor([1.0, 3.0]), torch.tensor([True, True]), shift_mean=False)
    tensor([1., 3.])
    """
    wide = values.double().masked_fill(~mask, 0)
    mean = masked_mean(wide, mask)
    variance = masked_mean((wide - mean) ** 2, mask)
    scaled = (wide - mean if shift_mean else wide) / (variance + epsilon).sqrt()
    return scaled.masked_fill(~mask, 0).to(values.dtype)
