"""The losses of PPO, one number per token; the update divides their masked sum by the tokens of the whole mini-batch.

All arguments have one shape, any. Schulman et al., arXiv:1707.06347.
"""

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0  # exp of more would overflow in the products that follow


def log_ratio(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """log of the probability under the policy over that at the rollout, kept within +/- 20."""
    return (logprobs - old_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, *, cliprange: float, dual_clip: float | None = None
) -> Tensor:
    """Clipped surrogate max(-A ratio, -A clip(ratio, 1 - cliprange, 1 + cliprange)) of each token.

    With `dual_clip` c the loss of a negative advantage is at most -c A, however large the ratio (Ye et al.,
    arXiv:1912.09729).

    >>> old, new = torch.zeros(2), torch.log(torch.tensor([1.5, 1.5]))
    >>> policy_loss(new, old, torch.tensor([1.0, -1.0]), cliprange=0.2)
    tensor([-1.2000,  1.5000])
    """
    ratio = log_ratio(logprobs, old_logprobs).exp()
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - cliprange, 1 + cliprange))
    if dual_clip is not None:
        loss = torch.where(advantages < 0, torch.minimum(loss, -dual_clip * advantages), loss)
    return loss


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, *, cliprange_value: float) -> Tensor:
    """Half the squared error of each value, or of the value moved at most `cliprange_value` from the old one if larger.

    >>> value_loss(torch.tensor([1.0]), torch.tensor([0.0]), torch.tensor([1.0]), cliprange_value=0.2)
    tensor([0.3200])
    """
    clipped = old_values + (values - old_values).clamp(-cliprange_value, cliprange_value)
    return torch.maximum((values - returns) ** 2, (clipped - returns) ** 2) / 2


def importance_weights(old_logprobs: Tensor, sampled_logprobs: Tensor, *, cap: float) -> Tensor:
    """Probability of each token under the policy that is scored over that under the sampler, at most `cap`.

    It corrects for an engine whose numbers differ from the trainer's (truncated importance sampling; Espeholt et al.,
    arXiv:1802.01561).

    >>> importance_weights(torch.log(torch.tensor([0.5, 0.9])), torch.log(torch.tensor([0.4, 0.1])), cap=2.0)
    tensor([1.2500, 2.0000])
    """
    return log_ratio(old_logprobs, sampled_logprobs).exp().clamp(max=cap)
