"""What a classifier does on a split: numbers, a report, the confusion matrix, the worst mistakes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lmkit.artifact import write_json
from lmkit.errors import BadInput
from lmkit.vision.classifier import classify, load_classifier
from lmkit.vision.data import Example, read_images
from lmkit.vision.metrics import classification_report, classification_scores, confusion_matrix
from lmkit.vision.options import Preprocess
from lmkit.vision.pixels import load_pixels
from lmkit.vision.plots import save_confusion, save_mistakes


def label_ids(examples: Sequence[Example], classes: Sequence[str]) -> Tensor:
    """int64 [N]: the place of each label in `classes`. BadInput names a class that the model never saw."""
    number = {name: index for index, name in enumerate(classes)}
    unknown = sorted({str(example.label) for example in examples} - set(number))
    if unknown:
        raise BadInput(
            f"the data has classes that the model never saw: {', '.join(unknown)}. It knows {', '.join(classes)}."
        )
    return torch.tensor([number[example.label] for example in examples])


def scores(model: nn.Module, pixels: Tensor, labels: Tensor, preprocess: Preprocess) -> dict[str, float]:
    """accuracy and loss (nats per image) on uint8 [N, C, S, S] with labels [N]."""
    logits = classify(model, pixels, preprocess)
    return {
        "accuracy": (logits.argmax(1) == labels).double().mean().item(),
        "loss": F.cross_entropy(logits, labels).item(),
    }


def write_report(
    folder: Path, logits: Tensor, pixels: Tensor, labels: Tensor, classes: Sequence[str]
) -> tuple[dict[str, Any], str]:
    """Writes metrics.json, report.txt, confusion.png and mistakes.png; (the metrics, the report's text)."""
    confusion = confusion_matrix(logits.argmax(1), labels, len(classes))
    per_class = {name: column.tolist() for name, column in classification_scores(confusion).items()}
    correct = int(confusion.diag().sum())
    metrics = {"accuracy": correct / len(labels), "loss": F.cross_entropy(logits, labels).item()}
    metrics |= {"macro_f1": sum(per_class["f1"]) / len(classes), "num_images": len(labels)}
    text = classification_report(confusion, classes)
    write_json(folder / "metrics.json", {**metrics, "classes": list(classes), **per_class})
    (folder / "report.txt").write_text(text + "\n", encoding="utf-8")
    save_confusion(confusion, classes, folder / "confusion.png")
    save_mistakes(pixels, labels, logits, classes, folder / "mistakes.png")
    return metrics, text


def evaluate_directory(model: Path, data: str, split: str, out: Path, skip_bad: bool = False) -> tuple[dict, str]:
    """`write_report` for a model directory on a split of any source of images, preprocessed as in its training."""
    classifier, preprocess, classes = load_classifier(model)
    splits = read_images(data)
    if split not in splits:
        raise BadInput(f"{data} has the splits {', '.join(splits)}; wanted {split!r}. Name one with --split.")
    pixels, examples, _ = load_pixels(splits[split], preprocess, skip_bad)
    labels = label_ids(examples, classes)
    out.mkdir(parents=True, exist_ok=True)
    return write_report(out, classify(classifier, pixels, preprocess), pixels, labels, classes)


def predict(model: Path, images: Sequence[Path], top: int) -> list[list[tuple[str, float]]]:
    """For each image file the `top` classes with their probabilities, the likeliest first."""
    classifier, preprocess, classes = load_classifier(model)
    for path in images:
        if not Path(path).is_file():
            raise BadInput(f"{path} is no file; wanted an image.")
    pixels, _, _ = load_pixels([Example(str(path), Path(path)) for path in images], preprocess)
    best = classify(classifier, pixels, preprocess).softmax(1).topk(min(top, len(classes)))
    return [[(classes[i], p) for i, p in zip(ids, ps)] for ids, ps in zip(best.indices.tolist(), best.values.tolist())]
