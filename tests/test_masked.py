import pytest
import torch

from lmkit.masked import masked_mean, masked_sum, whiten


@pytest.fixture
def values():
    return torch.randn(6, 9, generator=torch.Generator().manual_seed(0)) * 3 + 5


@pytest.fixture
def mask():
    return torch.arange(9) < torch.tensor([[9], [1], [4], [0], [7], [2]])


def test_nan_outside_the_mask_reaches_neither_result_nor_gradient(values, mask):
    spoiled = values.masked_fill(~mask, float("nan")).requires_grad_()
    total = masked_sum(spoiled, mask) + masked_mean(spoiled, mask) + whiten(spoiled, mask).pow(3).sum()
    total.backward()
    assert torch.isfinite(total)
    assert torch.isfinite(spoiled.grad).all()
    assert (spoiled.grad[~mask] == 0).all()


def test_mean_is_that_of_the_counted_values(values, mask):
    assert masked_mean(values, mask).item() == pytest.approx(values[mask].mean().item(), abs=1e-6)
    assert masked_mean(values, torch.zeros_like(mask)) == 0


def test_whitened_values_have_mean_0_and_variance_1(values, mask):
    white = whiten(values, mask)[mask].double()
    assert abs(white.mean().item()) < 1e-6
    assert white.var(unbiased=False).item() == pytest.approx(1, abs=1e-4)
    scaled = whiten(values, mask, shift_mean=False)[mask]
    assert scaled.mean() / scaled.std() == pytest.approx((values[mask].mean() / values[mask].std()).item(), rel=1e-5)


def test_equal_values_become_0_and_not_nan(mask):
    assert (whiten(torch.full(mask.shape, 3.0), mask) == 0).all()
