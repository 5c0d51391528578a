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
from lmkit.rl.update import (
    advantages_and_returns,
    counted_tokens,
    make_optimizer,
    micro_batch_loss,
    mini_batches,
    paid_metrics,
    update,
)

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


def run(model, rollout, args, seed=0, advantages=None, ptx=None):
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
        ptx=ptx,
    )
    return metrics, len(taken)


def flat_gradient(model):
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()])


def gradient(model, rollout, args):
    """The gradient of one mini-batch of all rows, before any clipping."""
    own = copy.deepcopy(model)
    advantages, returns = advantages_and_returns(rollout, args, args.kl_coef)
    counted = counted_tokens(rollout, args)
    tables = (advantages, returns, counted)
    loss, _ = micro_batch_loss(rollout, torch.arange(len(counted)), *tables, own, args, args.kl_coef, "cpu")
    (loss / counted.sum()).backward()
    return flat_gradient(own)


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


def test_the_entropy_bonus_adds_the_gradient_that_raises_entropy(model, rollout):
    own = copy.deepcopy(model)
    _, _, entropies = own(*rollout.model_inputs(), 1.0, True)
    (-0.5 * entropies.mean()).backward()
    added = gradient(model, rollout, config(entropy_coef=0.5)) - gradient(model, rollout, config())
    assert torch.allclose(added, flat_gradient(own), rtol=1e-3, atol=1e-6)


def test_beyond_dual_clip_a_negative_advantage_has_no_gradient(model, rollout):
    old = replace(rollout, logprobs=(rollout.logprobs - 1.5) * rollout.mask, scores=-rollout.scores.abs())  # ratios 4.5
    given = torch.full(rollout.mask.shape, -1.0) * rollout.mask, torch.zeros(rollout.mask.shape), rollout.mask
    for dual_clip, moves in ((None, True), (1.5, False)):
        own, args = copy.deepcopy(model), config(vf_coef=0.0, dual_clip=dual_clip)
        micro_batch_loss(old, torch.arange(ROWS), *given, own, args, 0.0, "cpu")[0].backward()
        assert bool(flat_gradient(own).abs().max() > 1e-3) == moves


def test_a_value_is_clipped_where_it_has_no_gradient(rollout):
    """Old value 0, new 0.5, clip 0.2: for a return of 1 the error counts from 0.2, for 0 from 0.5."""
    counts, zeros = rollout.mask, torch.zeros(rollout.mask.shape)
    num = int(counts.sum())
    near = 0.05 + 0.15 * torch.randn(counts.shape, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    for old, new, wanted, clipped in ((zeros, 0.5, 1.0, num), (zeros, 0.5, 0.0, 0), (near, 0.05, 0.06, 0)):
        values = torch.full((num,), new)
        given = zeros, torch.full(counts.shape, wanted), counts
        part = replace(rollout, values=old)
        model = lambda *_, values=values: (rollout.logprobs[counts], values, None)  # noqa: E731
        _, sums = micro_batch_loss(part, torch.arange(ROWS), *given, model, config(), 0.0, "cpu")
        assert sums["value_clipped"] == clipped


@pytest.mark.parametrize(
    ("options", "score", "other"),
    [
        ({"kl_coef": 0.1}, 2.0, -0.1 * 0.3),
        ({"kl_coef": 0.1, "kl_placement": "loss", "kl_estimator": "k2"}, 2.0, 0.0),
        ({"kl_coef": 0.1, "truncation": "bootstrap", "missing_eos_penalty": 0}, 1.0, -0.1 * 0.3),
        ({"kl_coef": 0.1, "truncation": "mask", "missing_eos_penalty": 0}, 2.0, -0.1 * 0.2),
    ],
)
def test_what_completions_are_paid_by_hand(options, score, other):
    """Two completions of 2 and 4 tokens with scores 2 and 3, each token 0.1 nats from the reference, the second cut."""
    lengths = torch.tensor([2, 4])
    mask = torch.arange(4) < lengths[:, None]
    drawn = Completions(torch.ones(2, 4, dtype=torch.long), lengths, -1.0 * mask, ["stop", "length"])
    scored = {"logprobs": -1.0 * mask, "ref_logprobs": -1.1 * mask, "scores": torch.tensor([2.0, 3.0])}
    found = paid_metrics(replace(unscored([[5], [5]], drawn), **scored), config(**options), 0.1)
    assert found["objective/non_score_reward"] == pytest.approx(other, abs=1e-6)
    assert found["objective/rlhf_reward"] == pytest.approx(score + other, abs=1e-6)


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


@pytest.mark.parametrize("target_kl", [None, 1e-9, 1e9])
def test_an_iteration_ends_before_the_step_that_would_go_on_beyond_target_kl(model, rollout, target_kl):
    reference = copy.deepcopy(model)
    metrics, taken = run(model, rollout, config(num_ppo_epochs=3, num_mini_batches=2, target_kl=target_kl))
    assert taken == metrics["policy/num_updates"] == (1 if target_kl == 1e-9 else 6)
    if target_kl == 1e-9:  # the one update made is the first that is made without a target
        assert metrics["policy/approxkl_k3"] > 1.5e-9
        run(reference, rollout, config(num_ppo_epochs=1, num_mini_batches=2, target_kl=target_kl))
        assert torch.equal(parameters(reference), parameters(model))
        assert all(p.grad is None for p in model.parameters())


def test_masked_rows_teach_nothing_and_weigh_nothing(model, rollout):
    """The gradient is that of the rollout without the rows that were cut off."""
    args = config(truncation="mask", missing_eos_penalty=0, per_device_train_batch_size=5)
    kept = rollout.rows(rollout.stopped.nonzero().squeeze(1))
    assert 0 < len(kept.scores) < ROWS
    expected = gradient(model, kept, args)
    assert torch.allclose(gradient(model, rollout, args), expected, rtol=1e-4, atol=1e-7)
    assert not torch.allclose(gradient(model, rollout, config(missing_eos_penalty=0)), expected, rtol=1e-2)
    metrics, _ = run(model, rollout, args)
    assert math.isfinite(metrics["loss/policy_avg"])


def test_a_rollout_of_masked_rows_alone_moves_nothing(model, rollout):
    before = parameters(model)
    cut = replace(rollout, finish_reasons=["length"] * ROWS)
    metrics, _ = run(model, cut, config(truncation="mask", missing_eos_penalty=0, num_ppo_epochs=1))
    assert torch.equal(parameters(model), before)
    assert metrics["policy/grad_norm"] == 0


def test_bootstrapped_rows_have_the_critics_value_in_the_place_of_their_score(rollout):
    args = config(truncation="bootstrap", missing_eos_penalty=0, lam=1.0)
    final = torch.arange(float(ROWS)) * ~rollout.stopped
    _, returns = advantages_and_returns(replace(rollout, final_values=final), args, 0.3)
    k1 = ((rollout.logprobs - rollout.ref_logprobs) * rollout.mask).sum(1)
    expected = torch.where(rollout.stopped, rollout.scores, final) - 0.3 * k1
    assert torch.allclose(returns[:, 0], expected, atol=1e-5)


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_kl_in_the_loss_adds_its_gradient_and_leaves_the_rewards_alone(model, rollout, estimator):
    args = config(kl_placement="loss", kl_estimator=estimator, kl_coef=0.4)
    plain = config(kl_coef=0.0)
    for found, wanted in zip(advantages_and_returns(rollout, args, 0.4), advantages_and_returns(rollout, plain, 0.0)):
        assert torch.equal(found, wanted)
    own = copy.deepcopy(model)
    logprobs, _, _ = own(*rollout.model_inputs(), 1.0, False)
    difference = logprobs - rollout.ref_logprobs[rollout.mask]
    kl = difference**2 / 2 if estimator == "k2" else (-difference).exp() - 1 + difference
    (0.4 * kl.mean()).backward()
    added = gradient(model, rollout, args) - gradient(model, rollout, plain)
    assert torch.allclose(added, flat_gradient(own), rtol=1e-3, atol=1e-6)


def test_rloo_has_the_gradient_of_reinforce_with_the_others_as_baseline(policy, rollout):
    """At ratio 1: minus the sum over rows of advantage x gradient of the completion's log-probability, over tokens."""
    model = ActorCritic(policy)
    disable_dropout(model)
    args = config(advantage_estimator="rloo", num_generations=3, kl_coef=0.2)
    totals = rollout.scores - 1.0 * ~rollout.stopped
    totals = totals - 0.2 * ((rollout.logprobs - rollout.ref_logprobs) * rollout.mask).sum(1)
    own = copy.deepcopy(model)
    logprobs = rollout.per_token(own(*rollout.model_inputs(), 1.0, False)[0]).sum(1)
    advantages = torch.cat([3 / 2 * (group - group.mean()) for group in totals.split(3)])
    (-(advantages * logprobs).sum() / rollout.mask.sum()).backward()
    assert torch.allclose(gradient(model, rollout, args), flat_gradient(own), rtol=1e-3, atol=1e-6)
    metrics, _ = run(model, rollout, args)
    assert not {"critic_lr", "loss/value_avg", "val/grad_norm"} & metrics.keys()


def test_the_samplers_tokens_are_weighed_by_how_likely_they_are_to_the_policy(model, rollout):
    sampled = replace(rollout, sampled_logprobs=(rollout.logprobs - math.log(2)) * rollout.mask)
    expected = gradient(model, sampled, config(vf_coef=0.0))
    for cap, weight in ((5.0, 2.0), (1.5, 1.5)):
        found = gradient(model, sampled, config(vf_coef=0.0, importance_sampling_cap=cap))
        assert torch.allclose(found, weight * expected, rtol=1e-4, atol=1e-7)


def test_text_that_is_mixed_in_adds_the_gradient_of_its_cross_entropy(model, rollout, monkeypatch):
    generator = torch.Generator().manual_seed(2)
    input_ids, labels = torch.randint(4, 64, (2, 5, 7), generator=generator)
    labels = labels.masked_fill(torch.arange(7) < 2, -100)
    args = config(ptx_coef=0.7, num_ppo_epochs=1, max_grad_norm=1e9, per_device_train_batch_size=2)
    own, seen = copy.deepcopy(model), []
    loss = torch.nn.functional.cross_entropy(own.policy(input_ids).logits.flatten(0, 1), labels.flatten())
    (0.7 * loss).backward()
    expected = flat_gradient(own) + gradient(model, rollout, args)
    monkeypatch.setattr(torch.optim.AdamW, "zero_grad", lambda self: seen.append(flat_gradient(model)))
    metrics, _ = run(model, rollout, args, ptx=lambda step: {"input_ids": input_ids, "labels": labels})
    assert torch.allclose(seen[0], expected, rtol=1e-3, atol=1e-6)
    assert metrics["loss/ptx"] == pytest.approx(loss.item(), rel=1e-5)


def test_on_recorded_rollouts_the_loss_is_that_of_trls_formulas(model, rollout):
    """Rows that end at max_new_tokens, where the two place the score alike; TRL divides by n - 1 when it whitens."""
    full = rollout.rows((rollout.completion_lengths == 10).nonzero().squeeze(1).repeat(3))
    generator = torch.Generator().manual_seed(5)
    noise = [torch.randn(full.logprobs.shape, generator=generator) / 3 for _ in range(2)]
    full = replace(full, logprobs=full.logprobs + noise[0], values=full.values + noise[1])
    args = config(missing_eos_penalty=0, kl_coef=0.3, gamma=0.97)
    with torch.no_grad():
        new, vpred = (full.per_token(found) for found in model(*full.model_inputs(), 1.0, False)[:2])
    rewards = -0.3 * (full.logprobs - full.ref_logprobs)
    rewards[:, -1] += full.scores
    last, found = 0, []
    for t in reversed(range(10)):
        next_values = full.values[:, t + 1] if t < 9 else 0.0
        last = rewards[:, t] + 0.97 * next_values - full.values[:, t] + 0.97 * 0.95 * last
        found.append(last)
    advantages = torch.stack(found[::-1], 1)
    returns = advantages + full.values
    advantages = (advantages - advantages.mean()) * torch.rsqrt(advantages.var() + 1e-8)
    ratio = (new - full.logprobs).exp()
    pg_loss = torch.max(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2)).mean()
    clipped = vpred.clamp(full.values - 0.2, full.values + 0.2)
    vf_loss = 0.5 * torch.max((vpred - returns) ** 2, (clipped - returns) ** 2).mean()
    ours, own_returns = advantages_and_returns(full, args, 0.3)
    n = ours.numel()
    tables = (ours * math.sqrt((n - 1) / n), own_returns, full.mask)
    loss, _ = micro_batch_loss(full, torch.arange(len(ours)), *tables, model, args, 0.3, "cpu")
    assert torch.allclose(own_returns, returns, atol=1e-6)
    assert (loss / n).item() == pytest.approx((pg_loss + args.vf_coef * vf_loss).item(), abs=1e-6)
