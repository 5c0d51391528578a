"""The chain of tales on models of lmkit's own, from text to a report; and pretraining by other objectives."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict
from transformers import AutoModelForCausalLM

from lmkit.artifact import seal
from lmkit.config import validate
from lmkit.errors import BadInput, Interrupted
from lmkit.models.language_model import auto_class
from lmkit.models.presets import ModelConfig, build_model
from lmkit.stage import Stage, read_record
from lmkit.tokenization.read import load_tokenizer

ROOT = Path(__file__).parents[2]
BLOCK = {"positions": "alibi", "norm_placement": "sandwich", "norm": "layernorm"}
MODELS = {"lstm": {"arch": "lstm"}, "transformer": {"arch": "transformer", "block": BLOCK}}


@pytest.fixture
def write_fresh(nano, tmp_path):
    """A function that writes a model of the nano size that has learnt nothing to tmp_path/model, and gives it."""

    def write(context_length, **options):
        torch.manual_seed(0)
        tokenizer = load_tokenizer(nano / "model")
        config = validate(ModelConfig, {"preset": "nano", "context_length": context_length} | options)
        fresh = build_model(config, tokenizer)
        for part in (fresh, tokenizer):
            part.save_pretrained(tmp_path / "model")
        return fresh

    return write


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_the_whole_chain_runs(name, tmp_path):
    command = [sys.executable, "recipes/rlhf.py", "--config", "recipes/configs/nano/rlhf.yaml", "--name", name]
    command += ["--runs_dir", str(tmp_path), "--pretrain.model.arch", name]
    command += ["--pretrain.model.block", json.dumps(MODELS[name].get("block", {}))]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-2000:]
    run = tmp_path / name
    assert (run / "report.html").is_file()
    assert read_record(run / "ppo")["metrics"]["val/first_ratio_error"] < 1e-4
    metrics = json.loads((run / "evaluation/results/metrics.json").read_text())
    assert {"kl/ppo", "bits_per_byte/sft", "gold/ppo"} <= set(metrics)
    kind = json.loads((run / "ppo/model/config.json").read_text())["model_type"]
    assert kind == {"lstm": "lmkit_recurrent", "transformer": "lmkit_transformer"}[name]


@pytest.mark.parametrize("name", MODELS)
def test_sft_reward_and_ppo_take_over_from_each_other(name, nano, tmp_path, write_fresh):
    """What the chain does, in one process and with a model that has learnt nothing."""
    import ppo
    import reward
    import sft

    fresh = write_fresh(256, **MODELS[name])
    few = {"max_steps": 2, "per_device_train_batch_size": 4, "logging_steps": 1, "eval_steps": 2, "save_steps": 2}
    settings = {"output_dir": tmp_path / "sft", "model": tmp_path / "model", "data": str(nano / "sft.jsonl")}
    sft.main(sft.SFTStageConfig(**settings, train=sft.TRAIN | few))
    with seal(tmp_path / "pairs") as staging:
        rows = [{"prompt": f"Is it {i}?", "chosen": "Yes, it is so.", "rejected": "No, it is not."} for i in range(40)]
        splits = {"train": Dataset.from_list(rows[:32]), "heldout": Dataset.from_list(rows[32:])}
        DatasetDict(splits).save_to_disk(staging)
    settings = {"output_dir": tmp_path / "reward", "model": tmp_path / "sft/model", "data": tmp_path / "pairs"}
    reward.main(reward.RewardStageConfig(**settings, train=reward.TRAIN | few | {"max_steps": 12}))
    assert read_record(tmp_path / "reward")["metrics"]["accuracy"] == 1
    settings = {"output_dir": tmp_path / "ppo", "model": tmp_path / "sft/model", "num_eval_prompts": 2}
    settings |= {"reward": str(tmp_path / "reward/model"), "prompts": str(nano / "prompts.train.jsonl")}
    train = {"total_episodes": 16, "rollout_batch_size": 8, "max_new_tokens": 8, "eval_steps": 2, "num_ppo_epochs": 1}
    train |= {"guard_min_eos_rate": None, "guard_min_entropy": None}
    train = ppo.PPOConfig(**(ppo.TRAIN.model_dump() | train))
    directory = ppo.main(ppo.PPOStageConfig(**settings, eval_prompts=str(nano / "prompts.heldout.jsonl"), train=train))
    assert read_record(directory)["metrics"]["val/first_ratio_error"] < 1e-4
    policy, before = (AutoModelForCausalLM.from_pretrained(path / "model") for path in (directory, tmp_path / "sft"))
    assert type(policy) is type(fresh)
    moved = [not torch.equal(a, b) for a, b in zip(policy.parameters(), before.parameters())]
    assert all(moved)


OBJECTIVES = {
    "masked": {"arch": "transformer", "block": {"causal": False}},
    "span_corruption": {"arch": "transformer", "block": {"num_encoder_layers": 1}},
    "prefix": {"arch": "transformer"},
    "prefix, read by an encoder": {"arch": "transformer", "block": {"num_encoder_layers": 1}},
    "next_token, both ways": {"arch": "elmo"},
    "next_token, by a state": {"arch": "lstm", "bptt_tokens": 24},
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_pretraining_by_another_objective_stops_and_goes_on_with_the_same_bits(
    nano, tmp_path, name, capsys, monkeypatch
):
    import pretrain

    train = {"max_steps": 4, "warmup_steps": 1, "per_device_train_batch_size": 4, "logging_steps": 2, "eval_steps": 4}
    settings = {"shards": nano / "shards", "tokenizer": nano / "model", "validation_tokens": 600, "ngram_orders": [3]}
    settings |= {"objective": name.split(",")[0], "model": {"preset": "nano", "context_length": 96} | OBJECTIVES[name]}
    settings |= {"train": train, "packing": "stream"}
    run = lambda folder: pretrain.main(validate(pretrain.PretrainConfig, settings | {"output_dir": tmp_path / folder}))  # noqa: E731
    whole = run("whole")
    with monkeypatch.context() as patch:
        answers = iter([False, True])
        patch.setattr(Stage, "stop_requested", lambda self: next(answers))
        with pytest.raises(Interrupted, match="step 2"):
            run("parts")
    parts = run("parts")
    weights = [(folder / "model/model.safetensors").read_bytes() for folder in (whole, parts)]
    assert weights[0] == weights[1]
    metrics, asked = read_record(whole)["metrics"], name.startswith(("masked", "span", "prefix, "))
    assert ("eval/bits_per_byte" in metrics) != asked
    assert metrics["eval/nats_per_token"] > 1
    assert ("nats for each token asked for" in capsys.readouterr().out) == asked


@pytest.mark.parametrize("name", ["masked", "span_corruption"])
def test_a_model_that_writes_no_text_is_gone_on_with(nano, tmp_path, name, write_fresh):
    import pretrain

    fresh = write_fresh(96, **OBJECTIVES[name])
    train = {"max_steps": 1, "warmup_steps": 0, "per_device_train_batch_size": 2, "optim": "adamw_torch_fused"}
    settings = {"shards": nano / "shards", "tokenizer": nano / "model", "validation_tokens": 300, "train": train}
    settings |= {
        "model": {"preset": "nano", "context_length": 96},
        "init_from": str(tmp_path / "model"),
        "packing": "stream",
    }
    settings |= {"lora": {"r": 4}, "output_dir": tmp_path / "more"}
    with pytest.raises(BadInput, match="Use objective"):
        pretrain.main(validate(pretrain.PretrainConfig, settings))
    folder = pretrain.main(validate(pretrain.PretrainConfig, settings | {"objective": name}))
    after = auto_class(fresh.config).from_pretrained(folder / "model")
    moved = {n for n, p in after.named_parameters() if not torch.equal(p, fresh.get_parameter(n))}
    assert moved == {n for n, _ in after.named_parameters() if n.endswith("_proj.weight")}


def test_a_pretraining_that_cannot_work_is_refused_before_it_starts():
    command = [sys.executable, "recipes/pretrain.py", "--objective", "span_corruption"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert process.returncode == 2
    assert "an encoder reads the text with its gaps" in process.stderr
    assert "--model.block.num_encoder_layers 4" in process.stderr
