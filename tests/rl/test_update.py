import copy
import math
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator

from lmkit.errors import Stopped
from lmkit.generation.sampler import Completions
from lmkit.models.heads import ValueHead
from lmkit.rl.actor_critic import ActorCritic, disable_dropout
from lmkit.rl.config import PPOConfig
from lmkit.rl.rollout import unscored
from lmkit.rl.update import advantages_and_returns, make_optimizer, mini_batches, update

ROWS = 12
BASE = {"rollout_batch_size": ROWS, "per_device_train_batch_size": ROWS, "learning_rate": 1e-2, "temperature": 1.0}


def config(**options):
    return PPOConfig(**(BASE | options))


@pytest.fixture
def model(policy):
    model = ActorCritic(policy, ValueHead(32))
    torch.nn.init.normal_(model.critic.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    disable_dropout(model)
    return model


@pytest.fixture
def rollout(model):
    """Rows of very uneven lengths, scored by the model itself, so that ratios start at 1."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 11, (ROWS,), generator=generator)
    lengths[0], lengths[1] = 1, 10
    prompts = [torch.randint(4, 64, (1 + i % 5,), generator=generator).tolist() for i in range(ROWS)]
    mask = torch.arange(10) < lengths[:, None]
    tokens = torch.randint(4, 64, (ROWS, 10), generator=generator) * mask
    reasons = ["stop" if i % 3 else "length" for i in range(ROWS)]
    bare = unscored(prompts, Completions(tokens, lengths, torch.zeros(ROWS, 10), reasons))
    with torch.no_grad():
        logprobs, values, entropies = (bare.per_token(x) for x in model(*bare.model_inputs(), 1.0, True))
    scores = torch.randn(ROWS, generator=generator)
    ref = (logprobs + 0.1 * torch.randn(ROWS, 10, generator=generator)) * mask
    return replace(bare, logprobs=logprobs, values=values, entropies=entropies, ref_logprobs=ref, scores=scores)


def run(model, rollout, args, seed=0, advantages=None):
    found = advantages_and_returns(rollout, args, args.kl_coef)
    steps = args.num_ppo_epochs * args.num_mini_batches
    optimizer = make_optimizer(model, args)
    taken = []
    original = optimizer.step
    optimizer.step = lambda: taken.append(1) or original()
    metrics = update(
        rollout,
        found[0] if advantages is None else advantages,
        found[1],
        model=model,
        optimizer=optimizer,
        config=args,
        kl_coef=args.kl_coef,
        rates=[1.0] * steps,
        accelerator=Accelerator(),
        generator=torch.Generator().manual_seed(seed),
    )
    return metrics, len(taken)


def parameters(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("micro_batch", [1, 5])
def test_how_a_mini_batch_is_cut_does_not_change_the_update(model, rollout, micro_batch):
    other = copy.deepcopy(model)
    options = {"num_mini_batches": 2, "num_ppo_epochs": 2, "entropy_coef": 0.01, "adam_epsilon": 1e-2}
    whole, _ = run(model, rollout, config(**options))
    cut, _ = run(other, rollout, config(**options, per_device_train_batch_size=micro_batch))
    assert torch.allclose(parameters(other), parameters(model), rtol=1e-5, atol=1e-6)
    for name in ("loss/policy_avg", "loss/value_avg", "policy/grad_norm", "val/ratio", "policy/approxkl_avg"):
        assert cut[name] == pytest.approx(whole[name], rel=1e-4, abs=1e-7)


@pytest.mark.parametrize(("epochs", "parts"), [(1, 1), (4, 1), (2, 2), (3, 4), (1, 5)])
def test_optimizer_steps_are_epochs_times_mini_batches(model, rollout, epochs, parts):
    assert run(model, rollout, config(num_ppo_epochs=epochs, num_mini_batches=parts))[1] == epochs * parts


def test_every_epoch_holds_every_row_once_in_another_order():
    batches = list(mini_batches(10, config(num_ppo_epochs=2, num_mini_batches=3), torch.Generator().manual_seed(0)))
    assert [len(batch) for batch in batches] == [4, 3, 3, 4, 3, 3]
    epochs = [torch.cat(batches[:3]), torch.cat(batches[3:])]
    assert all(sorted(epoch.tolist()) == list(range(10)) for epoch in epochs)
    assert not torch.equal(*epochs)


def test_first_mini_batch_has_ratio_1(model, rollout):
    metrics, _ = run(model, rollout, config(num_ppo_epochs=1, num_mini_batches=3, per_device_train_batch_size=2))
    assert metrics["val/first_ratio_error"] < 1e-5
    only, _ = run(model, rollout, config(num_ppo_epochs=1, num_mini_batches=1))
    assert only["val/ratio"] != 1.0  # the model has moved: the same rollout is no longer its own


def test_gradient_and_metrics_are_those_of_the_formula(model, rollout):
    """One epoch, one mini-batch, no scaling down: what the optimizer saw, against autograd on the plain formula."""
    args = config(num_ppo_epochs=1, max_grad_norm=1e9, learning_rate=1e-9, vf_coef=0.5)
    reference = copy.deepcopy(model)
    metrics, _ = run(model, rollout, args)
    advantages, returns = advantages_and_returns(rollout, args, args.kl_coef)
    mask = rollout.mask
    logprobs, values, _ = reference(*rollout.model_inputs(), 1.0, False)
    policy = (-(logprobs - rollout.logprobs[mask]).exp() * advantages[mask]).mean()
    value = ((values - returns[mask]) ** 2).mean() / 2
    (policy + 0.5 * value).backward()
    norm = torch.cat([p.grad.flatten() for p in reference.policy.parameters()]).norm()
    assert metrics["policy/grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert metrics["val/grad_norm"] == pytest.approx(reference.critic.weight.grad.norm().item(), rel=1e-4)
    assert metrics["loss/policy_avg"] == pytest.approx(policy.item(), abs=1e-6)
    assert metrics["loss/value_avg"] == pytest.approx(value.item(), rel=1e-5)


def test_policy_and_critic_are_clipped_apart_and_have_their_own_rates(model, rollout):
    args = config(num_ppo_epochs=1, max_grad_norm=1e-3, vf_coef=1000.0)
    optimizer = make_optimizer(model, args)
    norms = []
    optimizer.step = lambda: norms.extend(
        torch.stack([p.grad.norm() for p in group["params"]]).norm().item() for group in optimizer.param_groups
    )
    advantages, returns = advantages_and_returns(rollout, args, args.kl_coef)
    options = {"model": model, "optimizer": optimizer, "config": args, "accelerator": Accelerator(), "kl_coef": 0.1}
    update(rollout, advantages, returns, **options, rates=[0.5], generator=torch.Generator())
    assert norms == pytest.approx([1e-3, 1e-3], rel=1e-3)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5e-2, 1.5e-2]


def test_missing_eos_penalty_and_kl_enter_the_rewards_once(rollout):
    with_both = config(missing_eos_penalty=2.0, lam=1.0)
    _, returns = advantages_and_returns(rollout, with_both, 0.3)
    k1 = ((rollout.logprobs - rollout.ref_logprobs) * rollout.mask).sum(1)
    expected = rollout.scores - 2.0 * (1 - rollout.stopped.float()) - 0.3 * k1
    assert torch.allclose(returns[:, 0], expected, atol=1e-5)


def test_advantages_are_whitened_over_the_whole_rollout(rollout):
    advantages, _ = advantages_and_returns(rollout, config(), 0.1)
    counted = advantages[rollout.mask].double()
    assert abs(counted.mean().item()) < 1e-6
    assert counted.var(unbiased=False).item() == pytest.approx(1, abs=1e-4)


def test_whitened_rewards_change_the_returns(rollout):
    plain, scaled = (advantages_and_returns(rollout, config(whiten_rewards=flag), 0.1)[1] for flag in (False, True))
    assert not torch.allclose(plain, scaled)


def test_all_rows_without_a_stop_token_still_learn(model, rollout):
    before = parameters(model)
    run(model, replace(rollout, finish_reasons=["length"] * ROWS), config(num_ppo_epochs=1))
    assert torch.isfinite(parameters(model)).all()
    assert not torch.equal(parameters(model), before)


def test_entropy_bonus_and_dual_clip_do_something(model, rollout):
    results = []
    old = replace(rollout, logprobs=(rollout.logprobs - 1.5) * rollout.mask)  # ratios of e^1.5
    for options in ({}, {"entropy_coef": 0.5}, {"dual_clip": 1.5}):
        own = copy.deepcopy(model)
        run(own, old, config(num_ppo_epochs=1, **options))
        results.append(parameters(own))
    assert not torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_a_number_that_is_not_finite_stops_before_the_step(model, rollout):
    args = config(num_ppo_epochs=1)
    advantages, _ = advantages_and_returns(rollout, args, 0.1)
    advantages[0, 0] = math.nan
    before = parameters(model)
    with pytest.raises(
        Stopped, match=r"at update 1 the summed loss is nan.*must be finite, so the update was not made"
    ):
        run(model, rollout, args, advantages=advantages)
    assert torch.equal(parameters(model), before)
