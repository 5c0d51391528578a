"""The PPO stage at nano size: from a model and a reward to a policy and a critic, resumed when stopped."""

import json

import ppo
import pytest
from ppo import PPOStageConfig, main
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from lmkit.config import load
from lmkit.errors import BadInput, Interrupted
from lmkit.models.load import load_reward_model
from lmkit.rl.config import PPOConfig
from lmkit.stage import Stage, read_record

NANO = {"total_episodes": 24, "rollout_batch_size": 8, "num_ppo_epochs": 1, "max_new_tokens": 8, "eval_steps": 2}
NO_GUARDS = {"guard_min_eos_rate": None, "guard_min_entropy": None}  # an untrained model never stops


@pytest.fixture(scope="module")
def reward_directory(nano, tmp_path_factory):
    """The untrained language model with a head that is not zero."""
    folder = tmp_path_factory.mktemp("reward") / "model"
    model, tokenizer = load_reward_model(nano / "model")
    model.score.weight.data.fill_(0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def config(nano, reward, directory, **changes):
    train = PPOConfig(**(ppo.TRAIN.model_dump() | NANO | NO_GUARDS | changes.pop("train", {})))
    names = {"prompts": "prompts.train", "eval_prompts": "prompts.heldout"}
    paths = {field: str(nano / f"{name}.jsonl") for field, name in names.items()}
    given = {"output_dir": directory, "model": nano / "model", "reward": str(reward), "num_eval_prompts": 4}
    return PPOStageConfig(**(given | paths | {"train": train} | changes))


def rows(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_model_and_critic_are_ordinary_directories_and_gold_is_watched(nano, reward_directory, tmp_path, capsys):
    directory = main(config(nano, reward_directory, tmp_path / "ppo"))
    AutoModelForCausalLM.from_pretrained(directory / "model")
    assert AutoModelForSequenceClassification.from_pretrained(directory / "value").config.num_labels == 1
    logged = rows(directory)
    assert [row["step"] for row in logged] == [0, 1, 2, 3]
    assert ["eval/gold" in row for row in logged] == [True, False, True, True]
    assert max(row.get("val/first_ratio_error", 0) for row in logged) < 1e-4
    assert read_record(directory)["metrics"]["objective/scores"] == logged[-1]["objective/scores"]
    said = capsys.readouterr().out
    assert "prompts: 12 rows, 0 duplicates, 6 held out rows, 0 held out in train" in said
    assert "3 iterations of 8 completions and 1 x 2 updates, shared critic" in said
    assert sum(read_record(directory)["metrics"]["rows/length_histogram"].values()) == 12
    assert "first mini-batch's log ratio at most" in said
    assert "sample: " in said
    assert main(config(nano, reward_directory, tmp_path / "ppo")) == directory
    assert "skipped" in capsys.readouterr().out


def test_a_signal_leaves_a_stage_that_goes_on_where_it_stopped(nano, reward_directory, tmp_path, monkeypatch):
    whole = main(config(nano, reward_directory, tmp_path / "whole"))
    with monkeypatch.context() as patch:
        answers = iter([False, True])
        patch.setattr(Stage, "stop_requested", lambda self: next(answers))
        with pytest.raises(Interrupted, match="stopped after iteration 2 of 3"):
            main(config(nano, reward_directory, tmp_path / "parts"))
    parts = main(config(nano, reward_directory, tmp_path / "parts"))
    weights = [(folder / "model/model.safetensors").read_bytes() for folder in (whole, parts)]
    assert weights[0] == weights[1]


def test_prompts_that_are_not_tales_have_no_gold_and_a_function_may_be_the_reward(nano, tmp_path, monkeypatch):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Say a number."}\n' * 3)
    (tmp_path / "short_rewards.py").write_text("def short(prompts, completions): return [-len(c) for c in completions]")
    monkeypatch.syspath_prepend(tmp_path)
    prompts = {name: str(tmp_path / "prompts.jsonl") for name in ("prompts", "eval_prompts")}
    directory = main(config(nano, "short_rewards:short", tmp_path / "ppo", **prompts))
    assert not any("eval/gold" in row for row in rows(directory))
    assert all("eval/score" in row for row in rows(directory) if row["step"] != 1)


def test_adapters_text_to_mix_in_and_no_critic_by_flags(nano, reward_directory, tmp_path, capsys):
    """The flags of a stranger: LoRA and PPO-ptx on demonstrations; then RLOO, which leaves no value model."""
    (tmp_path / "text.jsonl").write_text('{"prompt": "Say a number.", "completion": "seven"}\n' * 3)
    changes = {"lora": {"r": 4}, "ptx": str(tmp_path / "text.jsonl"), "train": {"ptx_coef": 0.1}}
    directory = main(config(nano, reward_directory, tmp_path / "lora", **changes))
    saved = AutoModelForCausalLM.from_pretrained(directory / "model")
    assert not any("lora" in name for name in saved.state_dict())
    assert all(row["loss/ptx"] > 0 for row in rows(directory)[1:])
    directory = main(config(nano, reward_directory, tmp_path / "rloo", train={"advantage_estimator": "rloo"}))
    assert (directory / "model").is_dir()
    assert not (directory / "value").exists()
    assert "1 x 2 updates, no critic" in capsys.readouterr().out
    with pytest.raises(BadInput, match="load_in_4bit is not for PPO"):
        load(PPOStageConfig, ["--lora.r", "4", "--lora.load_in_4bit", "true"])


def test_without_held_out_prompts_samples_come_from_training(nano, reward_directory, tmp_path):
    directory = main(config(nano, reward_directory, tmp_path / "ppo", eval_prompts=None))
    assert not any(key.startswith("eval/") for row in rows(directory) for key in row)
    assert "completion" in (directory / "samples.jsonl").read_text()


def test_what_cannot_work_is_bad_input(nano, reward_directory, tmp_path):
    with pytest.raises(BadInput, match="Did you mean kl_coef"):
        load(PPOStageConfig, ["--train.kl_coeff", "0.1"])
    with pytest.raises(BadInput, match=r"num_mini_batches 9 is more than rollout_batch_size 8"):
        load(PPOStageConfig, ["--train.num_mini_batches", "9", "--train.rollout_batch_size", "8"])
    with pytest.raises(BadInput, match="leave no room for max_new_tokens 255"):
        main(config(nano, reward_directory, tmp_path / "ppo", train={"max_new_tokens": 255}))


def test_a_flag_changes_one_option_and_leaves_the_others():
    changed = load(PPOStageConfig, ["--train.learning_rate", "1e-5"]).train
    assert changed == ppo.TRAIN.model_copy(update={"learning_rate": 1e-5})
