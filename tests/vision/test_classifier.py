"""Classifiers as directories; what each way of fine-tuning may change; views and mixtures of images."""

import builtins
import json

import pytest
import torch
from transformers import AutoModelForImageClassification, ResNetConfig, ResNetForImageClassification

from lmkit.errors import BadInput
from lmkit.vision.augment import mixed, random_views
from lmkit.vision.classifier import (
    Classification,
    classify,
    load_classifier,
    new_classifier,
    with_classes,
    with_lora,
)
from lmkit.vision.options import Augment, Preprocess

PREPROCESS = Preprocess(size=8, channels=1, mean=[0.3], std=[0.4])
PIXELS = torch.randint(0, 256, (12, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(12) % 3
CLASSES = ["ant", "bee", "cat"]


def task(mode="full", model=None, head_batches=0, augment=None):
    torch.manual_seed(1)
    model = model or new_classifier("resnet18_narrow", PREPROCESS, CLASSES)
    return Classification(model, PREPROCESS, augment or Augment(), mode, head_batches)


def train(task, steps=2, optimizer=None):
    task.train()
    optimizer = optimizer or torch.optim.AdamW([p for p in task.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        loss, count = task(PIXELS, LABELS)
        (loss / count).backward()
        optimizer.step()
        optimizer.zero_grad()
    return task


def state(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def changed(before, module):
    return {name for name, tensor in module.state_dict().items() if not torch.equal(before[name], tensor)}


def test_a_directory_gives_back_logits_preprocessing_and_classes(tmp_path):
    model = train(task()).model
    model.save_pretrained(tmp_path)
    PREPROCESS.save(tmp_path)
    loaded, preprocess, classes = load_classifier(tmp_path)
    assert (preprocess, classes) == (PREPROCESS, CLASSES)
    assert torch.equal(classify(loaded, PIXELS, PREPROCESS), classify(model, PIXELS, PREPROCESS))
    assert type(AutoModelForImageClassification.from_pretrained(tmp_path)).__name__ == "ImageNetwork"


def test_the_loss_is_summed_and_counted():
    network = task().eval()
    loss, count = network(PIXELS, LABELS)
    logits = classify(network.model, PIXELS, PREPROCESS)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, LABELS, reduction="sum"))
    assert count == 12


def test_frozen_leaves_the_body_and_its_running_statistics_to_the_bit():
    network = task("frozen")
    before = state(network.model.body)
    head = state(network.model.head)
    train(network)
    assert changed(before, network.model.body) == set()
    assert changed(head, network.model.head) == {"weight", "bias"}


def test_gradual_thaws_the_body_after_the_heads_batches():
    network = task("gradual", head_batches=2)
    before = state(network.model.body)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    train(network, 2, optimizer)
    assert changed(before, network.model.body) == set()
    train(network, 1, optimizer)
    assert len(changed(before, network.model.body)) == len(before)


def test_lora_trains_adapters_and_head_and_merges_to_a_plain_network():
    plain = new_classifier("resnet18_narrow", PREPROCESS, CLASSES)
    before = state(plain.body)
    network = task("lora", with_lora(plain))
    assert all("lora_" in n or "head" in n for n, p in network.named_parameters() if p.requires_grad)
    train(network)
    tuned = network.model.eval()
    expected = classify(tuned, PIXELS, PREPROCESS)
    merged = tuned.merge_and_unload()
    torch.testing.assert_close(classify(merged, PIXELS, PREPROCESS), expected, atol=1e-4, rtol=1e-4)
    assert set(merged.body.state_dict()) == set(before)
    assert {name.rsplit(".", 1)[1] for name in changed(before, merged.body)} == {"weight"}  # no running statistics


def test_other_classes_keep_the_body_and_get_a_new_head(tmp_path):
    model = train(task()).model
    model.save_pretrained(tmp_path)
    PREPROCESS.save(tmp_path)
    other, preprocess = with_classes(tmp_path, ["x", "y"])
    assert preprocess == PREPROCESS
    assert changed(state(model.body), other.body) == set()
    assert other.head.out_features == 2
    assert other.config.id2label == {0: "x", 1: "y"}
    same, _ = with_classes(tmp_path, CLASSES)
    assert changed(state(model), same) == set()


def test_a_directory_of_transformers_gets_a_new_head(tmp_path):
    sizes = {"num_channels": 1, "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    ResNetForImageClassification(ResNetConfig(**sizes, num_labels=7)).save_pretrained(tmp_path)
    model = new_classifier(f"hf:{tmp_path}", PREPROCESS, CLASSES)
    network = task("frozen", model)
    before = state(model.resnet)
    train(network)
    assert changed(before, model.resnet) == set()
    assert classify(model, PIXELS, PREPROCESS).shape == (12, 3)
    with pytest.raises(BadInput, match=r"is not a model directory: it has no config\.json"):
        new_classifier(f"hf:{tmp_path}/nothing", PREPROCESS, CLASSES)


def test_timm_is_asked_for_by_name_and_its_absence_said(monkeypatch):
    real = builtins.__import__

    def without_timm(name, *args, **kwargs):
        if name == "timm":
            raise ImportError("No module named 'timm'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_timm)
    with pytest.raises(BadInput, match=r"timm:resnet10t needs timm, which needs a torchvision .* use a network"):
        new_classifier("timm:resnet10t", PREPROCESS, CLASSES)


@pytest.mark.parametrize(
    ("file", "message"), [("config.json", "has no config.json"), ("preprocess.json", "nobody knows")]
)
def test_an_incomplete_directory_is_refused(tmp_path, file, message):
    new_classifier("softmax_regression", PREPROCESS, CLASSES).save_pretrained(tmp_path)
    PREPROCESS.save(tmp_path)
    (tmp_path / file).unlink()
    with pytest.raises(BadInput, match=message):
        load_classifier(tmp_path)


def test_a_directory_of_another_kind_is_refused(tmp_path):
    ResNetConfig().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "vision-text-dual-encoder"}))
    PREPROCESS.save(tmp_path)
    with pytest.raises(BadInput, match=r"is no image classifier; wanted what recipes/vision/classify\.py writes"):
        load_classifier(tmp_path)


def test_code_in_a_directory_is_not_run(tmp_path):
    (tmp_path / "config.json").write_text('{"auto_map": {"AutoModelForImageClassification": "evil.Model"}}')
    with pytest.raises(BadInput, match="auto_map"):
        load_classifier(tmp_path)


def test_mixup_mixes_images_and_targets_alike():
    torch.manual_seed(0)
    images = torch.eye(3).repeat(4, 1)[:, :, None, None]  # the image of class k is 1 in place k
    found, targets = mixed(images, torch.arange(3).repeat(4), 3, alpha=0.4)
    torch.testing.assert_close(targets.sum(1), torch.ones(12))
    torch.testing.assert_close(found.flatten(1), targets)
    assert (targets.max(1).values < 1).any()


@pytest.mark.parametrize(
    "options", [{"shift": 0.25}, {"rotation": 30}, {"flip": True}, {"jitter": 0.5}, {"erase": 1.0}, {"randaug": True}]
)
def test_each_view_changes_images_by_torchs_own_chance(options):
    pytest.importorskip("kornia", reason="the vision extra is not installed")
    images, augment = PIXELS.float(), Augment(**options)
    torch.manual_seed(3)
    first = random_views(images, augment)
    torch.manual_seed(3)
    assert torch.equal(random_views(images, augment), first)
    assert first.shape == images.shape
    assert not torch.equal(first, images)
    assert first.min() >= -1e-3
    assert first.max() <= 255 + 1e-2
    assert not torch.equal(random_views(images, augment), first)


def test_no_view_is_the_image_itself():
    images = PIXELS.float()
    assert random_views(images, Augment(mixup=0.2)) is images
