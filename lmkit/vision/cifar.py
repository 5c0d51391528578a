"""CIFAR-10 and CIFAR-100 in their original form: Python pickles, read by an unpickler that can build arrays alone.

A pickle may run any code that it names. This reader knows the five names that a pickled NumPy array of numbers needs
and refuses every other.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np

from lmkit.errors import BadInput

_ARRAY = {"numpy": ("dtype", "ndarray"), "_codecs": ("encode",)}
_ARRAY |= {"numpy.core.multiarray": ("_reconstruct",), "numpy._core.multiarray": ("_reconstruct",)}


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _ARRAY.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


def is_cifar(path: Path) -> bool:
    """Whether a folder holds the batches of CIFAR-10 or CIFAR-100."""
    return (path / "data_batch_1").is_file() or ((path / "train").is_file() and (path / "meta").is_file())


def read_cifar(path: Path) -> dict[str, tuple[np.ndarray, list[str]]]:
    """Split -> (uint8 [N, 32, 32, 3], class names). Raises BadInput for a pickle that is not a CIFAR batch."""
    files = {"train": sorted(path.glob("data_batch_*")) or [path / "train"]}
    files["test"] = [file for file in (path / "test_batch", path / "test") if file.is_file()]
    names = next((_load(path / name) for name in ("batches.meta", "meta") if (path / name).is_file()), {})
    words = names.get(b"label_names", names.get(b"fine_label_names"))
    splits = {}
    for split, batches in files.items():
        if not batches:
            continue
        loaded = [_load(file) for file in batches]
        numbers = [n for batch in loaded for n in batch.get(b"labels", batch.get(b"fine_labels", []))]
        try:
            images = np.concatenate([batch[b"data"] for batch in loaded]).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
            splits[split] = (images, [words[n].decode() if words else str(n) for n in numbers])
        except (KeyError, ValueError, IndexError, AttributeError, TypeError) as error:
            raise BadInput(f"{batches[0]} is no CIFAR batch of 32x32 images and labels ({error}).") from error
    return splits


def _load(file: Path) -> dict[bytes, Any]:
    with file.open("rb") as handle:
        try:
            content = _ArraysOnly(handle, encoding="bytes").load()
        except Exception as error:  # a damaged pickle can raise anything
            raise BadInput(
                f"{file} is not read: {error}. A CIFAR batch holds lists and arrays of numbers alone."
            ) from error
    if not isinstance(content, dict):
        raise BadInput(f"{file} holds a {type(content).__name__}; wanted the dictionary of a CIFAR batch.")
    return content
