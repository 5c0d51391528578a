"""Whole recipes, as they stand, in one process, in two, and sharded where they can be."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.faults.harness import ROOT
from tests.processes.worlds import recipe, with_deepspeed

# Newton-Schulz in bfloat16 makes 2^-9 of an update of the least difference; tests of the loop have it in float32.
MUON = 5e-3
STAGES = {"pretrain": (2, MUON), "sft": (2, 1e-5), "reward": (1, MUON)}


def close(found, wanted, tolerance):
    found, wanted = (load_file(folder / "model.safetensors") for folder in (found, wanted))
    if "lm_head.weight" in found.keys() - wanted.keys():  # DeepSpeed writes a tied weight twice
        assert torch.equal(found.pop("lm_head.weight"), found["model.embed_tokens.weight"])
    assert found.keys() == wanted.keys()
    return all(torch.allclose(found[name], tensor, rtol=0, atol=tolerance) for name, tensor in wanted.items())


def column(directory, name):
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in rows if name in row]


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_make_the_model_of_one(worlds, chain, tmp_path, stage):
    per_device, tolerance = STAGES[stage]
    section = chain / "configs" / f"{stage}.yaml"
    flags = ["--config", section, "--output_dir", tmp_path / "two", "--train.per_device_train_batch_size", per_device]
    worlds.run(2, recipe, stage, *flags)
    assert close(tmp_path / "two" / "model", chain / "chain" / stage / "model", tolerance)
    for name in ("loss", "grad_norm"):
        wanted = column(chain / "chain" / stage, name)
        assert len(wanted) > 6
        assert column(tmp_path / "two", name) == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize(("stage", "config"), [("sft", "zero2.yaml"), ("sft", "zero3.yaml"), ("reward", "zero2.yaml")])
def test_deepspeed_makes_the_model_of_one_and_goes_on_from_its_checkpoint(worlds, chain, tmp_path, stage, config):
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: pip install -e .[deepspeed]")
    section, one = ["--config", chain / "configs" / f"{stage}.yaml"], chain / "chain" / stage
    if stage == "reward":  # DeepSpeed has optimizers of its own, and no Muon
        one = tmp_path / "one"
        worlds.run(1, recipe, stage, *section, "--muon=false", "--output_dir", one)
    flags = [*section, "--train.per_device_train_batch_size", STAGES[stage][0]]
    options = {"config": config, "ACCELERATE_USE_CPU": "false", "ACCELERATE_MIXED_PRECISION": "no"}
    for name in ("whole", "parts"):  # the second goes on from the first checkpoint of the first
        worlds.run(2, with_deepspeed, stage, *flags, "--output_dir", tmp_path / name, **options)
        assert close(tmp_path / name / "model", one / "model", 1e-4)
        if name == "whole":
            first = min((tmp_path / "whole" / "checkpoints").iterdir())
            assert list(first.glob("global_step*"))  # what DeepSpeed alone writes
            shutil.copytree(first, tmp_path / "parts" / "checkpoints" / first.name)
    steps = [column(tmp_path / name, "step")[0] for name in ("whole", "parts")]
    assert steps[0] < steps[1]
    assert column(tmp_path / "whole", "loss") == pytest.approx(column(one, "loss"), rel=1e-3)


def test_rows_that_do_not_fill_a_batch_of_all_processes(worlds, chain, tmp_path):
    """24 rows by 5 a process: the last batch of an epoch has 4, and the second process none of its own."""
    section = chain / "configs" / "sft.yaml"
    flags = ["--config", section, "--output_dir", tmp_path / "sft", "--train.per_device_train_batch_size", 5]
    worlds.run(2, recipe, "sft", *flags, "--train.max_steps", 4)
    assert all(loss > 0 for loss in column(tmp_path / "sft", "loss"))
    AutoModelForCausalLM.from_pretrained(tmp_path / "sft" / "model")


def test_two_processes_classify_as_one(worlds, tmp_path):
    """A network without normalisation over the batch, pictures that are not varied; then from a head alone to all."""
    flags = ["--preprocess.size", 28, "--augment.shift", 0, "--limit", 8, "--seed", 1, "--train.bf16", False]
    flags += ["--train.max_steps", 6, "--train.logging_steps", 1, "--train.warmup_steps", 2, "--test_fraction", 0.05]
    first, then = ["--network", "lenet"], ["--init_from", tmp_path / "one" / "model", "--mode", "gradual"]
    ways = {"one": (1, None, first), "two": (2, None, first), "sharded": (2, "fsdp2.yaml", first)}
    ways |= {"gradual": (1, None, then), "gradual in two": (2, None, then)}
    for name, (num_processes, config, more) in ways.items():
        argv = [*flags, *more, "--output_dir", tmp_path / name]
        argv += ["--train.per_device_train_batch_size", 20 // num_processes]
        worlds.run(num_processes, recipe, "vision/classify", *argv, config=config)
    for name, like in {"two": "one", "sharded": "one", "gradual in two": "gradual"}.items():
        assert close(tmp_path / name / "model", tmp_path / like / "model", 1e-5), name
        for metric in ("loss", "eval/accuracy"):
            assert column(tmp_path / name, metric) == pytest.approx(column(tmp_path / like, metric), abs=1e-5)


def test_two_processes_compare_their_pairs_as_one(worlds, tmp_path):
    """A pair is told from those of the other process too: half the batch in each makes the model of one."""
    flags = ["--data", "builtin:digits", "--network", "lenet", "--preprocess.size", 28, "--augment.shift", 0]
    flags += ["--train.bf16", False, "--train.max_steps", 4, "--train.logging_steps", 1, "--train.warmup_steps", 2]
    for name, num_processes in (("one", 1), ("two", 2)):
        argv = [*flags, "--output_dir", tmp_path / name]
        argv += ["--train.per_device_train_batch_size", 20 // num_processes]
        worlds.run(num_processes, recipe, "vision/clip", *argv)
    assert close(tmp_path / "two" / "model", tmp_path / "one" / "model", 1e-4)
    for metric in ("loss", "grad_norm", "eval/scale"):
        assert column(tmp_path / "two", metric) == pytest.approx(column(tmp_path / "one", metric), rel=1e-3)
    with pytest.raises(AssertionError, match=r"logit_scale is a single number, .* accelerate_configs/ddp\.yaml"):
        worlds.run(2, recipe, "vision/clip", *flags, "--output_dir", tmp_path / "sharded", config="fsdp2.yaml")


@pytest.mark.parametrize("config", [None, "fsdp2.yaml"])
def test_two_processes_learn_from_rewards_as_one(worlds, chain, tmp_path, config):
    section = chain / "configs" / "ppo.yaml"
    worlds.run(2, recipe, "ppo", "--config", section, "--output_dir", tmp_path / "two", config=config)
    assert close(tmp_path / "two" / "model", chain / "chain" / "ppo" / "model", 1e-4)
    assert close(tmp_path / "two" / "value", chain / "chain" / "ppo" / "value", 1e-4)
    for name in ("objective/scores", "objective/kl", "eval/score", "loss/policy_avg", "policy/grad_norm"):
        wanted = column(chain / "chain" / "ppo", name)
        assert column(tmp_path / "two", name) == pytest.approx(wanted, abs=2e-3), name


def test_accelerate_launch_shards_pretraining_as_it_stands(chain, tmp_path):
    """The command of docs/scaling.md; but for the two processes on a CPU it is that of eight GPUs."""
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "accelerate_configs/fsdp2.yaml"]
    launch += ["--num_processes", "2", "--main_process_port", "0", "recipes/pretrain.py"]
    flags = ["--config", str(chain / "configs" / "pretrain.yaml"), "--output_dir", str(tmp_path / "pretrain")]
    flags += ["--train.per_device_train_batch_size", "2"]
    done = subprocess.run(launch + flags, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert close(tmp_path / "pretrain" / "model", chain / "chain" / "pretrain" / "model", MUON)
