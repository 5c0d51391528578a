"""The trainer with its rewards and its sampler: what several rewards, stop strings and another engine do to a run."""

import copy

import pytest
import torch
from datasets import Dataset

from lmkit.errors import BadInput, Interrupted
from lmkit.generation.sampler import sample
from lmkit.rl import drawing as module
from lmkit.rl.config import PPOConfig
from lmkit.rl.losses import importance_weights
from lmkit.rl.trainer import PPOTrainer
from lmkit.stage import latest_checkpoint
from tests.rl.runs import logged, state

ROWS = [{"prompt": f"w{i} w{(3 * i) % 20}", "wanted": f"w{i % 5}"} for i in range(10)]
OPTIONS = {"rollout_batch_size": 8, "per_device_train_batch_size": 3, "num_ppo_epochs": 1, "num_mini_batches": 2}
OPTIONS |= {"learning_rate": 1e-2, "max_new_tokens": 6, "temperature": 1.0, "kl_coef": 0.1}


def count_wanted(prompts, completions, wanted):
    return [float(c.count(w)) for c, w in zip(completions, wanted)]


def hundreds(prompts, completions, wanted):
    return [100.0 + 50 * len(c) for c in completions]


@pytest.fixture
def make(policy, make_policy, tokenizer, tmp_path):
    def build(folder="run", iterations=2, reward=count_wanted, stop_requested=lambda: False, **options):
        return PPOTrainer(
            make_policy(),
            reward=reward,
            args=PPOConfig(total_episodes=8 * iterations, **(OPTIONS | options)),
            train_dataset=Dataset.from_list(ROWS),
            processing_class=tokenizer,
            output_dir=tmp_path / folder,
            stop_requested=stop_requested,
            say=lambda text: None,
        )

    return build


def test_normalised_scores_are_learnt_from_and_raw_ones_shown(make):
    plain = make("plain", reward=hundreds)
    scaled = make("scaled", reward=hundreds, use_score_norm=True, score_clip=1.0)
    plain.train(), scaled.train()
    assert logged(plain)[0]["objective/scores"] == logged(scaled)[0]["objective/scores"] >= 100
    assert logged(scaled)[0]["loss/value_avg"] < 10 < 100 < logged(plain)[0]["loss/value_avg"]


def test_running_statistics_are_resumed_to_the_bit(make):
    options = {"iterations": 4, "reward": [hundreds, count_wanted], "use_score_norm": True, "score_clip": 1.0}
    whole = make("whole", **options)
    whole.train()
    stop = iter([False, True])
    with pytest.raises(Interrupted):
        make("parts", stop_requested=lambda: next(stop), **options).train()
    second = make("parts", **options)
    second.train(resume_from_checkpoint=True)
    assert second.score_norm.state() == whole.score_norm.state()
    assert second.score_norm.count == 4 * 8
    assert torch.equal(state(second), state(whole))


def test_several_rewards_are_each_reported(make):
    drawn = []

    def recorded(prompts, completions, wanted):
        drawn.append(completions)
        return hundreds(prompts, completions, wanted)

    trainer = make(reward=[count_wanted, recorded], reward_weights=[2.0, 0.0])
    trainer.train()
    last = logged(trainer)[-1]
    assert last["objective/scores"] == pytest.approx(2 * last["reward/count_wanted_mean"])
    own = torch.tensor([100.0 + 50 * len(completion) for completion in drawn[-1]])
    name = recorded.__qualname__
    assert last[f"reward/{name}_mean"] == pytest.approx(own.mean().item())
    assert own.std() > 0
    assert last[f"reward/{name}_std"] == pytest.approx(own.std(correction=0).item(), rel=1e-4)


def test_a_reward_that_breaks_later_loses_no_iteration(make):
    calls = []

    def breaks(prompts, completions, wanted):
        calls.append(None)
        return [1.0] * 8 if len(calls) < 3 else ["one"] * 8

    trainer = make(reward=breaks, iterations=4, save_steps=100)
    with pytest.raises(BadInput, match=r"iteration 3: .*breaks returned .one. for row 0.*step-000002"):
        trainer.train()
    assert latest_checkpoint(trainer.output_dir / "checkpoints").name == "step-000002"
    before = state(trainer)
    again = make(iterations=4)
    again._load(True)
    assert again.iteration == 2
    assert torch.equal(state(again), before)


def test_a_stop_string_ends_completions_and_is_not_shown_to_the_reward(make):
    shown = []

    def look(prompts, completions, wanted):
        shown.extend(completions)
        return [0.0] * len(completions)

    trainer = make(reward=look, stop_strings=["w1"], iterations=1)
    trainer.train()
    free = make("free", reward=look, iterations=1)
    texts = list(shown)
    free.train()
    assert any("w1" in text for text in shown[8:])
    assert not any("w1" in text for text in texts)
    assert texts == [text.split("w1")[0] for text in shown[8:]]
    assert logged(trainer)[0]["rollout/eos_rate"] > logged(free)[0]["rollout/eos_rate"]


def test_another_engines_mismatch_is_measured_and_weighed(make, monkeypatch):
    """An engine that samples at another temperature than it is asked for, and says so in its log-probabilities."""

    class Engine:
        def __init__(self, model, tokenizer, **options):
            assert options == {"gpu_memory_utilization": 0.5, "sleep": True}

        def sample(self, model, prompts, **options):
            return sample(model, prompts, **options | {"temperature": 1.3})

    monkeypatch.setattr(module, "VLLMSampler", Engine)
    options = {"use_vllm": True, "vllm_gpu_memory_utilization": 0.5, "importance_sampling_cap": 50.0}
    trainer = make(**options)
    rollout, _ = trainer.collect(trainer.train_prompts, [i % 10 for i in range(2000)], "sampling")
    weights = importance_weights(rollout.logprobs[:, 0], rollout.sampled_logprobs[:, 0], cap=50.0)
    assert weights.std() > 0.1
    assert weights.mean() == pytest.approx(1, abs=4 * weights.std().item() / 2000**0.5)
    metrics = trainer.train()
    assert metrics["sampling/logprob_diff_mean"] > 0.05
    assert metrics["val/first_ratio_error"] < 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_vllm": True}, "use_vllm without importance_sampling_cap"),
        ({"reward_weights": [1.0], "reward_aggregation": "min"}, "reward_weights and reward_aggregation min"),
    ],
)
def test_options_that_conflict_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        PPOConfig(**options)


def test_a_critic_is_not_started_from_a_model_of_another_vocabulary(make, reward_model, tokenizer, tmp_path):
    reward_model.save_pretrained(tmp_path / "model")
    own = copy.deepcopy(tokenizer)
    own.add_tokens(["w99"])
    own.save_pretrained(tmp_path / "model")
    make(reward=str(tmp_path / "model"))
    with pytest.raises(BadInput, match=r"critic is separate, but the reward model .* another vocabulary"):
        make("other", reward=str(tmp_path / "model"), critic="separate")
