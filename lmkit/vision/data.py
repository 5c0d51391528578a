"""Images with labels or captions, from the forms they come in, to examples by split.

    splits = read_images("photos/")        # {"train": [Example, ...], "test": [...]}

Nothing is decoded here: `lmkit.vision.pixels` does that, and names the file that it cannot read. What a source is, is
seen from its content: label folders, a metadata file, IDX files (MNIST), CIFAR batches, a saved dataset, Parquet, npz.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from lmkit.data.order import shuffled
from lmkit.errors import BadInput
from lmkit.vision.cifar import is_cifar, read_cifar

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
SPLITS = {"train": "train", "training": "train", "val": "validation", "valid": "validation", "dev": "validation"}
SPLITS |= {"validation": "validation", "test": "test", "testing": "test", "t10k": "test"}


@dataclass(frozen=True, slots=True)
class Example:
    """One image: where it is from, its encoded bytes, file or uint8 array [H, W] or [H, W, 3], label and caption."""

    name: str
    image: Path | bytes | np.ndarray
    label: str | None = None
    caption: str | None = None


def read_images(source: str | Path, label_pattern: str | None = None) -> dict[str, list[Example]]:
    """The examples of each split that `source` holds; "train" alone when it does not say.

    source: a folder, an .npz or .parquet file, `builtin:digits`, or `builtin:digit_pairs` and
    `builtin:digit_pairs_left_of` (`lmkit.vision.scenes`).
    label_pattern: a regular expression with one group, matched in the file name; the group is the label.

    Raises BadInput for what is missing or holds no images.
    """
    if str(source) == "builtin:digits":
        return _digits()
    if str(source) in ("builtin:digit_pairs", "builtin:digit_pairs_left_of"):
        from lmkit.vision.scenes import digit_pairs

        return digit_pairs(_digits(), one_form=str(source).endswith("left_of"))
    path = Path(source)
    if not path.exists():
        raise BadInput(f"{path} does not exist; wanted a folder of images, an .npz, a .parquet, or builtin:digits.")
    if path.is_file():
        readers: dict[str, Callable] = {".npz": _npz, ".parquet": lambda p: {_split_of(p.stem): _parquet(p)}}
        if path.suffix not in readers:
            raise BadInput(f"{path} is not a form of images lmkit reads; wanted a folder, .npz or .parquet.")
        return readers[path.suffix](path)
    if label_pattern is not None:
        found = {split: _by_pattern(files, label_pattern) for split, files in _files_by_split(path).items()}
    elif any(path.glob("*-idx?-ubyte*")):
        found = _idx(path)
    elif is_cifar(path):
        found = {split: _arrays(f"{path}/{split}", *rest) for split, rest in read_cifar(path).items()}
    elif (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file():
        found = _saved(path)
    elif parquets := sorted(path.rglob("*.parquet")):
        found = {}
        for file in parquets:
            found.setdefault(_split_of(file.stem), []).extend(_parquet(file))
    else:
        found = {split: _folder(root) for split, root in _split_folders(path).items()}
    found = {split: found[split] for split in ("train", "validation", "test") if found.get(split)}
    if not found:
        raise BadInput(f"{path} holds no images ({', '.join(sorted(SUFFIXES))}), IDX files, CIFAR batches or Parquet.")
    return found


def class_names(splits: dict[str, list[Example]]) -> list[str]:
    """The labels of the train split in order: numbers by value, words by letter. Raises BadInput on a missing label.

    >>> class_names({"train": [Example("a", b"", "10"), Example("b", b"", "9")]})
    ['9', '10']
    """
    for split, examples in splits.items():
        missing = [example.name for example in examples if example.label is None]
        if missing:
            raise BadInput(
                f"{len(missing)} of {len(examples)} images of {split} have no label, the first is {missing[0]}. "
                "Put images into one folder a class, or give metadata.csv with file_name and label."
            )
    names = sorted({example.label for example in splits["train"]}, key=_natural)
    if len(names) < 2:
        raise BadInput(f"there is one class only, {names[0]!r}; a classifier needs two or more.")
    for split, examples in splits.items():
        unknown = sorted({example.label for example in examples} - set(names), key=_natural)
        if unknown:
            raise BadInput(f"the split {split} has classes that train lacks: {', '.join(unknown)}.")
    return names


def classification_splits(
    source: str, label_pattern: str | None, fractions: dict[str, float], limit: int | None, seed: int
) -> tuple[dict[str, list[Example]], list[str]]:
    """(examples of train, test and, where asked for, validation; the classes in order).

    fractions: share of each class taken from train for a split that the source does not have; 0: none is made. A source
    with validation images and no test images is tested on those, unless a validation split is asked for.
    limit: keep that many training images of each class, drawn by `seed`.
    """
    splits = read_images(source, label_pattern)
    if "train" not in splits:
        raise BadInput(f"{source} has the splits {', '.join(splits)} and no train.")
    if "test" not in splits and "validation" in splits and not fractions["validation"]:
        splits["test"] = splits.pop("validation")
    if not fractions["validation"]:
        splits.pop("validation", None)
    classes = class_names(splits)
    for name in ("test", "validation"):
        if name not in splits and fractions[name]:
            splits["train"], splits[name] = stratified(splits["train"], fractions[name], seed)
            if not splits[name]:
                raise BadInput(
                    f"{fractions[name]:.0%} of each class leaves no image for {name}; raise {name}_fraction."
                )
    if limit is not None:
        counts = Counter(example.label for example in splits["train"])
        keep: list[Example] = []
        for label in classes:
            members = [example for example in splits["train"] if example.label == label]
            keep += [members[i] for i in shuffled(np.arange(min(limit, counts[label])), counts[label], seed)]
        splits["train"] = keep
    return splits, classes


def stratified(examples: Sequence[Example], fraction: float, seed: int) -> tuple[list[Example], list[Example]]:
    """(the rest, about `fraction` of each class drawn by `seed`), both in the order they came."""
    by_label: dict[str | None, list[int]] = {}
    for index, example in enumerate(examples):
        by_label.setdefault(example.label, []).append(index)
    taken: set[int] = set()
    for members in by_label.values():
        order = shuffled(np.arange(len(members)), len(members), seed)
        taken.update(members[i] for i in order[: round(fraction * len(members))])
    rest = [example for index, example in enumerate(examples) if index not in taken]
    return rest, [examples[index] for index in sorted(taken)]


def read_idx(path: Path) -> np.ndarray:
    """The array of an IDX file, gzipped or not (http://yann.lecun.com/exdb/mnist): uint8, big-endian sizes."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] != 8:
        raise BadInput(f"{path} is not an IDX file of unsigned bytes: it starts with {data[:4].hex(' ') or 'nothing'}.")
    shape = np.frombuffer(data, ">u4", data[3], 4)
    body = data[4 + 4 * data[3] :]
    if len(body) != shape.prod(dtype=np.int64):
        raise BadInput(f"{path} has {len(body):,} bytes for an array of {'x'.join(map(str, shape))}; it is cut short.")
    return np.frombuffer(body, np.uint8).reshape(shape)


def _idx(path):
    found = {}
    for images in sorted(path.glob("*-images-idx3-ubyte*")):
        prefix = images.name.split("-images-")[0]
        labels = sorted(path.glob(f"{prefix}-labels-idx1-ubyte*"))
        if not labels:
            raise BadInput(f"{images} has no labels beside it; wanted {prefix}-labels-idx1-ubyte or its .gz.")
        numbers = read_idx(labels[0])
        found[_split_of(prefix)] = _arrays(str(images), read_idx(images), [str(number) for number in numbers])
    return found


def _arrays(name, images, labels):
    if len(images) != len(labels):
        raise BadInput(f"{name}: {len(images):,} images and {len(labels):,} labels; they must be as many.")
    return [Example(f"{name}[{row}]", image, label) for row, (image, label) in enumerate(zip(images, labels))]


def _digits():
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise BadInput("builtin:digits needs scikit-learn: pip install -e '.[vision]'.") from None
    from lmkit.vision.scenes import DIGITS

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    plain = _arrays("builtin:digits", images, [str(label) for label in digits.target])
    examples = [replace(example, caption=DIGITS[int(example.label)]) for example in plain]
    rest, held_out = stratified(examples, 0.2, seed=0)
    return {"train": rest, "test": held_out}


def _npz(path):
    try:
        arrays = dict(np.load(path))
    except (ValueError, OSError) as error:
        raise BadInput(f"{path} cannot be read: {error}. Arrays of objects (pickles) are not loaded.") from error
    pairs = {"train": ("x_train", "y_train"), "test": ("x_test", "y_test"), "validation": ("x_val", "y_val")}
    if "images" in arrays and "labels" in arrays:
        pairs = {"train": ("images", "labels")}
    pairs = {split: names for split, names in pairs.items() if set(names) <= set(arrays)}
    for x, _ in pairs.values():
        if arrays[x].dtype != np.uint8 or arrays[x].ndim not in (3, 4):
            raise BadInput(
                f"{path}: {x} is {arrays[x].dtype} {arrays[x].shape}; wanted uint8 [N, H, W] or [N, H, W, 3]."
            )
    if not pairs:
        raise BadInput(
            f"{path} has arrays {sorted(arrays)}; wanted images and labels, or x_train, y_train, x_test, y_test."
        )
    return {
        split: _arrays(f"{path}:{x}", arrays[x], [str(label) for label in arrays[y].ravel()])
        for split, (x, y) in pairs.items()
    }


def _parquet(path):
    from datasets import Dataset

    return _rows(Dataset.from_parquet(str(path)), str(path))


def _saved(path):
    from datasets import DatasetDict, load_from_disk

    saved = load_from_disk(str(path))
    splits = saved if isinstance(saved, DatasetDict) else {"train": saved}
    return {_split_of(split): _rows(dataset, f"{path}:{split}") for split, dataset in splits.items()}


def _rows(dataset, name):
    """Examples of a dataset with an image column, a label or a caption; encoded bytes stay as they are."""
    from datasets import ClassLabel, Image

    columns = dataset.features
    image = next((c for c, feature in columns.items() if isinstance(feature, Image)), "image")
    label = next((c for c in ("label", "labels", "fine_label") if c in columns), None)
    caption = next((c for c in ("text", "caption") if c in columns), None)
    if image not in columns or (label is None and caption is None):
        raise BadInput(f"{name} has columns {sorted(columns)}; wanted image and label, or image and text.")
    if isinstance(columns[image], Image):
        dataset = dataset.cast_column(image, Image(decode=False))
    names = columns[label].names if label and isinstance(columns[label], ClassLabel) else None
    examples = []
    for row, values in enumerate(dataset):
        cell = values[image]
        data = cell["bytes"] or Path(cell["path"]) if isinstance(cell, dict) else cell
        key = values[label] if label else None
        known = names is not None and key is not None and 0 <= key < len(names)
        text = names[key] if known else None if key is None or key == -1 else str(key)
        examples.append(Example(f"{name}[{row}]", data, text, values[caption] if caption else None))
    return examples


def _folder(path):
    """Label folders, or any folder with metadata.csv or metadata.jsonl."""
    metadata = next((path / name for name in ("metadata.csv", "metadata.jsonl") if (path / name).is_file()), None)
    if metadata is not None:
        return _metadata(path, metadata)
    files = images_below(path)
    return [Example(str(f), f, f.relative_to(path).parts[0] if f.parent != path else None) for f in files]


def _metadata(path, metadata):
    with metadata.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file)) if metadata.suffix == ".csv" else [json.loads(x) for x in file if x.strip()]
    examples = []
    for number, row in enumerate(rows, 1):
        caption = row.get("text", row.get("caption"))
        if not row.get("file_name") or (row.get("label") in (None, "") and not caption):
            raise BadInput(f"{metadata} row {number} has {sorted(row)}; wanted file_name, and label or text.")
        file = path / row["file_name"]
        if path.resolve() not in file.resolve().parents or not file.is_file():
            raise BadInput(f"{metadata} row {number}: {row['file_name']} is no file below {path}.")
        label = row.get("label")
        examples.append(Example(str(file), file, None if label in (None, "") else str(label), caption))
    return examples


def _by_pattern(files, pattern):
    expression = re.compile(pattern)
    if expression.groups != 1:
        raise BadInput(f"label_pattern {pattern!r} has {expression.groups} groups; wanted one, the label.")
    matches = [(file, expression.search(file.name)) for file in files]
    missing = [file for file, match in matches if match is None]
    if missing:
        raise BadInput(f"label_pattern {pattern!r} is not in {len(missing)} file names, the first is {missing[0]}.")
    return [Example(str(file), file, match.group(1)) for file, match in matches]


def _split_folders(path):
    """Folders named after splits, where there is a train among them or nothing else; the folder as train otherwise."""
    folders = _visible(path)
    below = {SPLITS[folder.name.lower()]: folder for folder in folders if folder.name.lower() in SPLITS}
    return below if "train" in below or 0 < len(below) == len(folders) else {"train": path}


def _files_by_split(path):
    return {split: images_below(folder) for split, folder in _split_folders(path).items()}


def images_below(path: Path) -> list[Path]:
    """The image files of a folder and the folders in it, in order; hidden ones are left out."""
    hidden = lambda file: any(part.startswith(".") for part in file.relative_to(path).parts)  # noqa: E731
    return [file for file in sorted(path.rglob("*")) if file.suffix.lower() in SUFFIXES and not hidden(file)]


def _visible(path):
    return [entry for entry in sorted(path.iterdir()) if entry.is_dir() and not entry.name.startswith(".")]


def _split_of(name):
    words = re.split(r"[^a-z0-9]+", name.lower())
    return next((SPLITS[word] for word in words if word in SPLITS), "train")


def _natural(label):
    return (0, int(label), "") if label.isdigit() else (1, 0, label)
