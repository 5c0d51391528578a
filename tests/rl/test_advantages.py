import pytest
import torch

from lmkit.rl.advantages import generalized_advantages, leave_one_out, token_rewards


def brute_force(rewards, values, mask, gamma, lam):
    """The definition as a double sum over the counted tokens of each row."""
    advantages = torch.zeros_like(values)
    for row in range(len(values)):
        steps = mask[row].nonzero().flatten().tolist()
        following = [*steps[1:], None]
        deltas = [
            rewards[row, t] + (gamma * values[row, n] if n is not None else 0) - values[row, t]
            for t, n in zip(steps, following)
        ]
        for i, t in enumerate(steps):
            advantages[row, t] = sum((gamma * lam) ** k * deltas[i + k] for k in range(len(steps) - i))
    return advantages


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_advantages_are_the_definition_with_random_gaps(dtype):
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        rows, steps = (int(torch.randint(1, 9, (1,), generator=generator)) for _ in range(2))
        rewards, values = (torch.randn(rows, steps, dtype=dtype, generator=generator) for _ in range(2))
        mask = torch.rand(rows, steps, generator=generator) < 0.7
        gamma, lam = torch.rand(2, generator=generator).tolist()
        advantages, returns = generalized_advantages(rewards, values, mask, gamma=gamma, lam=lam)
        expected = brute_force(rewards, values, mask, gamma, lam)
        tolerance = 1e-12 if dtype == torch.float64 else 1e-5
        assert torch.allclose(advantages, expected, rtol=0, atol=tolerance)
        assert torch.allclose(returns[mask], (expected + values)[mask], rtol=0, atol=tolerance)
        assert (returns[~mask] == 0).all()


def test_lambda_1_is_the_return_less_the_value_and_lambda_0_the_delta():
    rewards, values = torch.randn(2, 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(3, 6, dtype=torch.bool)
    discounts = 0.9 ** torch.arange(6)
    totals = torch.stack([(rewards[:, t:] * discounts[: 6 - t]).sum(1) for t in range(6)], 1)
    advantages, _ = generalized_advantages(rewards, values, mask, gamma=0.9, lam=1)
    assert torch.allclose(advantages, totals - values, atol=1e-12)
    following = torch.cat([values[:, 1:], torch.zeros(3, 1)], 1)
    advantages, _ = generalized_advantages(rewards, values, mask, gamma=0.9, lam=0)
    assert torch.allclose(advantages, rewards + 0.9 * following - values, atol=1e-12)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_whatever_it_holds(side):
    rewards, values = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(6) < torch.tensor([[6], [2], [4]])
    expected = generalized_advantages(rewards, values, mask, gamma=0.9, lam=0.8)

    def padded(table, fill):
        extra = torch.full((3, 5), fill, dtype=table.dtype)
        return torch.cat([extra, table] if side == "left" else [table, extra], 1)

    found = generalized_advantages(padded(rewards, 7.0), padded(values, -3.0), padded(mask, False), gamma=0.9, lam=0.8)
    for table, wanted in zip(found, expected):
        inside, outside = (table[:, 5:], table[:, :5]) if side == "left" else (table[:, :6], table[:, 6:])
        assert torch.allclose(inside, wanted, atol=1e-6)
        assert (outside == 0).all()


def test_score_lands_on_the_last_counted_token_of_each_row():
    mask = torch.tensor([[True, True, True], [True, False, False], [True, False, True], [False, False, False]])
    rewards = token_rewards(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.full((4, 3), 0.25), mask)
    expected = [[-0.25, -0.25, 0.75], [1.75, 0, 0], [-0.25, 0, 2.75], [0, 0, 0]]
    assert torch.equal(rewards, torch.tensor(expected))


def test_a_row_that_goes_on_is_one_cut_out_of_a_longer_one():
    """With V of the next state as final value, the first steps see what they would have seen before the cut."""
    rewards, values = torch.randn(2, 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    whole, _ = generalized_advantages(rewards, values, torch.ones(3, 6).bool(), gamma=0.9, lam=0.0)
    cut = rewards[:, :4], values[:, :4], torch.ones(3, 4).bool()
    found, returns = generalized_advantages(*cut, gamma=0.9, lam=0.0, final_values=values[:, 4])
    assert torch.allclose(found, whole[:, :4], atol=1e-12)
    assert torch.allclose(returns, found + values[:, :4], atol=1e-12)
    ended, _ = generalized_advantages(*cut, gamma=0.9, lam=0.0)
    assert torch.allclose(found[:, 3] - ended[:, 3], 0.9 * values[:, 4], atol=1e-12)


def test_leave_one_out_is_the_definition_and_passes_over_rows_that_do_not_count():
    generator = torch.Generator().manual_seed(0)
    totals = torch.randn(12, generator=generator)
    counts = torch.tensor([1, 1, 1, 1, 1, 0, 1, 1, 0, 0, 0, 1]).bool()
    found = leave_one_out(totals, counts, 4)
    for row in range(12):
        others = [i for i in range(row - row % 4, row - row % 4 + 4) if i != row and counts[i]]
        wanted = totals[row] - totals[others].mean() if counts[row] and others else torch.tensor(0.0)
        assert found[row].item() == pytest.approx(wanted.item(), abs=1e-6)
    assert found[11] == 0  # alone in its group
    assert found[:4].sum().item() == pytest.approx(0, abs=1e-6)
