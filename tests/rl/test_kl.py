import pytest
import torch

from lmkit.rl.kl import adapted_kl_coef, kl_per_token
from lmkit.rl.losses import policy_loss


def test_k1_and_k3_are_unbiased_and_k3_is_never_negative():
    generator = torch.Generator().manual_seed(0)
    policy, reference = (torch.randn(8, dtype=torch.float64, generator=generator).log_softmax(0) for _ in range(2))
    exact = (policy.exp() * (policy - reference)).sum()
    for estimator in ("k1", "k3"):
        expected = (policy.exp() * kl_per_token(policy, reference, estimator)).sum()
        assert expected.item() == pytest.approx(exact.item(), abs=1e-12)
    assert (kl_per_token(policy, reference, "k3") >= 0).all()
    assert torch.equal(kl_per_token(policy, policy, "k3"), torch.zeros(8, dtype=torch.float64))


@pytest.mark.parametrize(
    ("placement", "estimator", "reaches"), [("reward", "k1", 1), ("loss", "k2", 1), ("reward", "k3", 0)]
)
@pytest.mark.parametrize("kl_coef", [1.0, 0.5, 0.2])
def test_bandit_reaches_the_exact_optimum_only_by_the_right_estimates(placement, estimator, reaches, kl_coef):
    """Eight arms, exact expected gradients: the optimum is ref exp(r / kl_coef), normalised."""
    generator = torch.Generator().manual_seed(2)
    rewards, start = (
        torch.rand(8, dtype=torch.float64, generator=generator),
        torch.randn(8, generator=generator).double(),
    )
    reference = start.log_softmax(0)
    best = (reference + rewards / kl_coef).softmax(0)
    logits = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.02)
    for _ in range(1500):
        policy = logits.log_softmax(0)
        old = policy.detach()
        kl = kl_per_token(policy, reference, estimator)
        scores = rewards - kl_coef * kl.detach() if placement == "reward" else rewards
        advantages = scores - (old.exp() * scores).sum()
        losses = policy_loss(policy, old, advantages, cliprange=0.2)
        if placement == "loss":
            losses = losses + kl_coef * kl
        optimizer.zero_grad()
        (old.exp() * losses).sum().backward()
        optimizer.step()
    distance = (logits.softmax(0) - best).abs().sum().item() / 2
    assert distance <= 1e-2 if reaches else distance > 0.2


def test_adaptive_coefficient_is_zieglers():
    for kl, error in ((6.6, 0.1), (100.0, 0.2), (0.0, -0.2), (6.0, 0.0)):
        found = adapted_kl_coef(0.05, kl, target=6.0, num_episodes=512, horizon=10_000)
        assert found == pytest.approx(0.05 * (1 + error * 512 / 10_000), abs=1e-12)


def test_adaptive_coefficient_settles_at_its_target():
    """A policy whose KL falls as the coefficient rises."""
    kl_coef, kls = 0.01, []
    for _ in range(200):
        kls.append(0.6 / kl_coef)
        kl_coef = adapted_kl_coef(kl_coef, kls[-1], target=6.0, num_episodes=2000, horizon=10_000)
    assert kls[-1] == pytest.approx(6.0, rel=0.1)
