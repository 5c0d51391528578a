"""The recipe of image and text towers: from captions to a directory that names, finds and ranks."""

import json
import os
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner
from vision.clip import ClipConfig, main

from lmkit.cli import app
from lmkit.config import load
from lmkit.errors import BadInput, Interrupted
from lmkit.training import loop

KINDS = ("bar", "dot", "ring")


@pytest.fixture(scope="module")
def data(label_folders):
    """Pictures of three kinds with captions and labels, in two splits."""
    folder = label_folders(*KINDS)
    for split in ("train", "test"):
        files = sorted((folder / split).rglob("*.png"))
        rows = [
            {"file_name": str(file.relative_to(folder / split)), "label": kind, "text": f"a picture of a {kind}"}
            for file in files
            for kind in [file.parent.name]
        ]
        (folder / split / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def config(data, output_dir, *flags):
    options = {"data": data, "output_dir": output_dir, "train.num_train_epochs": 6, "preprocess.size": 8}
    options |= {"train.per_device_train_batch_size": 12, "augment.shift": 0.0, "train.ema_decay": 0.8}
    options |= {"templates": "['a picture of a {}', 'a {}']"}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return load(ClipConfig, [*words, *flags])


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    return main(config(data, tmp_path_factory.mktemp("trained")))


def test_it_learns_to_name_and_to_find(trained):
    found = json.loads((trained / "results" / "metrics.json").read_text())
    assert found["zero_shot/accuracy"] > 0.9
    assert found["image_to_text/recall_at_1"] > 0.9
    assert found["text_to_image/recall_at_1"] == 1
    assert '"eval/ema_scale"' in (trained / "metrics.jsonl").read_text()


def test_the_averaged_weights_are_handed_over(trained):
    newest = max((trained / "checkpoints").glob("step-*"))
    given = load_file(trained / "model" / "model.safetensors")
    last, averaged = (load_file(newest / f"{kind}.safetensors") for kind in ("model", "ema"))
    assert torch.equal(averaged["model.visual_projection.weight"], given["visual_projection.weight"])
    assert not torch.equal(last["model.visual_projection.weight"], given["visual_projection.weight"])


def test_the_directory_judges_names_and_ranks(trained, data, tmp_path):
    ask = lambda *words: CliRunner().invoke(app, ["vision", *map(str, words)])  # noqa: E731
    model, out = trained / "model", tmp_path / "out"
    found = ask("evaluate", model, data, "--out", out, "--template", "a picture of a {}", "--template", "a {}")
    assert found.exit_code == 0
    assert json.loads((out / "metrics.json").read_text()) == json.loads(
        (trained / "results" / "metrics.json").read_text()
    )
    pictures = [data / "test" / name / "0.png" for name in KINDS]
    classes = ("--classes", ",".join(f"a picture of a {name}" for name in KINDS))
    found = ask("predict", model, *pictures, *classes)
    assert [line.split("  ")[1].split()[-2] for line in found.stdout.splitlines()] == list(KINDS)
    for number, picture in enumerate(pictures):
        (tmp_path / "few").mkdir(exist_ok=True)
        shutil.copy(picture, tmp_path / "few" / f"{number}.png")
    first, *rest = ask("rank", model, tmp_path / "few", "a picture of a ring").stdout.splitlines()
    assert first.endswith("2.png")
    assert [float(line.split()[0]) <= float(first.split()[0]) for line in rest] == [True, True]
    assert "name them, as in --classes" in ask("predict", model, pictures[0]).stderr
    assert "is no folder with images" in ask("rank", model, tmp_path / "none", "a ring").stderr


def test_stopping_and_going_on_gives_the_same_bits(trained, data, tmp_path, monkeypatch):
    again, real, calls = config(data, tmp_path, "--train.save_steps", "2"), loop._update, []

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


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--train.per_device_train_batch_size", "1"), "a pair needs another to be told from"),
        (("--train.gradient_accumulation_steps", "2"), "pairs of several micro-batches are never compared"),
        (("--augment.mixup", "0.1"), "captions have none"),
        (("--train.per_device_train_batch_size", "100"), "72 images, fewer than one batch of 100"),
        (("--network", "resnet"), "network 'resnet' is not known"),
        (("--text_model", "nowhere"), "nowhere"),
        (("--caption_length", "65"), "caption_length 65 is more than the text model's 64 positions"),
    ],
)
def test_what_cannot_work_is_said(data, tmp_path, flags, message):
    with pytest.raises(BadInput, match=message):
        main(config(data, tmp_path, *flags))


def test_labels_without_captions_are_refused_or_made_captions(data, tmp_path):
    for name in KINDS[:2]:
        (tmp_path / name).mkdir()
        shutil.copy(data / "train" / name / "0.png", tmp_path / name)
    with pytest.raises(BadInput, match=r"1 of 1 images|2 of 2 images of train have no caption"):
        main(config(tmp_path, tmp_path / "out"))
