"""Objectives and architectures of lmkit's own in one process, in two, and sharded."""

import json

import pytest
from safetensors.torch import load_file
from torch import allclose

from tests.processes.worlds import recipe

MODELS = {
    "masked": {"arch": "transformer", "block": {"causal": False}},
    "span_corruption": {"arch": "transformer", "block": {"num_encoder_layers": 1}},
    "prefix": {"arch": "transformer", "block": {"positions": "relative", "norm_placement": "deep"}},
    "next_token, both ways": {"arch": "elmo"},
    "next_token, by a state": {"arch": "gru", "bptt_tokens": 24},
}


@pytest.mark.parametrize("name", MODELS)
def test_two_processes_learn_an_objective_as_one_does(worlds, chain, tmp_path, name):
    flags = ["--config", chain / "configs/pretrain.yaml", "--objective", name.split(",")[0]]
    flags += ["--packing", "stream", "--train.max_steps", 4]
    flags += ["--model", json.dumps({"preset": "nano", "context_length": 96} | MODELS[name])]
    flags += ["--train.optim", "adamw_torch_fused", "--validation_tokens", 300, "--ngram_orders", "[2]"]
    rows = {}
    for world, size, config in (("one", 1, None), ("two", 2, None), ("sharded", 2, "fsdp2.yaml")):
        options = ["--output_dir", tmp_path / world, "--train.per_device_train_batch_size", 4 // size]
        worlds.run(size, recipe, "pretrain", *flags, *options, config=config)
        metrics = map(json.loads, (tmp_path / world / "metrics.jsonl").read_text().splitlines())
        rows[world] = [row["loss"] for row in metrics if "loss" in row]
    one = load_file(tmp_path / "one/model/model.safetensors")
    for world in ("two", "sharded"):
        other = load_file(tmp_path / world / "model/model.safetensors")
        assert rows[world] == pytest.approx(rows["one"], abs=1e-5)
        assert other.keys() == one.keys()
        assert all(allclose(other[key], tensor, rtol=0, atol=1e-4) for key, tensor in one.items())
