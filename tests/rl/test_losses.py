import math

import pytest
import torch

from lmkit.rl.losses import importance_weights, log_ratio, policy_loss, value_loss


def per_token(ratio, advantage, clip, dual):
    loss = max(-advantage * ratio, -advantage * min(max(ratio, 1 - clip), 1 + clip))
    return min(loss, -dual * advantage) if dual is not None and advantage < 0 else loss


@pytest.mark.parametrize("dual_clip", [None, 2.0])
def test_policy_loss_and_gradient_in_every_branch(dual_clip):
    """Advantages of both signs, ratios below, inside and above the clip, and beyond the dual clip."""
    ratios, signs = [0.5, 0.79, 0.9, 1.0, 1.1, 1.21, 1.6, 3.0], [-1.5, -0.2, 0.0, 0.7, 2.0]
    grid = torch.tensor([[r, a] for r in ratios for a in signs], dtype=torch.float64)
    old = torch.linspace(-3, -0.1, len(grid), dtype=torch.float64)
    new = (old + grid[:, 0].log()).requires_grad_()
    losses = policy_loss(new, old, grid[:, 1], cliprange=0.2, dual_clip=dual_clip)
    expected = [per_token(r, a, 0.2, dual_clip) for r, a in grid.tolist()]
    assert torch.allclose(losses, torch.tensor(expected, dtype=torch.float64), atol=1e-10)
    losses.sum().backward()
    slopes = []
    for ratio, advantage in grid.tolist():
        ends = [per_token(ratio * math.exp(step), advantage, 0.2, dual_clip) for step in (1e-6, -1e-6)]
        slopes.append((ends[0] - ends[1]) / 2e-6)
    assert torch.allclose(new.grad, torch.tensor(slopes, dtype=torch.float64), atol=1e-7)


def test_a_ratio_beyond_all_bounds_stays_finite():
    new, old = torch.tensor([0.0, -500.0]), torch.tensor([-500.0, 0.0])
    assert log_ratio(new, old).tolist() == [20.0, -20.0]
    assert torch.isfinite(policy_loss(new, old, torch.tensor([-1.0, 1.0]), cliprange=0.2)).all()


def test_value_loss_and_gradient_in_every_branch():
    rows = [(v, o, r) for v in (-1.0, -0.1, 0.05, 0.35, 2.0) for o in (0.0, 0.5) for r in (-2.0, 0.15, 0.6, 3.0)]
    grid = torch.tensor(rows, dtype=torch.float64)
    values = grid[:, 0].clone().requires_grad_()
    losses = value_loss(values, grid[:, 1], grid[:, 2], cliprange_value=0.2)

    def one(value, old, wanted):
        clipped = old + min(max(value - old, -0.2), 0.2)
        return max((value - wanted) ** 2, (clipped - wanted) ** 2) / 2

    assert torch.allclose(losses, torch.tensor([one(*row) for row in rows], dtype=torch.float64), atol=1e-10)
    losses.sum().backward()
    slopes = [(one(v + 1e-6, o, r) - one(v - 1e-6, o, r)) / 2e-6 for v, o, r in rows]
    assert torch.allclose(values.grad, torch.tensor(slopes, dtype=torch.float64), atol=1e-7)


def test_importance_weights_make_an_expectation_that_of_the_policy_until_they_are_capped():
    generator = torch.Generator().manual_seed(0)
    policy, sampler = (torch.randn(9, dtype=torch.float64, generator=generator).log_softmax(0) for _ in range(2))
    worth = torch.randn(9, dtype=torch.float64, generator=generator)
    weights = importance_weights(policy, sampler, cap=1e9)
    assert (sampler.exp() * weights * worth).sum().item() == pytest.approx(
        (policy.exp() * worth).sum().item(), abs=1e-12
    )
    assert torch.equal(importance_weights(policy, sampler, cap=1.5), weights.clamp(max=1.5))
    assert weights.max() > 1.5
