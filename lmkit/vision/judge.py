"""Drawn images judged by a classifier: do they show what was asked for, and are they spread as real ones are?

The Frechet distance is on that classifier's features: named FD, because FID is the same on one fixed Inception network.
A number of it means something beside its floor: the distance of as many real images, of the same labels, to the test.

Shapes: N images, C channels, S pixels of side, K parts of an image, D features of a part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lmkit.data.order import shuffled
from lmkit.errors import BadInput
from lmkit.vision.classifier import ImageNetwork, channels_last, load_classifier, pooled
from lmkit.vision.metrics import frechet_distance
from lmkit.vision.options import Preprocess
from lmkit.vision.pixels import normalize
from lmkit.vision.scenes import digits_in


@dataclass(frozen=True)
class Judge:
    """A classifier that is shown K parts of an image, from left to right, each a class of its own; mostly 1."""

    model: ImageNetwork
    preprocess: Preprocess
    classes: list[str]
    num_parts: int

    def numbers(self, labels: Sequence[str]) -> Tensor:
        """int64 [N, K]: the classes that labels name."""
        return torch.tensor([[self.classes.index(part) for part in digits_in(label)] for label in labels])

    @torch.no_grad()
    def look(self, pixels: Tensor, batch_size: int = 512) -> tuple[Tensor, Tensor]:
        """(classes it takes the parts for, int64 [N, K]; features [N, K D]) of uint8 [N, C, S, S]."""
        features = torch.cat(
            [
                pooled(self.model.body(channels_last(normalize(part, self.preprocess))))
                for part in parts(pixels, self.num_parts).split(batch_size)
            ]
        )
        predicted = self.model.head(features).argmax(1)
        return predicted.view(-1, self.num_parts), features.reshape(len(pixels), -1)


def parts(pixels: Tensor, number: int) -> Tensor:
    """Squares side by side in the middle rows of uint8 [N, C, S, S], as padding put them there: [N K, C, S/K, S/K].

    >>> parts(torch.arange(16).view(1, 1, 4, 4), 2).flatten(1).tolist()
    [[4, 5, 8, 9], [6, 7, 10, 11]]
    """
    side = pixels.shape[-1] // number
    top = (pixels.shape[-1] - side) // 2
    rows = pixels[:, :, top : top + side, : side * number]
    return rows.unfold(3, side, side).permute(0, 3, 1, 2, 4).flatten(0, 1)


def load_judge(path: Path, seen: Preprocess, labels: Sequence[str | None]) -> Judge:
    """The classifier of a directory as the judge of images preprocessed as `seen`, asked for by `labels`.

    Raises BadInput for a judge of other images, other classes or another kind, and where images have no labels.
    """
    if None in labels:
        raise BadInput(f"{labels.count(None)} of {len(labels)} test images have no label, which the judge asks for.")
    model, preprocess, classes = load_classifier(path)
    if not isinstance(model, ImageNetwork):
        raise BadInput(f"{path} is a {type(model).__name__}; a judge is a network of lmkit.vision.cnn.")
    named = [digits_in(label) for label in labels]
    counts = {len(names) for names in named}
    if unknown := sorted({name for names in named for name in names} - set(classes)):
        raise BadInput(f"the judge {path} does not know {', '.join(unknown[:10])}. It knows {', '.join(classes)}.")
    if len(counts) > 1:
        raise BadInput(f"labels name {min(counts)} to {max(counts)} things; the judge needs the same number in each.")
    (num_parts,) = counts
    wanted, found = (
        {"size": own.size * times, "channels": own.channels, "resize": own.resize}
        for own, times in ((preprocess, num_parts), (seen, 1))
    )
    if wanted != found:
        raise BadInput(
            f"the judge {path} sees images with {_settings(wanted)}, these have {_settings(found)}. Judged otherwise "
            "than it was trained, it would guess: train one with the same preprocess by recipes/vision/classify.py."
        )
    return Judge(model, preprocess, classes, num_parts)


def _settings(values):
    return ", ".join(f"{name} {value}" for name, value in values.items())


def judged(judge: Judge, images: Tensor, labels: Sequence[str], known: set[str], seed: int = 0) -> dict[str, float]:
    """Shares of uint8 [N, C, S, S] that show their label: accuracy, all parts right in their places.

    accuracy_shuffled: the same with the labels of other images, which is chance. accuracy_any_order: where there are
    several parts, right but for their places. known: labels of train; where there are others too, _seen and _held_out
    are apart.
    """
    predicted, wanted = judge.look(images)[0], judge.numbers(labels)
    other = wanted[torch.from_numpy(shuffled(np.arange(len(wanted)), len(wanted), seed))]
    hits = {"accuracy": (predicted == wanted).all(1).double()}
    if judge.num_parts > 1:
        hits["accuracy_any_order"] = (predicted.sort(1).values == wanted.sort(1).values).all(1).double()
    found = {name: hit.mean().item() for name, hit in hits.items()}
    found["accuracy_shuffled"] = (predicted == other).all(1).double().mean().item()
    seen = torch.tensor([label in known for label in labels])
    if seen.any() and not seen.all():
        for name, hit in hits.items():
            found |= {f"{name}_seen": hit[seen].mean().item(), f"{name}_held_out": hit[~seen].mean().item()}
    return found


def distances(
    judge: Judge, drawn: Tensor, test: Tensor, test_labels: Sequence[str], train: Tensor, train_labels: Sequence[str]
) -> dict[str, float]:
    """fd of the drawn images to the test's, row for row asked for alike; fd_floor, of as many real images of train
    with the same labels; and how near the drawn and the test's are to the nearest of train, in pixels: nearest_drawn
    much below nearest_test would mean copies. Test images whose label train lacks are left out.
    """
    by_label: dict[str, list[int]] = {}
    for row, label in enumerate(train_labels):
        by_label.setdefault(label, []).append(row)
    rows = [row for row, label in enumerate(test_labels) if label in by_label]
    taken: dict[str, int] = {}
    twins = []
    for row in rows:
        label = test_labels[row]
        taken[label] = taken.get(label, -1) + 1
        twins.append(by_label[label][taken[label] % len(by_label[label])])
    real = judge.look(test[rows])[1]
    return {
        "fd": frechet_distance(judge.look(drawn[rows])[1], real),
        "fd_floor": frechet_distance(judge.look(train[twins])[1], real),
        "nearest_drawn": _nearest(drawn, train),
        "nearest_test": _nearest(test, train),
    }


def _nearest(images, others):
    images, others = (pixels.flatten(1).float() / 255 for pixels in (images, others))
    return torch.cat([torch.cdist(part, others).amin(1) for part in images.split(256)]).mean().item()
