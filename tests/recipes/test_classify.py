"""The recipe of image classifiers: from data to a directory that others can ask, stopped and gone on with."""

import json
import os
import signal

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner
from vision.classify import ClassifyConfig, main

from lmkit.cli import app
from lmkit.config import load
from lmkit.errors import BadInput, Interrupted
from lmkit.training import loop

CLASSES = ("bar", "dot", "ring")


@pytest.fixture(scope="module")
def data(label_folders):
    return label_folders(*CLASSES)


def config(data, output_dir, *flags):
    options = {"data": data, "output_dir": output_dir, "train.num_train_epochs": 4, "augment.mixup": 0.1}
    options |= {"train.per_device_train_batch_size": 16, "augment.shift": 0.0, "train.ema_decay": 0.8}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return load(ClassifyConfig, [*words, *flags])


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    return main(config(data, tmp_path_factory.mktemp("trained")))


def test_it_learns_and_leaves_pictures_and_numbers(trained):
    results = {path.name for path in (trained / "results").iterdir()}
    assert {"metrics.json", "report.txt", "confusion.png", "mistakes.png"} <= results
    assert Image.open(trained / "results" / "confusion.png").size[0] > 100
    assert '"images_per_second"' in (trained / "metrics.jsonl").read_text()
    report = (trained / "results" / "report.txt").read_text()
    assert float(report.split()[-1]) > 0.9


def test_the_directory_answers_as_the_run_did(trained, data, tmp_path):
    run = CliRunner().invoke
    found = run(app, ["vision", "evaluate", str(trained / "model"), str(data), "--out", str(tmp_path / "out")])
    assert found.exit_code == 0
    assert found.stdout.strip() == (trained / "results" / "report.txt").read_text().strip()
    pictures = [str(data / "test" / name / "0.png") for name in CLASSES]
    found = run(app, ["vision", "predict", str(trained / "model"), *pictures])
    assert [line.split()[1] for line in found.stdout.splitlines()] == list(CLASSES)
    found = run(app, ["vision", "predict", str(trained / "model"), pictures[0], "--json", "--top", "2"])
    assert '"name": "bar"' in found.stdout


def test_stopping_and_going_on_gives_the_same_bits(trained, data, tmp_path, monkeypatch):
    again, real = config(data, tmp_path, "--train.save_steps", "2"), loop._update
    calls = []

    def update(*args):
        calls.append(1)
        if len(calls) == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    monkeypatch.setattr(loop, "_update", update)
    with pytest.raises(Interrupted, match="stopped after step 7"):
        main(again)
    main(again)
    first, second = (load_file(folder / "model" / "model.safetensors") for folder in (trained, tmp_path))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_patience_stops_early_and_keeps_the_best(data, tmp_path):
    flags = (
        "--patience",
        "1",
        "--train.num_train_epochs",
        "40",
        "--train.eval_steps",
        "2",
        "--train.learning_rate",
        "0.3",
    )
    directory = main(config(data, tmp_path, *flags))
    rows = [line for line in (directory / "metrics.jsonl").read_text().splitlines() if "eval/accuracy" in line]
    assert len(rows) < 40 * 4 // 2
    assert (directory / "best").is_dir()


def test_a_frozen_body_goes_on_with_other_classes(trained, data, tmp_path):
    """And TensorBoard shows the network and what it mistakes, where it is asked for."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    few = (
        "--report_to",
        "[tensorboard]",
        "--init_from",
        str(trained / "model"),
        "--mode",
        "frozen",
        "--limit",
        "8",
        "--train.ema_decay",
        "null",
    )
    directory = main(config(data, tmp_path, *few, "--train.per_device_train_batch_size", "8"))
    before, after = (load_file(folder / "model" / "model.safetensors") for folder in (trained, directory))
    assert all(torch.equal(before[name], after[name]) for name in before if name.startswith("body."))
    assert not (trained / "tensorboard").exists()
    events = accumulator.EventAccumulator(str(directory / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["images"]) == {"confusion", "mistakes"}
    assert events.Tags()["graph"]
    assert "loss" in events.Tags()["scalars"]


@pytest.mark.parametrize("mode", ["full", "gradual", "lora"])
def test_a_trained_body_goes_on_in_every_mode(trained, data, tmp_path, mode):
    """What is handed over is a plain directory, with other weights, whose results are those it was judged by."""
    more = ("--init_from", str(trained / "model"), "--mode", mode, "--limit", "16", "--train.num_train_epochs", "2")
    directory = main(config(data, tmp_path, *more, "--train.learning_rate", "1e-3", "--train.ema_decay", "null"))
    before, after = (load_file(folder / "model" / "model.safetensors") for folder in (trained, directory))
    assert set(after) == set(before)
    assert not torch.equal(before["body.0.weight"], after["body.0.weight"])
    assert json.loads((directory / "results" / "metrics.json").read_text())["accuracy"] > 0.9
    statistics = [name for name in before if "running_" in name]
    assert all(torch.equal(before[name], after[name]) for name in statistics) == (mode == "lora")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--network", "resnet"), "network 'resnet' is not known"),
        (("--train.per_device_train_batch_size", "100"), "72 images, fewer than one batch of 100"),
        (("--init_from", "nowhere"), "nowhere"),
        (("--network", "hf:nowhere"), "nowhere"),
    ],
)
def test_what_cannot_work_is_said(data, tmp_path, flags, message):
    with pytest.raises(BadInput, match=message):
        main(config(data, tmp_path, *flags))


def test_a_body_is_not_shown_images_of_another_size(trained, data, tmp_path):
    flags = ["--init_from", str(trained / "model"), "--preprocess.size", "16"]
    with pytest.raises(BadInput, match=r"saw images with \{'size': 8\}, and preprocess asks for \{'size': 16\}"):
        main(config(data, tmp_path, *flags))
    assert not (tmp_path / "model").exists()


def test_inspect_shows_damage_and_repeats(data, tmp_path):
    for name in CLASSES[:2]:
        (tmp_path / "train" / name).mkdir(parents=True)
        (tmp_path / "test" / name).mkdir(parents=True)
        picture = (data / "train" / name / "0.png").read_bytes()
        (tmp_path / "train" / name / "a.png").write_bytes(picture)
        (tmp_path / "test" / name / "b.png").write_bytes(picture)
    (tmp_path / "train" / "bar" / "c.png").write_bytes(b"no picture")
    output = CliRunner().invoke(app, ["vision", "inspect", str(tmp_path)]).stdout
    assert "train: 3 images, 0 captions\n  classes (2): bar 2, dot 1" in output
    assert "damaged: 1" in output
    assert "2 the same as one of train" in output
