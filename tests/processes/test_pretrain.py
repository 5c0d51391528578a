"""Pretraining in one process, in several, and sharded: the same losses and weights, and checkpoints of any of them."""

import json
import shutil

import pytest
import torch

from lmkit.stage import latest_checkpoint
from lmkit.training import checkpoint
from tests.processes.pretraining import fits, spoilt

CASES = {
    "adamw": {"optim": "adamw_torch_fused", "ema": 0.9},
    "muon": {"optim": "muon"},
    "recomputed": {"optim": "adamw_torch_fused", "gradient_checkpointing": True},
    # A sample a process and update: sometimes one of two processes has no token that counts.
    "no tokens": {"global_batch_size": 2, "per_device_train_batch_size": 1, "max_steps": 7},
}
STOPPED = {name: CASES[name] | {"stop_after": 4} for name in ("adamw", "muon")}
GOING_ON = {name: CASES[name] for name in STOPPED}


@pytest.fixture(scope="module")
def folders(worlds, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fits")
    in_bfloat16 = {"bf16": CASES["muon"] | {"in_bfloat16": True}}
    worlds.run(1, fits, folder / "one", CASES | in_bfloat16)
    worlds.run(2, fits, folder / "two", CASES)
    worlds.run(2, fits, folder / "sharded", CASES | in_bfloat16, config="fsdp2.yaml")
    return folder


def close(found, wanted, tolerance):
    return found.keys() == wanted.keys() and all(
        torch.allclose(found[name], tensor, rtol=0, atol=tolerance) for name, tensor in wanted.items()
    )


def column(directory, name):
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in rows if name in row]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("world", ["two", "sharded"])
def test_losses_and_weights_are_those_of_one_process(folders, world, case):
    one, other = (torch.load(folders / name / case / "result.pt") for name in ("one", world))
    assert not other["empty"]
    for name in ("loss", "grad_norm", "eval/loss"):
        assert column(folders / world / case, name) == pytest.approx(column(folders / "one" / case, name), abs=2e-6)
    assert close(other["model"], one["model"], 5e-6)
    assert not close(other["model"], {name: 0 * tensor for name, tensor in one["model"].items()}, 0.1)
    if "ema" in one:
        assert close(other["ema"], one["ema"], 5e-6)
        assert not close(other["ema"], one["model"], 1e-4)


def test_processes_keep_whole_weights_or_halves(folders):
    found = [torch.load(folders / name / "muon" / "result.pt")["share"] for name in ("one", "two", "sharded")]
    assert found == pytest.approx([1, 1, 0.5], abs=0.01)


def test_a_number_that_is_not_finite_in_one_share_is_seen_by_all(worlds, folders):
    worlds.run(2, spoilt, folders, config="fsdp2.yaml")


def test_bfloat16_shards_learn_as_whole_weights_do(folders):
    one, sharded = (column(folders / name / "bf16", "loss") for name in ("one", "sharded"))
    exact = column(folders / "one" / "muon", "loss")
    assert sharded == pytest.approx(one, abs=0.05)
    assert sharded != pytest.approx(exact, abs=1e-5)


def test_a_checkpoint_of_two_goes_on_in_any_number_of_processes(worlds, folders):
    """Written by two processes, sharded: one, two whole, four sharded and two groups of two go on from it."""
    worlds.run(2, fits, folders / "stopped", STOPPED, config="fsdp2.yaml")
    assert latest_checkpoint(folders / "stopped" / "adamw" / "checkpoints").name == "step-000004"
    hybrid = {"PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2", "PARALLELISM_CONFIG_DP_SHARD_SIZE": "2"}
    ways = {"one": (1, None, {}), "two": (2, None, {}), "four": (4, "fsdp2.yaml", {})}
    ways["hybrid"] = (4, "hsdp_multinode.yaml", hybrid)
    for name, (num_processes, config, environment) in ways.items():
        folder = shutil.copytree(folders / "stopped", folders / f"stopped-{name}")
        worlds.run(num_processes, fits, folder, GOING_ON, config=config, **environment)
        for case in GOING_ON:
            one, other = (torch.load(f / case / "result.pt") for f in (folders / "one", folder))
            assert close(other["model"], one["model"], 5e-6), (name, case)
            assert column(folder / case, "loss") == pytest.approx(column(folders / "one" / case, "loss"), abs=2e-6)
    assert close(other["model"], one["model"], 5e-6)


def test_a_checkpoint_of_two_goes_on_in_three(worlds, tmp_path):
    """Six samples an update are three micro-batches of each of two processes, or two of each of three."""
    case = {"elastic": {"global_batch_size": 6, "per_device_train_batch_size": 1, "optim": "adamw_torch_fused"}}
    stopped = {"elastic": case["elastic"] | {"stop_after": 4}}
    worlds.run(1, fits, tmp_path / "one", case)
    worlds.run(2, fits, tmp_path / "other", stopped)
    worlds.run(3, fits, tmp_path / "other", case)
    one, other = (torch.load(tmp_path / name / "elastic" / "result.pt") for name in ("one", "other"))
    assert close(other["model"], one["model"], 5e-6)
    losses = [column(tmp_path / name / "elastic", "loss") for name in ("one", "other")]
    assert losses[1] == pytest.approx(losses[0], abs=2e-6)


def test_a_checkpoint_of_one_is_that_of_shards_and_goes_on_in_them(worlds, folders):
    saved = [
        checkpoint.load(latest_checkpoint(folders / name / "adamw" / "checkpoints")) for name in ("one", "sharded")
    ]
    for group in ("model", "optimizer", "ema"):
        assert close(saved[1][0][group], saved[0][0][group], 1e-5), group
    worlds.run(1, fits, folders / "from one", STOPPED)
    worlds.run(2, fits, folders / "from one", GOING_ON, config="fsdp2.yaml")
    for case in GOING_ON:
        one, other = (torch.load(folders / name / case / "result.pt") for name in ("one", "from one"))
        assert close(other["model"], one["model"], 5e-6), case
