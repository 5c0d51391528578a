"""Pictures about pictures, as PNG files: grids, confusion matrices, a classifier's worst mistakes, a GIF."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

SIDE = 64  # pixels of the screen, at least about, for an image
LINE, LETTER, MARGIN = 13, 7, 2  # pixels of a line and a letter of the words above a sheet, and around them


def grid(images: Tensor, columns: int) -> Image.Image:
    """uint8 [N, C, S, S] side by side, row after row, a line of grey between them; small ones larger than they are."""
    rows, scale = math.ceil(len(images) / columns), max(1, SIDE // images.shape[-1])
    images = images.cpu().repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    _, channels, height, width = images.shape
    sheet = torch.full((channels, rows * (height + 1) + 1, columns * (width + 1) + 1), 96, dtype=torch.uint8)
    for index, image in enumerate(images):
        top, left = (index // columns) * (height + 1) + 1, (index % columns) * (width + 1) + 1
        sheet[:, top : top + height, left : left + width] = image
    array = sheet.permute(1, 2, 0).numpy()
    return Image.fromarray(array.squeeze(2) if channels == 1 else array)


def headed(sheet: Image.Image, words: Sequence[str]) -> Image.Image:
    """A `grid` of one column for each of `words`, with the words above it, in lines of the column's width."""
    width = sheet.width // len(words)
    heads = [textwrap.fill(word, max(width // LETTER, 1)) for word in words]
    height = 2 * MARGIN + LINE * (1 + max(head.count("\n") for head in heads))
    whole = Image.new(sheet.mode, (sheet.width, sheet.height + height), "white")
    whole.paste(sheet, (0, height))
    font, draw = ImageFont.load_default(LINE - MARGIN), ImageDraw.Draw(whole)
    for column, head in enumerate(heads):
        draw.multiline_text((column * width + MARGIN, MARGIN), head, "black", font, spacing=MARGIN)
    return whole


def save_gif(frames: Sequence[Image.Image], path: Path, milliseconds: int = 80) -> None:
    """An animation that pauses on its last frame and starts again."""
    durations = [milliseconds] * (len(frames) - 1) + [20 * milliseconds]
    frames[0].save(path, save_all=True, append_images=list(frames[1:]), duration=durations, loop=0)


def save_confusion(confusion: Tensor, classes: Sequence[str], path: Path) -> None:
    """The confusion matrix [K, K], a row a true class: shares of a row as shades, counts as numbers (to 30 classes)."""
    side = 0.42 * len(classes) + 0.9 + 0.09 * max(map(len, classes))  # inches: cells, and names beside them
    figure, axes = _figure(side + 0.4, side)
    shares = confusion / confusion.sum(1, keepdim=True).clamp(min=1)
    axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="predicted", ylabel="true")
    axes.set_xticks(range(len(classes)), classes, rotation=90)
    axes.set_yticks(range(len(classes)), classes)
    if len(classes) <= 30:
        for row, column in confusion.nonzero().tolist():
            shade = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, f"{confusion[row, column]}", ha="center", va="center", fontsize=7, color=shade)
    figure.savefig(path, dpi=120)


def save_mistakes(
    pixels: Tensor, labels: Tensor, logits: Tensor, classes: Sequence[str], path: Path, number: int = 25
) -> None:
    """The wrong images the classifier was surest of, each with what it is and what it was taken for."""
    probabilities = logits.softmax(1)
    confidence, predicted = probabilities.max(1)
    order = torch.where(predicted != labels, confidence, -1.0).argsort(descending=True)
    worst = order[: min(number, int((predicted != labels).sum()))].tolist()
    columns = max(1, min(5, len(worst)))
    rows = max(1, math.ceil(len(worst) / columns))
    figure, axes = _figure(2 * columns + 0.4, 2.2 * rows + 0.6, rows, columns)
    for cell in axes.flat:
        cell.axis("off")
    for cell, index in zip(axes.flat, worst):
        image = pixels[index].permute(1, 2, 0).squeeze(2).numpy()
        cell.imshow(image, cmap="gray" if image.ndim == 2 else None, vmin=0, vmax=255)
        true, taken = classes[labels[index]], classes[predicted[index]]
        cell.set_title(textwrap.fill(f"{true}, not {taken} ({confidence[index]:.0%})", 30), fontsize=8)
    figure.suptitle(f"{len(worst)} worst mistakes" if worst else "no mistakes", fontsize=10)
    figure.savefig(path, dpi=120)


def show_in_tensorboard(directory: Path, classifier: nn.Module, images: Tensor) -> None:
    """Adds to a stage's TensorBoard: the graph of a classifier that reads `images` [N, C, S, S], and its results."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(directory / "tensorboard") as writer:
        device = next(classifier.parameters()).device
        writer.add_graph(_Logits(classifier).eval(), images.to(device), use_strict_trace=False)
        for path in sorted((directory / "results").glob("*.png")):
            writer.add_image(path.stem, np.asarray(Image.open(path).convert("RGB")), dataformats="HWC")


class _Logits(nn.Module):
    """A tensor from what gives a dictionary, which tracing refuses."""

    def __init__(self, classifier):
        super().__init__()
        self.classifier = classifier

    def forward(self, pixel_values):
        return self.classifier(pixel_values=pixel_values).logits


def _figure(width, height, rows=None, columns=None):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(width, 3), max(height, 2.5)), layout="constrained")
    FigureCanvasAgg(figure)
    if rows is None:
        return figure, figure.add_subplot()
    return figure, figure.subplots(rows, columns, squeeze=False)
