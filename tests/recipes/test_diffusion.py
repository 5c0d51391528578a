"""The recipe of diffusion models: from data to a directory that draws, stopped and gone on with."""

import json
import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner
from vision.diffusion import DiffusionConfig, main

from lmkit.cli import app
from lmkit.config import load
from lmkit.errors import BadInput, Interrupted
from lmkit.models.presets import ModelConfig
from lmkit.training import loop
from lmkit.vision.classifier import new_classifier
from lmkit.vision.clip import image_tower, language_model, pair_towers, save_clip
from lmkit.vision.options import Preprocess

CLASSES = ("bar", "ring")


@pytest.fixture(scope="module")
def data(label_folders):
    return label_folders(*CLASSES)


@pytest.fixture(scope="module")
def judge(data, tmp_path_factory):
    """A classifier whose answer is the brightness of two places, which tells the two kinds apart."""
    path, preprocess = tmp_path_factory.mktemp("judge"), Preprocess(size=8, channels=1, mean=[0.0], std=[1.0])
    model = new_classifier("softmax_regression", preprocess, CLASSES)
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.zero_()
        model.head.weight[0, 3 * 8 + 3] = model.head.weight[1, 3 * 8 + 1] = 1.0
    model.save_pretrained(path)
    preprocess.save(path)
    return path


def config(data, output_dir, *flags):
    options = {"data": data, "output_dir": output_dir, "caption": "a {}", "network": "dit", "train.max_steps": 8}
    options |= {"dit.hidden_size": 32, "dit.num_hidden_layers": 1, "dit.patch_size": 4, "text.num_hidden_layers": 1}
    options |= {"train.per_device_train_batch_size": 16, "train.ema_decay": 0.8, "train.eval_steps": 4}
    options |= {"train.save_steps": 4, "vocab_size": 384, "sampling.num_inference_steps": 4}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return load(DiffusionConfig, [*words, *flags])


@pytest.fixture(scope="module")
def trained(data, judge, tmp_path_factory):
    return main(config(data, tmp_path_factory.mktemp("trained"), "--judge", str(judge)))


def weights(folder):
    files = sorted((folder / "model").rglob("*.safetensors"))
    assert [file.parent.name for file in files] == ["text_encoder", "transformer"]
    return {f"{file.parent.name}/{name}": tensor for file in files for name, tensor in load_file(file).items()}


def test_it_leaves_pictures_and_numbers(trained):
    assert {"samples.png", "denoising.gif", "metrics.json"} <= {path.name for path in (trained / "results").iterdir()}
    assert Image.open(trained / "results" / "denoising.gif").n_frames == 4
    metrics = json.loads((trained / "results" / "metrics.json").read_text())
    assert metrics["real/accuracy"] == 1.0
    for scale in (1, 2):
        names = ("accuracy", "accuracy_shuffled", "fd", "fd_floor", "nearest_drawn", "nearest_test")
        assert {f"guidance_{scale}/{name}" for name in names} <= set(metrics)
    rows = [json.loads(line) for line in (trained / "samples.jsonl").read_text().splitlines()]
    assert [(row["step"], row["after"]) for row in rows] == [(4, "a bar | a ring"), (8, "a bar | a ring")]
    sheet = np.array(Image.open(trained / rows[-1]["drawn"]))[..., 0]  # plain weights above, averaged ones below
    assert sheet.shape == (17 + 2 * 65 + 1, 2 * 65 + 1)
    assert all((head < 99).sum() > 20 and (head == 255).sum() > 500 for head in (sheet[:17, :65], sheet[:17, 65:]))
    halves = sheet[17 : 17 + 66], sheet[17 + 65 :]
    assert not np.array_equal(*halves)
    assert "eval/ema_loss" in (trained / "metrics.jsonl").read_text()


def test_stopping_and_going_on_gives_the_same_bits(trained, data, judge, tmp_path, monkeypatch):
    again, real = config(data, tmp_path, "--judge", str(judge)), loop._update
    calls = []

    def update(*args):
        calls.append(1)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    monkeypatch.setattr(loop, "_update", update)
    with pytest.raises(Interrupted, match="stopped after step 5"):
        main(again)
    main(again)
    first, second = weights(trained), weights(tmp_path)  # these are the averaged ones
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert len(calls) == 8
    name = "samples/step-000008-0-drawn.png"  # by plain weights and by averaged ones
    assert (trained / name).read_bytes() == (tmp_path / name).read_bytes()


def test_a_directory_draws_on_request(trained, tmp_path):
    run = lambda *words: CliRunner().invoke(app, ["vision", "sample", str(trained / "model"), *words])  # noqa: E731
    out, sheet, gif = tmp_path / "out", tmp_path / "sheet.png", tmp_path / "all.gif"
    words = ["--caption", "a bar", "--caption", "a ring", "--num", "3", "--out", str(out), "--steps", "2"]
    found = run(*words, "--sheet", str(sheet), "--gif", str(gif), "--guidance", "2", "--sampler", "heun")
    assert found.output == f"6 images written to {out}\n"
    assert [Image.open(file).size for file in sorted(out.iterdir())] == [(8, 8)] * 6
    assert Image.open(gif).n_frames == 2
    assert Image.open(sheet).size == (3 * 65 + 1, 2 * 65 + 1)
    for words in (("--sheet", str(tmp_path / "sheet.bmp")), ("--gif", str(tmp_path / "nowhere" / "all.gif"))):
        found = run("--caption", "a bar", "--out", str(out), *words)
        assert (found.exit_code, "cannot be written: wanted a name that ends in" in found.output) == (2, True)
    found = run("--caption", "a bar", "--out", str(sheet))
    assert (found.exit_code, "is a file; wanted a folder" in found.output) == (2, True)
    found = run("--out", str(out))
    assert (found.exit_code, "draws after a text: say what, with --caption" in found.output) == (2, True)
    found = run("--caption", "a bar", "--out", str(out), "--steps", "2000")
    assert (found.exit_code, "num_inference_steps is 2000; wanted 1 to 1000" in found.output) == (2, True)


def test_a_u_net_after_classes_learns(data, tmp_path):
    pytest.importorskip("diffusers", reason="the vision extra is not installed")
    flags = ["--network", "unet", "--unet.widths", "[8, 16]", "--unet.num_layers", "1", "--condition", "class"]
    flags += ["--process.objective", "v", "--process.schedule", "cosine", "--unet.num_heads", "2"]
    flags += ["--train.max_steps", "10", "--train.learning_rate", "1e-2", "--train.eval_steps", "5"]
    folder = main(config(data, tmp_path / "run", *flags))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [row["eval/loss"] for row in rows if "eval/loss" in row]
    assert losses[-1] < losses[0]
    sample = ["vision", "sample", str(folder / "model"), "--out", str(tmp_path / "out"), "--num", "1", "--caption"]
    assert CliRunner().invoke(app, [*sample, "ring"]).exit_code == 0
    found = CliRunner().invoke(app, [*sample, "a ring"])
    assert (found.exit_code, "the model knows no class a ring. It knows bar, ring" in found.output) == (2, True)


def test_a_language_model_reads_the_captions_and_stays_as_it_is(nano, data, tmp_path):
    flags = ["--text_model", str(nano / "model"), "--freeze_text", "--train.max_steps", "2"]
    folder = main(config(data, tmp_path, *flags))
    before, after = load_file(nano / "model" / "model.safetensors"), weights(folder)
    read = {name.removeprefix("text_encoder/"): t for name, t in after.items() if name.startswith("text_encoder/")}
    assert len(read) > 10
    assert all(torch.equal(before[f"model.{name}"], tensor) for name, tensor in read.items())


def test_the_text_tower_of_a_pair_reads_the_captions_and_tensorboard_shows_what_is_drawn(data, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    seen = Preprocess(size=8, channels=1, mean=[0.0], std=[1.0])
    language, tokenizer = language_model(None, ModelConfig(preset="nano", context_length=16), ["a bar"] * 9, 384, 16)
    save_clip(tmp_path / "pair", pair_towers(image_tower("mlp", seen), language, 8), tokenizer, seen)
    flags = [
        "--text_model",
        str(tmp_path / "pair"),
        "--freeze_text",
        "--caption_length",
        "16",
        "--train.max_steps",
        "4",
    ]
    flags += ["--train.max_steps", "4", "--report_to", "[tensorboard]"]
    folder = main(config(data, tmp_path / "run", *flags))
    before, after = load_file(tmp_path / "pair" / "model.safetensors"), weights(folder)
    read = {name.removeprefix("text_encoder/"): t for name, t in after.items() if name.startswith("text_encoder/")}
    assert all(torch.equal(before[f"text_model.language_model.{name}"], tensor) for name, tensor in read.items())
    assert len(read) == sum(name.startswith("text_model.language_model.") for name in before) > 10
    events = accumulator.EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    assert [image.step for image in events.Images("drawn")] == [4]


def test_nothing_to_be_drawn_after_is_a_condition_too(data, tmp_path):
    folder = main(config(data, tmp_path / "run", "--condition", "none", "--train.max_steps", "2"))
    sample = ["vision", "sample", str(folder / "model"), "--out", str(tmp_path / "out"), "--num", "2"]
    assert CliRunner().invoke(app, sample).exit_code == 0
    found = CliRunner().invoke(app, [*sample, "--guidance", "2"])
    assert (found.exit_code, "the model has no condition: only 1 goes" in found.output) == (2, True)


@pytest.mark.slow
def test_digits_after_classes_are_the_digits_asked_for(tmp_path):
    """About two minutes: the judge of `classify.py`'s defaults, and a U-Net after a fifth of the default's updates."""
    pytest.importorskip("sklearn", reason="the vision extra is not installed")
    from vision import classify

    flags = ["--train.bf16", "false"]  # one precision a process
    judge = classify.main(load(classify.ClassifyConfig, ["--output_dir", str(tmp_path / "judge"), *flags]))
    flags = ["--condition", "class", "--train.max_steps", "300", "--judge", str(judge / "model")]
    folder = main(load(DiffusionConfig, ["--output_dir", str(tmp_path / "run"), *flags]))
    found = json.loads((folder / "results" / "metrics.json").read_text())
    assert found["guidance_2/accuracy"] >= 0.95
    assert found["guidance_2/accuracy_shuffled"] < 0.2
    assert found["guidance_1/fd"] < 16  # seen: 8.2, at a floor of 2.4


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--caption", "null"), "have no caption, the first is .* or --caption 'a photo of {}'"),
        (("--preprocess.size", "10"), "10 x 10 are not filled by squares of 4"),
        (("--network", "unet", "--preprocess.size", "9"), "cannot be halved 1 times"),
        (("--condition", "none", "--sampling.guidance_scale", "2"), "sampling.guidance_scale 2.0: the model has no"),
        (("--drop_condition", "0", "--sampling.guidance_scale", "2"), "never sees its condition left out"),
        (("--freeze_text",), "freeze_text: a new reader has to learn"),
        (("--process.objective", "eps"), "objective eps with schedule straight: wanted flow with straight"),
        (("--text_model", "nowhere"), "nowhere"),
        (("--judge", "nowhere"), "nowhere"),
        (("--caption_length", "2"), "captions have 2 tokens or more"),
    ],
)
def test_what_cannot_work_is_said(data, tmp_path, flags, message):
    with pytest.raises(BadInput, match=message):
        main(config(data, tmp_path, *flags))


def test_a_judge_of_other_images_is_refused(data, judge, tmp_path):
    with pytest.raises(BadInput, match="sees images with size 8, channels 1, resize pad, these have size 16"):
        main(config(data, tmp_path, "--judge", str(judge), "--preprocess.size", "16"))
