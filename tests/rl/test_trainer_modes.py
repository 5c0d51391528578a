"""Every mode of the trainer stops and goes on to the bit, and does what its option says."""

import copy

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from lmkit.data.encode import encode_demonstrations
from lmkit.errors import BadInput, Interrupted
from lmkit.rl.config import PPOConfig
from lmkit.rl.ptx import Demonstrations
from lmkit.rl.trainer import PPOTrainer
from lmkit.training import checkpoint
from tests.rl.runs import logged, state

ROWS = Dataset.from_dict({"prompt": [" ".join(f"w{(i * k) % 20}" for k in range(1, 3 + i % 4)) for i in range(10)]})
HELD = Dataset.from_dict({"prompt": ["w1 w2", "w3", "w4 w5 w6"]})
TEXT = [{"prompt": f"w{i}", "completion": f"w{i + 1} w{i + 2} w{i}"} for i in range(5)]


@pytest.fixture
def make(make_policy, tokenizer, tmp_path):
    def build(folder="run", rows=ROWS, model=None, reward=None, **options):
        names = ("eval_dataset", "ref_model", "peft_config", "ptx_dataset", "stop_requested", "seed", "say")
        given = {name: options.pop(name) for name in names if name in options}
        base = {"total_episodes": 32, "rollout_batch_size": 8, "num_mini_batches": 2, "num_ppo_epochs": 2}
        base |= {"max_new_tokens": 6, "learning_rate": 1e-2, "temperature": 1.0, "eval_steps": 2}
        return PPOTrainer(
            make_policy() if model is None else model,
            reward or (lambda prompts, completions: [float(len(set(c))) for c in completions]),
            PPOConfig(**(base | options)),
            rows,
            processing_class=tokenizer,
            output_dir=tmp_path / folder,
            **({"say": lambda text: None} | given),
        )

    return build


@pytest.fixture
def text(tokenizer):
    return encode_demonstrations(Dataset.from_list(TEXT), tokenizer, 64)[0]


MODES = {
    "rloo": {"advantage_estimator": "rloo", "num_generations": 2},
    "moving reference": {"ref_model_mixup_alpha": 0.3},
    "lora": {"peft_config": LoraConfig(r=4, target_modules="all-linear")},
    "lora, own critic": {"peft_config": LoraConfig(r=4, target_modules="all-linear"), "critic": "separate"},
    "bootstrap": {"truncation": "bootstrap", "missing_eos_penalty": 0.0},
    "mask, target_kl, k2 in the loss": {
        **{"truncation": "mask", "missing_eos_penalty": 0.0, "target_kl": 0.01},
        **{"kl_placement": "loss", "kl_estimator": "k2", "adaptive_kl_target": 0.05},
    },
    "ptx": {"ptx_coef": 0.5},
    "one step off-policy": {"one_step_off_policy": True, "importance_sampling_cap": 2.0},
}


@pytest.mark.parametrize("mode", MODES)
def test_four_iterations_are_two_and_a_resumed_two_to_the_bit(make, text, mode):
    def build(folder, **more):
        options = copy.deepcopy(MODES[mode]) | ({"ptx_dataset": text} if mode == "ptx" else {})
        return make(folder, eval_dataset=HELD, **options, **more)

    whole = build("whole")
    start = state(whole)
    whole.train()
    stop = iter([False, True])
    with pytest.raises(Interrupted, match="stopped after iteration 2 of 4"):
        build("parts", stop_requested=lambda: next(stop)).train()
    torch.manual_seed(99)
    second = build("parts")
    second.train(resume_from_checkpoint=True)
    assert torch.equal(state(second), state(whole))
    assert not torch.equal(state(whole), start)
    assert second.kl_coef == whole.kl_coef
    assert logged(second) == logged(whole)
    moments = [t.optimizer.state_dict()["state"] for t in (second, whole)]
    assert all(torch.equal(a[k], b[k]) for a, b in zip(*(m.values() for m in moments)) for k in a)


def test_a_checkpoint_of_adapters_holds_no_base_and_is_refused_by_another_mode(make):
    trainer = make(total_episodes=8, **copy.deepcopy(MODES["lora"]))
    trainer.train()
    path = trainer.output_dir / "checkpoints" / "step-000001"
    names = checkpoint.load(path)[0]["model"]
    assert names
    assert all("lora_" in name or name == "critic.weight" for name in names)
    with pytest.raises(BadInput, match="is of a run with other trained tensors"):
        make("other").train(resume_from_checkpoint=path)


def test_the_reference_moves_its_share_of_the_way_after_each_iteration(make, make_policy):
    start = make_policy()
    trainer = make(ref_model_mixup_alpha=0.25, total_episodes=8)
    trainer.train()
    for first, own, policy in zip(
        start.parameters(), trainer.roles.reference.parameters(), trainer.actor_critic.policy.parameters()
    ):
        assert torch.allclose(own, 0.75 * first + 0.25 * policy, atol=1e-6)
        assert not own.requires_grad


def test_rloo_draws_several_completions_of_each_prompt_and_has_no_critic(make, tmp_path):
    seen = []

    def reward(prompts, completions):
        seen.append((prompts, completions))
        return [float(len(c)) for c in completions]

    trainer = make(advantage_estimator="rloo", total_episodes=16, reward=reward)
    trainer.train()
    prompts, completions = seen[0]
    assert [prompts[4 * i : 4 * i + 4] for i in range(2)] == [[prompts[4 * i]] * 4 for i in range(2)]
    assert len(set(completions)) > 2  # completions of one prompt differ
    assert seen[0][0][0] != seen[1][0][0]
    assert trainer.actor_critic.critic is None
    assert not {"val/explained_var", "critic_lr"} & logged(trainer)[-1].keys()
    with pytest.raises(BadInput, match="no critic with advantage_estimator rloo"):
        trainer.save_value_model(tmp_path / "value")


def test_evaluation_starts_even_with_the_reference_and_says_what_was_won(make):
    trainer = make(
        eval_dataset=HELD,
        reward=lambda prompts, completions: [float(c.count("w3")) for c in completions],
        total_episodes=8 * 20,
        missing_eos_penalty=0.0,
        kl_coef=0.0,
    )
    trainer.train()
    rows = [row for row in logged(trainer) if "eval/score" in row]
    assert rows[0]["eval/win_rate_vs_ref"] == 0.5
    assert rows[0]["eval/score_gain"] == 0.0
    assert rows[-1]["eval/win_rate_vs_ref"] > 0.5
    assert rows[-1]["eval/score_gain"] == pytest.approx(rows[-1]["eval/score"] - rows[0]["eval/score"])


@pytest.mark.parametrize(("kind", "num_rows"), [("truncate", 3), ("drop", 2)])
def test_long_prompts_are_cut_at_their_start_or_left_out_and_counted(make, kind, num_rows):
    said = []
    rows = Dataset.from_dict({"prompt": ["w1", "w2 " * 200 + "w7", "w3"]})
    trainer = make(rows=rows, long_prompts=kind, say=said.append)
    assert "1 of 3 prompts leave no room for max_new_tokens 6" in said[0]
    assert len(trainer.train_prompts.ids) == len(trainer.train_prompts.rows) == num_rows
    assert max(map(len, trainer.train_prompts.ids)) <= 128 - 6
    if kind == "truncate":
        assert len(trainer.train_prompts.ids[1]) == 122
        assert trainer.train_prompts.ids[1][-3:] == trainer.train_prompts.ids[0][-3:]  # the header of the answer
    trainer.train()


def test_all_prompts_too_long_is_an_error_also_where_they_may_go(make):
    with pytest.raises(BadInput, match="1 of 1 prompts leave no room"):
        make(rows=Dataset.from_dict({"prompt": ["w2 " * 200]}), long_prompts="drop")


def test_text_to_mix_in_and_its_weight_come_together(make, text):
    with pytest.raises(BadInput, match=r"ptx_coef is 0\.5 and no ptx_dataset is given"):
        make(ptx_coef=0.5)
    with pytest.raises(BadInput, match=r"ptx_coef is 0\.0 and a ptx_dataset is given"):
        make(ptx_dataset=text)
    with pytest.raises(BadInput, match=r"ptx_dataset has 10 rows of \['prompt'\]; wanted rows with input_ids"):
        make(ptx_coef=0.5, ptx_dataset=ROWS)


def test_demonstrations_count_completions_alone_and_predict_the_next_token(text):
    batch = Demonstrations(text).fetch(torch.arange(2).numpy())
    for row in range(2):
        counts = batch["labels"][row] != -100
        ids, labels = text[row]["input_ids"], text[row]["labels"]
        assert batch["input_ids"][row, : len(ids) - 1].tolist() == ids[:-1]
        assert batch["labels"][row][counts].tolist() == [label for label in labels if label != -100]
        assert batch["labels"][row, : len(ids) - 1].tolist() == labels[1:]


def test_a_model_may_be_a_directory_and_what_is_missing_is_named(policy, tokenizer, tmp_path, monkeypatch):
    policy.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    reward = lambda prompts, completions: [float(len(c)) for c in completions]  # noqa: E731
    options = PPOConfig(total_episodes=2, rollout_batch_size=2, max_new_tokens=4)
    trainer = PPOTrainer(str(tmp_path / "model"), reward, options, ROWS, say=lambda text: None)
    trainer.train()
    trainer.save_model()
    assert (tmp_path / "trainer_output" / "model" / "tokenizer_config.json").is_file()
    with pytest.raises(BadInput, match="PPOTrainer needs a train_dataset"):
        PPOTrainer(policy, reward, processing_class=tokenizer)
    with pytest.raises(BadInput, match="PPOTrainer needs a processing_class"):
        PPOTrainer(policy, reward, train_dataset=ROWS)
    with pytest.raises(BadInput, match="ref_model is the model itself"):
        PPOTrainer(policy, reward, options, ROWS, processing_class=tokenizer, ref_model=policy)


def test_gradient_checkpointing_changes_no_bit(make):
    trainers = [make(folder, gradient_checkpointing=flag, total_episodes=8) for folder, flag in (("a", 0), ("b", 1))]
    for trainer in trainers:
        trainer.train()
    assert torch.equal(*(state(trainer) for trainer in trainers))
    assert [trainer.actor_critic.policy.is_gradient_checkpointing for trainer in trainers] == [False, True]


def test_final_values_are_the_critics_after_the_last_token_of_what_was_cut_off(make, policy):
    trainer = make(truncation="bootstrap", missing_eos_penalty=0.0, per_device_train_batch_size=3)
    torch.nn.init.normal_(trainer.actor_critic.critic.weight)
    rollout, _ = trainer.collect(trainer.train_prompts, range(10), "sampling")
    assert 0 < rollout.stopped.sum() < 10
    for row in range(10):
        ids = trainer.train_prompts.ids[row] + rollout.completion_ids[row, : rollout.completion_lengths[row]].tolist()
        with torch.no_grad():
            hidden = trainer.actor_critic.policy.base_model(input_ids=torch.tensor([ids])).last_hidden_state
            value = trainer.actor_critic.critic(hidden)[0, -1]
        assert rollout.final_values[row].item() == pytest.approx(
            0.0 if rollout.stopped[row] else value.item(), abs=1e-5
        )
