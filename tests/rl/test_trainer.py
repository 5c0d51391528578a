import json

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from lmkit.errors import BadInput, Interrupted, Stopped
from lmkit.models.heads import ValueHead, token_scores
from lmkit.rl.actor_critic import target_logprobs
from lmkit.rl.config import PPOConfig
from lmkit.rl.trainer import PPOTrainer
from tests.rl.runs import logged, state

ROWS = [{"prompt": " ".join(f"w{(i * k) % 20}" for k in range(1, 3 + i % 4)), "wanted": f"w{i % 5}"} for i in range(10)]
OPTIONS = {"rollout_batch_size": 8, "per_device_train_batch_size": 3, "num_ppo_epochs": 2, "num_mini_batches": 2}
OPTIONS |= {"learning_rate": 1e-2, "max_new_tokens": 6, "temperature": 1.0, "kl_coef": 0.1}


def count_wanted(prompts, completions, wanted):
    return [float(c.count(w)) for c, w in zip(completions, wanted)]


@pytest.fixture
def make(make_policy, tokenizer, tmp_path):
    """A function that builds a trainer of `iterations` iterations in its own folder."""

    def build(folder="run", iterations=2, rows=ROWS, policy=None, reward=count_wanted, policy_options=(), **options):
        names = ("eval_dataset", "ref_model", "value_model", "peft_config", "ptx_dataset", "evaluation", "seed")
        names += ("stop_requested", "say")
        given = {name: options.pop(name) for name in names if name in options}
        return PPOTrainer(
            make_policy(**dict(policy_options)) if policy is None else policy,
            reward=reward,
            args=PPOConfig(total_episodes=8 * iterations, **(OPTIONS | options)),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            output_dir=tmp_path / folder,
            **({"say": lambda text: None} | given),
        )

    return build


def test_the_reward_rises(make):
    trainer = make(
        iterations=25,
        reward=lambda prompts, completions, wanted: [c.count("w3") for c in completions],
        missing_eos_penalty=0.0,
    )
    assert trainer.train()["objective/scores"] > 2 > 1 > logged(trainer)[0]["objective/scores"]


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_first_mini_batch_has_ratio_1_and_kl_is_0_at_the_start(make, reward_model, critic):
    """With dropout in the config, gradient checkpointing on, and micro-batches cut otherwise than the scoring."""
    trainer = make(reward=reward_model, critic=critic, iterations=3, policy_options={"attention_dropout": 0.3})
    trainer.actor_critic.policy.gradient_checkpointing_enable()
    trainer.train()
    rows = logged(trainer)
    assert max(row["val/first_ratio_error"] for row in rows) < 1e-5
    assert abs(rows[0]["objective/kl"]) < 1e-5
    assert rows[1]["objective/kl"] != 0
    assert max(row["sampling/logprob_diff_max"] for row in rows) < 1e-4


def test_first_ratio_in_bfloat16_stays_near_1(make):
    trainer = make(bf16=True)
    rollout, _ = trainer.collect(trainer.train_prompts, range(10), "sampling")
    with torch.no_grad():
        exact = target_logprobs(trainer.roles.reference, *rollout.model_inputs(), 1.0)
    assert 1e-3 < (rollout.logprobs[rollout.mask] - exact).abs().max() < 0.5
    assert torch.allclose(rollout.sampled_logprobs, rollout.logprobs, atol=0.1)
    implementations = []
    trainer.actor_critic.policy.base_model.register_forward_hook(
        lambda module, *_: implementations.append(module.config._attn_implementation)
    )
    trainer.train()
    # The faster attention, which knows no padding; the one for prompts of several lengths, and the one for decoding.
    assert set(implementations) == {"lmkit", "sdpa", "eager"}
    assert max(row["sampling/logprob_diff_max"] for row in logged(trainer)) < 0.1
    assert trainer.actor_critic.policy.config._attn_implementation == "sdpa"
    assert max(row["val/first_ratio_error"] for row in logged(trainer)) < 2e-2
    assert {p.dtype for p in trainer.actor_critic.parameters()} == {torch.float32}


def test_a_reward_model_computes_in_bfloat16_with_the_run_and_a_function_does_not(make, reward_model):
    seen = {}
    reward_model.base_model.register_forward_hook(lambda *_: seen.update(model=torch.is_autocast_enabled("cpu")))

    def count(prompts, completions, **columns):
        seen["function"] = torch.is_autocast_enabled("cpu")
        return [0.0] * len(completions)

    make(bf16=True, reward=[reward_model, count], iterations=1).train()
    assert seen == {"model": True, "function": False}


def test_four_iterations_are_two_and_a_resumed_two_to_the_bit(make, reward_model):
    held = Dataset.from_list(ROWS[:3])
    options = {
        "reward": reward_model,
        "critic": "separate",
        "adaptive_kl_target": 0.05,
        "eval_dataset": held,
        "eval_steps": 2,
    }
    whole = make("whole", iterations=4, **options)
    whole.train()
    stop = iter([False, True])
    first = make("parts", iterations=4, stop_requested=lambda: next(stop), **options)
    with pytest.raises(Interrupted, match="stopped after iteration 2 of 4, saved"):
        first.train()
    torch.manual_seed(99)  # a new process has another state of torch's generator
    second = make("parts", iterations=4, **options)
    metrics = second.train(resume_from_checkpoint=True)
    assert torch.equal(state(second), state(whole))
    assert second.kl_coef == whole.kl_coef != 0.1
    assert logged(second) == logged(whole)
    assert [row["step"] for row in logged(second)] == [0, 1, 2, 3, 4]
    samples = [(t.output_dir / "samples.jsonl").read_text() for t in (second, whole)]
    assert samples[0] == samples[1]
    optimizers = [t.optimizer.state_dict()["state"] for t in (second, whole)]
    assert all(torch.equal(a[k], b[k]) for a, b in zip(*(o.values() for o in optimizers)) for k in a)
    again = make("parts", iterations=4, **options)  # nothing is left to do: the last metrics are still there
    assert again.train(resume_from_checkpoint=True) == metrics
    assert again.samples == second.samples


def test_the_same_seed_gives_the_same_bits_and_another_does_not(make):
    trainers = [make(folder, seed=seed) for folder, seed in (("a", 0), ("b", 0), ("c", 1))]
    for trainer in trainers:
        trainer.train()
    first, second, other = (state(trainer) for trainer in trainers)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("num_rows", [1, 3, 8, 10])
def test_every_prompt_is_used_once_before_any_again(make, num_rows):
    """Fewer prompts than a rollout needs, as many, and more."""
    seen = []

    def reward(prompts, completions, wanted):
        seen.extend(prompts)
        return [0.0] * len(prompts)

    make(rows=ROWS[:num_rows], iterations=3, reward=reward).train()
    assert len(seen) == 24
    for start in range(0, 24 - num_rows, num_rows):
        assert len(set(seen[start : start + num_rows])) == num_rows


def test_evaluation_is_repeatable_and_gets_rows_and_texts(make):
    given = []

    def evaluation(rows, completions):
        given.append((rows, completions))
        return {"gold": float(len(completions))}

    trainer = make(eval_dataset=Dataset.from_list(ROWS[:4]), evaluation=evaluation)
    first = trainer.evaluate()
    assert first == trainer.evaluate()
    assert first["eval/gold"] == 4.0
    assert {"eval/score", "eval/kl", "eval/completion_length", "eval/eos_rate"} <= first.keys()
    assert given[0][0] == ROWS[:4]
    assert "<|im_end|>" not in " ".join(given[0][1])
    trainer.train()
    rows = logged(trainer)
    assert ["eval/gold" in row for row in rows] == [True, False, True]
    samples = [json.loads(line) for line in (trainer.output_dir / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in samples] == [0] * 4 + [2] * 4
    assert samples[0].keys() == {"step", "prompt", "completion", "score", "kl", "finish_reason"}


def test_conversations_are_prompts_and_completions_are_then_messages(make):
    seen = []

    def reward(prompts, completions, wanted):
        seen.extend(completions)
        return [0.0] * len(prompts)

    turns = [
        {"role": "user", "content": "w1"},
        {"role": "assistant", "content": "w2"},
        {"role": "user", "content": "w3"},
    ]
    make(rows=[{"prompt": turns, "wanted": "w1"}], iterations=1, reward=reward).train()
    assert all(message["role"] == "assistant" for completion in seen for message in completion)


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_saved_models_are_ordinary_directories(make, reward_model, tmp_path, critic):
    trainer = make(reward=reward_model, critic=critic, iterations=1)
    trainer.train()
    trainer.save_model(tmp_path / "model")
    trainer.save_value_model(tmp_path / "value")
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    value = AutoModelForSequenceClassification.from_pretrained(tmp_path / "value").eval()
    assert AutoTokenizer.from_pretrained(tmp_path / "model").chat_template
    assert AutoTokenizer.from_pretrained(tmp_path / "value").chat_template
    ids = torch.tensor([[21, 22, 23, 24]])
    own = trainer.actor_critic.eval()
    with torch.no_grad():
        assert torch.equal(policy(ids).logits, own.policy(ids).logits)
        everywhere = torch.ones_like(ids, dtype=torch.bool)
        values = own(ids, everywhere, ids[0], 1.0, False)[1]
        assert torch.allclose(token_scores(value, ids)[0], values, atol=1e-6)


def test_separate_critic_starts_as_the_reward_model_and_leaves_it_alone(make, reward_model):
    before = [p.clone() for p in reward_model.parameters()]
    trainer = make(reward=reward_model, critic="separate", iterations=1)
    assert torch.equal(trainer.actor_critic.critic.score.weight, reward_model.score.weight)
    trainer.train()
    assert all(torch.equal(a, b) for a, b in zip(before, reward_model.parameters()))
    assert not torch.equal(trainer.actor_critic.critic.score.weight, reward_model.score.weight)


def test_the_reference_stands_still_and_may_be_given(make, make_policy):
    other = make_policy(initializer_range=0.3)
    weights = [p.clone() for p in other.parameters()]
    trainer = make(ref_model=other, iterations=1)
    metrics = trainer.train()
    assert metrics["objective/kl"] > 0.1  # a policy that has not learnt yet is already far from another model
    assert all(torch.equal(a, b) for a, b in zip(weights, other.parameters()))


def test_pad_may_be_the_stop_token(make, tokenizer):
    """The stop token is inside the mask, the KL and what the reward model reads."""
    tokenizer.pad_token = "<|im_end|>"
    trainer = make(iterations=1)
    rollout, _ = trainer.collect(trainer.train_prompts, range(10), "sampling")
    stopped = rollout.stopped
    assert stopped.any()
    last = rollout.completion_ids.gather(1, rollout.completion_lengths[:, None] - 1).squeeze(1)
    assert set(last[stopped].tolist()) <= set(trainer.stop_token_ids)
    ends = rollout.logprobs.gather(1, rollout.completion_lengths[:, None] - 1).squeeze(1)
    assert (ends[stopped] < 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"guard_max_kl": 0.01},
            r"iteration \d+: KL .* above guard_max_kl 0.01; raise kl_coef\. The last good checkpoint",
        ),
        ({"guard_min_eos_rate": 1.0}, r"iteration 1: the share of ended completions .* guard_min_eos_rate"),
        ({"guard_min_entropy": 50.0}, r"iteration 1: entropy .* below guard_min_entropy.*No checkpoint was saved"),
    ],
)
def test_a_guard_stops_and_keeps_the_last_good_checkpoint(make, options, message):
    trainer = make(iterations=20, save_steps=1, **options)
    with pytest.raises(Stopped, match=message):
        trainer.train()
    saved = sorted((trainer.output_dir / "checkpoints").glob("step-*"))
    assert [path.name for path in saved][-1:] == [f"step-{trainer.iteration:06d}"] * (trainer.iteration > 0)


def test_what_looks_broken_is_said_once(make):
    said = []
    make(iterations=3, say=said.append, max_new_tokens=1).train()
    assert sum("completions never stop: raise max_new_tokens" in line for line in said) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": [{"text": "w1"}]}, r"train_dataset has 1 rows of \['text'\]; wanted rows with a column prompt"),
        (
            {"rows": [{"prompt": "w1 " * 200, "wanted": ""}]},
            "1 of 1 prompts leave no room for max_new_tokens 6 in.*128",
        ),
        ({"critic": "separate"}, "critic is separate, but the reward is no model"),
        ({"value_model": ValueHead(32)}, "value_model is given and critic is shared"),
        ({"eval_dataset": Dataset.from_dict({"question": ["w1"]})}, r"eval_dataset has 1 rows of \['question'\]"),
    ],
)
def test_what_cannot_work_is_refused_before_training(make, options, message):
    with pytest.raises(BadInput, match=message):
        make(**options)


@pytest.mark.parametrize("several", [False, True])
def test_a_critic_that_is_the_reward_model_itself_is_refused(make, reward_model, several):
    reward = [count_wanted, reward_model] if several else reward_model
    with pytest.raises(BadInput, match="value_model is the policy or a reward model itself"):
        make(reward=reward, value_model=reward_model, critic="separate")


def test_a_reward_is_given_plain_lists(make):
    """What a server is sent as JSON, and a tokenizer takes."""
    given = []

    def reward(prompts, completions, **columns):
        given.append(json.loads(json.dumps({"prompts": prompts, "completions": completions, **columns})))
        return [0.0] * len(prompts)

    make(iterations=1, reward=reward).train()
    assert all(
        row in ROWS for row in ({"prompt": p, "wanted": w} for p, w in zip(given[0]["prompts"], given[0]["wanted"]))
    )


def test_without_eval_dataset_there_is_nothing_to_evaluate(make):
    with pytest.raises(BadInput, match="no eval_dataset"):
        make().evaluate()


def test_a_failing_reward_loses_no_checkpoint(make):
    calls = []

    def reward(prompts, completions, wanted):
        calls.append(1)
        return [float("nan") if len(calls) == 3 else 0.0] * len(prompts)

    trainer = make(iterations=4, save_steps=1, reward=reward)
    with pytest.raises(BadInput, match="returned nan for row 0"):
        trainer.train()
    assert (trainer.output_dir / "checkpoints" / "step-000002").is_dir()


def test_learning_rates_follow_the_schedule(make):
    for kind, last in (("linear", 1e-2 / 8), ("constant", 1e-2)):
        trainer = make(kind, lr_scheduler_type=kind)
        trainer.train()
        assert logged(trainer)[-1]["lr"] == pytest.approx(last)
        assert logged(trainer)[-1]["critic_lr"] == pytest.approx(3 * last)
