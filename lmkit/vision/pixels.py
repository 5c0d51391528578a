"""From encoded images to uint8 tensors of one size, and to normalised floats: the preprocessing a model keeps.

How an image was made square decides what a network sees: the same digits stretched instead of padded are read at
chance. So `Preprocess` is saved beside the model and every later step uses it.

Shapes: N images, C channels, S pixels of side.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from lmkit.errors import BadInput
from lmkit.vision.data import Example
from lmkit.vision.options import Preprocess

MAX_BYTES = 8 * 2**30  # of one split's pixels, held in memory


def decode(example: Example, channels: int) -> Image.Image:
    """The picture, upright, as L or RGB; transparent places white, 16 bits scaled to 8. BadInput when it is damaged."""
    try:
        if isinstance(example.image, np.ndarray):
            image = Image.fromarray(example.image.squeeze())
        elif isinstance(example.image, bytes):
            image = Image.open(io.BytesIO(example.image))
        else:
            image = Image.open(example.image)
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I") or image.mode == "F":
            values = np.asarray(image, np.float64)
            image = Image.fromarray((values / (257 if values.max() > 255 else 1)).clip(0, 255).round().astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("L" if channels == 1 else "RGB")
    except (OSError, ValueError, TypeError, SyntaxError, Image.DecompressionBombError) as error:
        size = "is empty" if _is_empty(example.image) else f"cannot be decoded ({error})"
        raise BadInput(f"{example.name} {size}. Remove it, or set skip_bad to leave such files out.") from error


def square(image: Image.Image, size: int, resize: str) -> Image.Image:
    """The picture as size x size: stretched, its centre cropped, or padded with black to a square first."""
    if resize == "stretch":
        return image.resize((size, size), Image.Resampling.BILINEAR)
    if resize == "crop":
        return ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
    return ImageOps.pad(image, (size, size), Image.Resampling.BILINEAR, color=0)


def load_pixels(
    examples: Sequence[Example], preprocess: Preprocess, skip_bad: bool = False
) -> tuple[Tensor, list[Example], list[str]]:
    """(uint8 [N, C, S, S], the examples they are, a line for each one left out).

    skip_bad: leave out what cannot be decoded instead of raising BadInput at the first.
    """
    shape = (len(examples), preprocess.channels, preprocess.size, preprocess.size)
    if (needed := int(np.prod(shape))) > MAX_BYTES:
        raise BadInput(
            f"{len(examples):,} images of {preprocess.size} x {preprocess.size} take {needed / 2**30:.1f} GiB; "
            f"the limit is {MAX_BYTES / 2**30:.0f}. Lower preprocess.size, or split the data."
        )
    pixels, kept, bad = np.empty(shape, np.uint8), [], []
    for example in examples:
        try:
            image = square(decode(example, preprocess.channels), preprocess.size, preprocess.resize)
        except BadInput as error:
            if not skip_bad:
                raise
            bad.append(str(error))
            continue
        pixels[len(kept)] = np.asarray(image, np.uint8).reshape(*shape[2:], shape[1]).transpose(2, 0, 1)
        kept.append(example)
    return torch.from_numpy(pixels[: len(kept)]), kept, bad


def load_splits(
    splits: Mapping[str, Sequence[Example]], preprocess: Preprocess, skip_bad: bool, say: Callable[[str], None]
) -> dict[str, tuple[Tensor, list[Example]]]:
    """Split -> (uint8 [N, C, S, S], the examples they are); `say` is told of damaged images that are left out."""
    loaded = {name: load_pixels(examples, preprocess, skip_bad) for name, examples in splits.items()}
    for name, (_, _, bad) in loaded.items():
        if bad:
            say(f"{len(bad)} damaged images left out of {name}; the first: {bad[0]}")
    return {name: (pixels, kept) for name, (pixels, kept, _) in loaded.items()}


def measured(preprocess: Preprocess, pixels: Tensor) -> Preprocess:
    """`preprocess` with the mean and standard deviation of `pixels`, uint8 [N, C, S, S], where it states none."""
    if preprocess.mean is not None and preprocess.std is not None:
        return preprocess
    counts = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in pixels.unbind(1)]).double()
    values = torch.arange(256, dtype=torch.float64) / 255
    mean = (counts * values).sum(1) / counts.sum(1)
    variance = (counts * (values - mean[:, None]) ** 2).sum(1) / counts.sum(1)
    found = {
        "mean": [round(x, 6) for x in mean.tolist()],
        "std": [round(max(x, 1e-3), 6) for x in variance.sqrt().tolist()],
    }
    return preprocess.model_copy(update={k: v for k, v in found.items() if getattr(preprocess, k) is None})


def normalize(pixels: Tensor, preprocess: Preprocess) -> Tensor:
    """uint8 (or float in 0..255) [N, C, S, S] to float32, mean 0 and deviation 1 on the data it was measured on."""
    mean = torch.tensor(preprocess.mean, device=pixels.device)[:, None, None] * 255
    std = torch.tensor(preprocess.std, device=pixels.device)[:, None, None] * 255
    return (pixels.float() - mean) / std


def _is_empty(image):
    return image == b"" if isinstance(image, bytes) else isinstance(image, Path) and image.stat().st_size == 0
