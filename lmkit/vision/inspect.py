"""What a source of images holds, looked at before anything is trained on it."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from lmkit.errors import BadInput
from lmkit.vision.data import read_images
from lmkit.vision.options import Preprocess
from lmkit.vision.pixels import decode, load_pixels, measured


def inspect(source: str | Path, label_pattern: str | None = None) -> list[str]:
    """Lines for people: splits, classes, sizes, modes, damaged files, duplicates in and across splits, mean, deviation.

    Two images are the same when their pixels are, and alike when each of 16 x 16 grey places is brighter than its left
    neighbour in both or in neither.
    """
    lines: list[str] = []
    same: dict[bytes, str] = {}
    alike: dict[bytes, str] = {}
    splits = read_images(source, label_pattern)
    for split, examples in splits.items():
        sizes, modes, repeats, bad = Counter(), Counter(), Counter(), []
        for example in examples:
            try:
                image = decode(example, 3)
            except BadInput as error:
                bad.append(str(error))
                continue
            sizes[f"{image.width}x{image.height}"] += 1
            modes["grey" if _is_grey(image) else "colour"] += 1
            pixels = hashlib.sha256(f"{image.size}".encode() + image.tobytes()).digest()
            if pixels in same:
                repeats[f"the same as one of {same[pixels]}"] += 1
            elif (likeness := _likeness(image)) in alike and alike[likeness] != split:
                repeats[f"much like one of {alike[likeness]}"] += 1
            same.setdefault(pixels, split)
            alike.setdefault(_likeness(image), split)
        classes = sorted(Counter(str(example.label) for example in examples).items())
        lines += [
            f"{split}: {len(examples):,} images, {sum(example.caption is not None for example in examples):,} captions",
            f"  classes ({len(classes)}): " + ", ".join(f"{name} {count}" for name, count in classes),
            f"  sizes: {_most(sizes)}; {_most(modes)}",
            f"  damaged: {len(bad)}",
            *(f"    {text}" for text in bad[:5]),
            *(f"  {count} {text}" for text, count in sorted(repeats.items())),
        ]
    pixels, _, _ = (
        load_pixels(splits["train"], Preprocess(), skip_bad=True) if "train" in splits else (None, None, None)
    )
    if pixels is not None and len(pixels):
        found = measured(Preprocess(), pixels)
        lines.append(f"train, padded to {found.size} x {found.size}: mean {found.mean}, deviation {found.std}")
    return lines


def _is_grey(image: Image.Image) -> bool:
    array = np.asarray(image)
    return bool((array == array[..., :1]).all())


def _likeness(image: Image.Image) -> bytes:
    small = np.asarray(image.convert("L").resize((17, 16), Image.Resampling.BILINEAR), np.int16)
    return np.packbits(small[:, 1:] > small[:, :-1]).tobytes()


def _most(counts: Counter, number: int = 5) -> str:
    shown: Iterable[str] = (f"{name} ({count:,})" for name, count in counts.most_common(number))
    rest = len(counts) - number
    return ", ".join(shown) + (f" and {rest} others" if rest > 0 else "")
