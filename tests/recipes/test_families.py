"""The chain of tales on models of lmkit's own, from text to a report; and pretraining by other objectives."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lmkit.config import validate
from lmkit.stage import read_record

ROOT = Path(__file__).parents[2]
BLOCK = "{positions: alibi, norm_placement: sandwich, norm: layernorm}"
MODELS = {
    "lstm": ["--pretrain.model.arch", "lstm"],
    "transformer": ["--pretrain.model.arch", "transformer", "--pretrain.model.block", BLOCK],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_the_whole_chain_runs(name, tmp_path):
    command = [sys.executable, "recipes/rlhf.py", "--config", "recipes/configs/nano/rlhf.yaml", "--name", name]
    process = subprocess.run(
        [*command, "--runs_dir", str(tmp_path), *MODELS[name]], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-2000:]
    run = tmp_path / name
    assert (run / "report.html").is_file()
    assert read_record(run / "ppo")["metrics"]["val/first_ratio_error"] < 1e-4
    metrics = json.loads((run / "evaluation/results/metrics.json").read_text())
    assert {"kl/ppo", "bits_per_byte/sft", "gold/ppo"} <= set(metrics)
    kind = json.loads((run / "ppo/model/config.json").read_text())["model_type"]
    assert kind == {"lstm": "lmkit_recurrent", "transformer": "lmkit_transformer"}[name]


@pytest.mark.parametrize(
    ("objective", "block", "asked"),
    [("masked", {"causal": False}, True), ("span_corruption", {"num_encoder_layers": 1}, True), ("prefix", {}, False)],
)
def test_pretraining_by_another_objective(nano, tmp_path, objective, block, asked, capsys):
    import pretrain

    train = {"max_steps": 4, "warmup_steps": 1, "per_device_train_batch_size": 4, "logging_steps": 2, "eval_steps": 4}
    settings = {"shards": nano / "shards", "tokenizer": nano / "model", "validation_tokens": 600, "ngram_orders": [3]}
    model = {"preset": "nano", "context_length": 96, "arch": "transformer", "block": block}
    settings |= {"objective": objective, "model": model, "train": train, "output_dir": tmp_path / "pretrain"}
    pretrain.main(validate(pretrain.PretrainConfig, settings))
    metrics = read_record(tmp_path / "pretrain")["metrics"]
    assert ("eval/bits_per_byte" in metrics) != asked
    assert metrics["eval/nats_per_token"] > 1
    assert ("nats for each token asked for" in capsys.readouterr().out) == asked


def test_a_pretraining_that_cannot_work_is_refused_before_it_starts():
    command = [sys.executable, "recipes/pretrain.py", "--objective", "span_corruption"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert process.returncode == 2
    assert "an encoder reads the text with its gaps" in process.stderr
    assert "--model.block.num_encoder_layers 4" in process.stderr
