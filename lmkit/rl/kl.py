"""How far the policy is from the reference: three estimates per token, and the coefficient that prices them.

KL(policy || reference) is estimated from tokens the policy drew (Schulman, Approximating KL divergence, 2020). Where an
estimate may stand: k1 in the reward and k2 as a loss have the gradient of the KL. The gradient of k3 as a loss is
biased, and k3 in the reward pays for leaving the reference's support (arXiv:2510.01555).
"""

from torch import Tensor


def kl_per_token(logprobs: Tensor, ref_logprobs: Tensor, estimator: str) -> Tensor:
    """Estimate of the KL at each token, in nats; shapes equal, any.

    k1: log p - log q; unbiased, may be negative. k2: half its square. k3: q/p - 1 - log(q/p); unbiased, never negative.

    >>> from torch import tensor
    >>> [round(kl_per_token(tensor(-1.0), tensor(-1.5), k).item(), 3) for k in ("k1", "k2", "k3")]
    [0.5, 0.125, 0.107]
    """
    difference = logprobs - ref_logprobs
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return difference**2 / 2
    # A ratio beyond e^20 says no more than e^20 does, and overflows.
    return (-difference).clamp(max=20.0).exp() - 1 + difference


def adapted_kl_coef(kl_coef: float, kl: float, *, target: float, num_episodes: int, horizon: int) -> float:
    """The coefficient after an iteration of `num_episodes` whose mean KL per completion (summed over tokens) was `kl`.

    Proportional control with the error clipped to 0.2 (Ziegler et al., arXiv:1909.08593, section 2.2).

    >>> adapted_kl_coef(0.1, 12.0, target=6.0, num_episodes=100, horizon=1000)
    0.10200000000000001
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * num_episodes / horizon)
