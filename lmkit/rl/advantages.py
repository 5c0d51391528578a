"""From scores and KL to rewards per token, advantages and returns. Shapes: B rows, C completion tokens."""

import torch
from torch import Tensor


def token_rewards(scores: Tensor, penalties: Tensor, mask: Tensor) -> Tensor:
    """Reward of each token: minus its penalty, and the row's score at its last counted token. [B, C], 0 elsewhere.

    scores: [B]. penalties: [B, C], kl_coef x KL of each token. mask: [B, C], True for completion tokens, the stop token
    included. A row without counted tokens gets no score.

    >>> mask = torch.tensor([[True, True, False]])
    >>> token_rewards(torch.tensor([2.0]), torch.full((1, 3), 0.5), mask)
    tensor([[-0.5000,  1.5000,  0.0000]])
    """
    is_last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)
    return (torch.where(is_last, scores[:, None], 0.0) - penalties).masked_fill(~mask, 0)


def generalized_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float, final_values: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Advantages and returns, each [B, C] and 0 where the mask is False.

    A_t = sum over l of (gamma lam)^l delta_{t+l}, delta_t = r_t + gamma V(s_{t+1}) - V(s_t), over the counted tokens of
    a row: what the mask leaves out is passed over without discount, wherever it lies. After the last counted token the
    value is that of `final_values` [B] (0 where the row ends there, and by default). Returns are advantages + values.
    Schulman et al., arXiv:1506.02438.

    >>> ones = torch.ones(1, 2)
    >>> generalized_advantages(ones, torch.zeros(1, 2), ones.bool(), gamma=1.0, lam=1.0)[0]
    tensor([[2., 1.]])
    """
    advantages = torch.zeros_like(values)
    following = torch.zeros_like(values[:, 0])
    next_value = following if final_values is None else final_values
    for t in reversed(range(values.shape[1])):
        counts = mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        following = torch.where(counts, delta + gamma * lam * following, following)
        next_value = torch.where(counts, values[:, t], next_value)
        advantages[:, t] = torch.where(counts, following, 0)
    return advantages, torch.where(mask, advantages + values, 0)


def leave_one_out(totals: Tensor, counts: Tensor, group_size: int) -> Tensor:
    """Each row's total reward less the mean of the other counted rows of its group: [B], 0 where `counts` is False.

    totals: [B], `group_size` completions of a prompt after each other. counts: bool [B]. A row without another has 0.
    The baseline of RLOO (Kool et al., 2019; Ahmadian et al., arXiv:2402.14740): it does not depend on the row itself,
    so that the gradient stays unbiased.

    >>> leave_one_out(torch.tensor([1.0, 2.0, 6.0]), torch.ones(3).bool(), 3)
    tensor([-3.0000, -1.5000,  4.5000])
    """
    groups, counted = totals.view(-1, group_size), counts.view(-1, group_size)
    others = counted.sum(1, keepdim=True) - 1
    baseline = ((groups * counted).sum(1, keepdim=True) - groups) / others.clamp(min=1)
    return torch.where(counted & (others > 0), groups - baseline, 0.0).flatten()
