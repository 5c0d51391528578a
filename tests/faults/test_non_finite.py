"""NaN and infinity in a weight, a gradient, a loss, a reward: exit 4 before anything of it is saved."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from lmkit.stage import read_record
from lmkit.tracking import read_jsonl
from tests.faults.harness import visible

CASES = [
    (stage, what, value)
    for stage in ("pretrain", "sft", "reward", "ppo")
    for what in ("loss", "gradient", "weight")
    for value in (math.nan, math.inf)
]


class Poison:
    """In the child: at the `number`-th backward, a number that is not finite in the loss, a gradient or a weight."""

    def __init__(self, what, value, number):
        self.what, self.value, self.number, self.count = what, value, number, 0

    def __call__(self):
        from accelerate import Accelerator

        backward = Accelerator.backward

        def poisoned(accelerator, loss, **options):
            self.count += 1
            if self.count == self.number and self.what == "loss":
                loss = loss * self.value
            backward(accelerator, loss, **options)
            if self.count == self.number and self.what != "loss":
                self.spoil(accelerator._models[0])

        Accelerator.backward = poisoned

    def spoil(self, model):
        parameter = next(p for p in model.parameters() if p.grad is not None)
        with torch.no_grad():
            (parameter if self.what == "weight" else parameter.grad).view(-1)[3] = self.value


def finite(folder):
    """Whether all numbers in a folder's safetensors are."""
    tensors = [t for path in folder.glob("*.safetensors") for t in load_file(path).values()]
    return all(t.isfinite().all() for t in tensors if t.is_floating_point())


@pytest.mark.parametrize(("stage", "what", "value"), CASES)
def test_a_number_that_is_not_finite(harness, tally, everything, stage, what, value):
    """T11 not finite in the middle, at the first step, at the last"""
    sample = [("pretrain", "weight", "nan"), ("sft", "loss", "inf"), ("ppo", "gradient", "nan")]
    if not everything and (stage, what, str(value)) not in sample:
        pytest.skip("a sample: FAULTS=all tries each")
    last = {"pretrain": 12, "sft": 8, "reward": 8, "ppo": 20}[stage]
    for number in (5, 1, last) if everything else (5,):
        directory = harness.fresh(stage)
        code, output = harness.run(stage, directory, hook=Poison(what, value, number))
        assert tally.count(code == 4), f"{number}: code {code}: {output[-2000:]}"
        assert json.loads((directory / "exit.json").read_text())["code"] == 4
        assert read_record(directory) is None
        assert all(finite(folder) for folder in visible(directory))
        rows = read_jsonl(directory / "metrics.jsonl")
        assert not [row for row in rows if row.get("loss") == 0]
        code, output = harness.run(stage, directory)
        assert code == 0, output
        harness.assert_same(stage, directory)
    tally.figure = "exit 4, nothing of it saved"


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_reward_that_is_not_finite(harness, tally, tmp_path, value):
    """T11 not finite in a reward, at the third call"""
    (tmp_path / "spoilt.py").write_text(
        "calls = []\ndef reward(prompts, completions, **columns):\n    calls.append(1)\n"
        f"    return [float('{value}') if len(calls) == 3 else 1.0] * len(completions)\n"
    )
    directory = harness.fresh("ppo")
    environment = {"PYTHONPATH": str(tmp_path)}
    code, output = harness.run(
        "ppo", directory, "--reward", "spoilt:reward", hook=OnPath(tmp_path), environment=environment
    )
    assert tally.count(code in (2, 4) and f"returned {value}" in output), output
    assert all(finite(folder) for folder in visible(directory))
    tally.figure = f"exit {code}, the row named"


def test_a_reward_model_that_is_not_finite(harness, tally, tmp_path):
    """T11 not finite in the reward model's weights"""
    model = shutil.copytree(harness.reference("reward") / "model", tmp_path / "model")
    (model / "MANIFEST.json").unlink()
    weights = load_file(model / "model.safetensors")
    weights["score.weight"].view(-1)[0] = math.nan
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    directory = harness.fresh("ppo")
    code, output = harness.run("ppo", directory, "--reward", model)
    assert tally.count(code in (2, 4)), output
    assert not visible(directory)
    tally.figure = f"exit {code}, nothing saved"


class OnPath:
    def __init__(self, path):
        self.path = str(path)

    def __call__(self):
        import sys

        sys.path.insert(0, self.path)
