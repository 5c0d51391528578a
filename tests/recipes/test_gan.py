"""The recipe of a generator against a discriminator: pictures, distances, stopping and going on."""

import json
import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from vision.gan import GanConfig, main

from lmkit.config import load
from lmkit.errors import BadInput, Interrupted, Stopped
from lmkit.training import loop
from lmkit.vision.classifier import new_classifier
from lmkit.vision.options import Preprocess


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Bars and squares as an npz, and a classifier of them, untrained, as the judge."""
    folder, generator = tmp_path_factory.mktemp("shapes"), np.random.default_rng(0)
    images = generator.integers(0, 40, (120, 8, 8)).astype(np.uint8)
    images[::2, :, 3:5] += 200
    images[1::2, 2:6, 2:6] += 200
    labels = np.arange(120) % 2
    arrays = {"x_train": images[:80], "y_train": labels[:80], "x_test": images[80:], "y_test": labels[80:]}
    np.savez(folder / "shapes.npz", **arrays)
    seen = Preprocess(size=8, channels=1, mean=[0.3], std=[0.3])
    torch.manual_seed(0)
    new_classifier("mlp", seen, ["0", "1"]).save_pretrained(folder / "judge")
    seen.save(folder / "judge")
    return folder


def config(data, output_dir, *flags):
    options = {"data": data / "shapes.npz", "output_dir": output_dir, "judge": data / "judge", "width": 16}
    options |= {"train.max_steps": 20, "train.per_device_train_batch_size": 20, "train.save_steps": 4}
    options |= {"train.eval_steps": 10, "train.logging_steps": 5}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return load(GanConfig, [*words, *flags])


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    return main(config(data, tmp_path_factory.mktemp("trained")))


def test_it_leaves_a_generator_pictures_and_distances(trained):
    found = json.loads((trained / "results" / "metrics.json").read_text())
    assert found["fd"] > found["fd_floor"] > 0
    assert Image.open(trained / "results" / "samples.png").size == (10 * 65 + 1, 4 * 65 + 1)
    rows = [json.loads(line) for line in (trained / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [10, 20]
    assert all((trained / row["drawn"]).is_file() for row in rows)
    assert '"eval/ema_drawn_taken_for_real"' in (trained / "metrics.jsonl").read_text()
    assert {"model.safetensors", "config.json", "preprocess.json"} <= {p.name for p in (trained / "model").iterdir()}


def test_averaged_weights_are_handed_over(trained):
    newest = max((trained / "checkpoints").glob("step-*"))
    given = load_file(trained / "model" / "model.safetensors")
    last, averaged = (load_file(newest / f"{kind}.safetensors") for kind in ("model", "ema"))
    assert all(torch.equal(tensor, averaged[f"generator.{name}"]) for name, tensor in given.items())
    assert not torch.equal(last["generator.layers.0.weight"], given["layers.0.weight"])


def test_stopping_and_going_on_gives_the_same_bits(trained, data, tmp_path, monkeypatch):
    again, real, calls = config(data, tmp_path), loop._update, []

    def update(*args):
        calls.append(1)
        if len(calls) == 11:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    monkeypatch.setattr(loop, "_update", update)
    with pytest.raises(Interrupted, match="stopped after step 11"):
        main(again)
    main(again)
    for part in ("model/model.safetensors", "checkpoints/step-000020/model.safetensors"):  # and the discriminator
        first, second = (load_file(folder / part) for folder in (trained, tmp_path))
        assert all(torch.equal(first[name], second[name]) for name in first)
    assert (trained / "results/samples.png").read_bytes() == (tmp_path / "results/samples.png").read_bytes()


def test_adamw_has_the_memories_of_the_configuration(data, tmp_path, monkeypatch):
    real, built = loop.build_optimizers, []

    def build(*args):
        built.extend(real(*args))
        return built

    monkeypatch.setattr(loop, "build_optimizers", build)
    main(config(data, tmp_path, "--train.adam_beta2", "0.98"))
    assert {group["betas"] for optimizer in built for group in optimizer.param_groups} == {(0.0, 0.98)}


def test_a_loss_that_is_not_finite_stops_it(data, tmp_path):
    with pytest.raises(Stopped, match=r"step \d+: the loss is") as stopped:
        main(config(data, tmp_path, "--train.learning_rate", "1e30"))
    assert stopped.value.exit_code == 4


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--preprocess.mean", "[0.3]"), "the generator gives -1 to 1"),
        (("--train.torch_compile", "true"), "compiled modules have no slope of a slope"),
        (("--preprocess.size", "16"), "train one with the same preprocess"),
        (("--train.per_device_train_batch_size", "100"), "80 images, fewer than one batch of 100"),
    ],
)
def test_what_cannot_work_is_said(data, tmp_path, flags, message):
    with pytest.raises(BadInput, match=message):
        main(config(data, tmp_path, *flags))
