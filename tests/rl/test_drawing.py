"""Completions drawn one iteration ahead: whose they are, that they are weighed, and that a stop costs none of them."""

import contextlib
import copy
import math
import threading

import pytest
import torch
from datasets import Dataset

from lmkit.errors import BadInput, Interrupted
from lmkit.rl import trainer as module
from lmkit.rl.actor_critic import target_logprobs
from lmkit.rl.config import PPOConfig
from lmkit.rl.trainer import PPOTrainer
from tests.generation import vllm_standin
from tests.rl.runs import logged, state

ROWS = Dataset.from_dict({"prompt": [" ".join(f"w{(i * k) % 20}" for k in range(1, 3 + i % 4)) for i in range(10)]})
AHEAD = {"one_step_off_policy": True, "importance_sampling_cap": 2.0}


@pytest.fixture
def make(make_policy, tokenizer, tmp_path):
    """A function that builds a trainer of 4 iterations in its own folder; `server`: where it samples."""

    def build(folder="run", server=None, **options):
        base = {"total_episodes": 16, "rollout_batch_size": 4, "num_mini_batches": 2, "num_ppo_epochs": 1}
        base |= {"max_new_tokens": 6, "learning_rate": 1e-2, "temperature": 1.0}
        if server is not None:
            base |= {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": server.address}
            base |= {"vllm_group_port": server.group_port, "importance_sampling_cap": 2.0}
        given = {
            name: options.pop(name) for name in ("eval_dataset", "reward", "seed", "stop_requested") if name in options
        }
        return PPOTrainer(
            make_policy(),
            given.pop("reward", lambda prompts, completions: [float(len(set(c))) for c in completions]),
            PPOConfig(**(base | options)),
            ROWS,
            processing_class=tokenizer,
            output_dir=tmp_path / folder,
            say=lambda text: None,
            **given,
        )

    return build


@pytest.fixture
def serve(make_policy):
    """A function that starts a stand-in for a vLLM server of the policy's architecture."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(vllm_standin.installed())
        yield lambda **options: stack.enter_context(vllm_standin.Server(make_policy(), **options))


def recorded(trainer):
    """Trains; the policy that each iteration started with, and its rollout."""
    policies, rollouts, collect = [], [], trainer.collect

    def record(*given):
        policies.append(copy.deepcopy(trainer.actor_critic.policy))
        rollout, seconds = collect(*given)
        rollouts.append(rollout)
        return rollout, seconds

    trainer.collect = record
    trainer.train()
    return policies, rollouts


@torch.no_grad()
def logprobs(policy, rollout):
    return rollout.per_token(target_logprobs(policy.eval(), *rollout.model_inputs(), 1.0))


def test_completions_are_those_of_the_policy_before_the_last_updates(make):
    trainer = make(**AHEAD | {"importance_sampling_cap": 1.01})
    policies, rollouts = recorded(trainer)
    for t, rollout in enumerate(rollouts):
        drew, learns = policies[max(t - 1, 0)], policies[t]
        assert torch.allclose(rollout.sampled_logprobs, logprobs(drew, rollout), atol=1e-4)
        assert torch.allclose(rollout.logprobs, logprobs(learns, rollout), atol=1e-4)
        row, lag = logged(trainer)[t], rollout.sampled_logprobs - rollout.logprobs
        assert (lag.abs().max() > 0.01) == (t > 0)
        assert row["sampling/kl"] == pytest.approx(lag.sum().item() / 4, abs=1e-5)
        capped = (-lag)[rollout.mask] > math.log(1.01) + 0.05
        assert row["sampling/importance_sampling_capped"] == pytest.approx(capped.float().mean().item(), abs=1e-6)
        assert (row["sampling/importance_sampling_capped"] > 0) == (t > 0)
        assert row["val/first_ratio_error"] < 1e-5
    assert trainer.drawing.ahead is None  # nothing is drawn for an iteration that does not come


def test_the_first_iteration_is_that_of_a_run_which_draws_in_time(make):
    ahead, in_time = make("ahead", **AHEAD), make("in time", importance_sampling_cap=2.0)
    for trainer in (ahead, in_time):
        trainer.train()
    first, second = (logged(trainer) for trainer in (ahead, in_time))
    assert first[0] == second[0]
    assert first[1] != second[1]


def test_with_weights_that_stand_still_drawing_ahead_changes_nothing(make):
    trainers = [make(folder, learning_rate=1e-30, **options) for folder, options in (
        ("ahead", AHEAD), ("in time", {"importance_sampling_cap": 2.0}))]  # fmt: skip
    (_, ahead), (_, in_time) = (recorded(trainer) for trainer in trainers)
    assert all(torch.equal(a.completion_ids, b.completion_ids) for a, b in zip(ahead, in_time, strict=True))


def test_by_a_server_it_draws_with_the_present_policy(make, serve):
    trainer = make(server=serve(), eval_dataset=ROWS.select(range(3)), eval_steps=2)
    policies, rollouts = recorded(trainer)
    assert len(rollouts) == 4 + 3
    for policy, rollout in zip(policies, rollouts, strict=True):
        assert torch.allclose(rollout.sampled_logprobs, logprobs(policy, rollout), atol=1e-4)
    assert not torch.equal(rollouts[1].completion_ids, rollouts[2].completion_ids)


def test_the_server_draws_while_the_policy_learns(make, serve, monkeypatch):
    learning, waited, update = threading.Event(), [], module.update

    def before_completing():
        waited.append(len(waited) < 4 or learning.wait(5))  # the first iteration's are waited for

    monkeypatch.setattr(module, "update", lambda *given, **options: learning.set() or update(*given, **options))
    make(server=serve(before_completing=before_completing), total_episodes=8, **AHEAD).train()
    assert waited == [True] * 8


@pytest.mark.parametrize("by_server", [False, True])
def test_what_dies_with_a_process_is_drawn_again_to_the_bit(make, serve, monkeypatch, by_server):
    """Killed while it learns in the third iteration, what is drawn for the fourth goes with it."""

    def build(folder):
        return make(folder, serve() if by_server else None, save_steps=1, **AHEAD)

    whole = build("whole")
    whole.train()
    first, update = build("parts"), module.update

    def die(*given, **options):
        if first.iteration == 2:
            assert first.drawing.under_way is not None
            raise RuntimeError("killed")
        return update(*given, **options)

    monkeypatch.setattr(module, "update", die)
    with pytest.raises(RuntimeError, match="killed"):
        first.train()
    monkeypatch.setattr(module, "update", update)
    torch.manual_seed(99)
    second = build("parts")
    second.train(resume_from_checkpoint=True)
    assert torch.equal(state(second), state(whole))
    assert logged(second) == logged(whole)


def test_completions_drawn_for_other_prompts_are_refused(make):
    stops = iter([False, True])
    first = make(**AHEAD, stop_requested=lambda: next(stops))
    with pytest.raises(Interrupted):
        first.train()
    for changes in ({"seed": 1}, {"rollout_batch_size": 2, "total_episodes": 8}):
        with pytest.raises(BadInput, match="completions of other prompts, drawn one step off-policy"):
            make(**AHEAD | changes).train(resume_from_checkpoint=True)


def test_a_server_that_fails_ends_the_run_with_the_last_good_checkpoint(make, serve):
    server, calls = serve(), []

    def reward(prompts, completions):
        calls.append(1)
        server.settings["room"] = 10**6 if len(calls) < 2 else 1
        return [0.0] * len(prompts)

    ahead = make(server=server, reward=reward, save_steps=1, **AHEAD)
    with pytest.raises(
        BadInput, match=r"iteration \d: the vLLM server .*did not complete.*last good checkpoint is .*step-"
    ):
        ahead.train()
    server.settings["room"] = 10**6
    calls.clear()
    in_time = make("in time", server=server, reward=reward, save_steps=1)
    with pytest.raises(BadInput, match=r"iteration 3: the vLLM server .*did not complete.*step-000002"):
        in_time.train()
