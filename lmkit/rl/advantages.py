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
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Advantages and returns, each [B, C] and 0 where the mask is False.

    A_t = sum over l of (gamma lam)^l delta_{t+l}, delta_t = r_t + gamma V(s_{t+1}) - V(s_t), over the counted tokens of
    a row: what the mask leaves out is passed over without discount, wherever it lies. After the last counted token the
    value is 0. Returns are advantages + values. Schulman et al., arXiv:1506.02438.

    >>> ones = torch.ones(1, 2)
    >>> generalized_advantages(ones, torch.zeros(1, 2), ones.bool(), gamma=1.0, lam=1.0)[0]
    tensor([[2., 1.]])
    """
    advantages = torch.zeros_like(values)
    following = next_value = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        counts = mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        following = torch.where(counts, delta + gamma * lam * following, following)
        next_value = torch.where(counts, values[:, t], next_value)
        advantages[:, t] = torch.where(counts, following, 0)
    return advantages, torch.where(mask, advantages + values, 0)
