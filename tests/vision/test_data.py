"""Every form images come in, read to the same examples; what is missing is named."""

import gzip
import json
import pickle

import numpy as np
import pytest
from PIL import Image

from lmkit.errors import BadInput
from lmkit.vision.data import Example, class_names, classification_splits, read_idx, read_images, stratified
from lmkit.vision.options import Preprocess
from lmkit.vision.pixels import load_pixels
from lmkit.vision.scenes import DIGITS

GENERATOR = np.random.default_rng(0)
IMAGES = GENERATOR.integers(0, 256, (6, 5, 5), dtype=np.uint8)
COLOURS = GENERATOR.integers(0, 256, (6, 5, 5, 3), dtype=np.uint8)
LABELS = [3, 7, 3, 7, 10, 10]


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def write_idx(folder, prefix="train", images=IMAGES, labels=LABELS, pack=lambda data: data, suffix=""):
    (folder / f"{prefix}-images-idx3-ubyte{suffix}").write_bytes(pack(idx(images)))
    (folder / f"{prefix}-labels-idx1-ubyte{suffix}").write_bytes(pack(idx(np.array(labels, np.uint8))))


def write_png(folder, images=IMAGES, labels=LABELS):
    for row, (image, label) in enumerate(zip(images, labels)):
        (folder / str(label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / str(label) / f"{row}.png")


def pixels_of(examples):
    return load_pixels(examples, Preprocess(size=5, channels=1))[0].squeeze(1).numpy()


def sorted_by_pixels(examples):
    return sorted((pixels.tobytes(), e.label) for pixels, e in zip(pixels_of(examples), examples))


EXPECTED = sorted((image.tobytes(), str(label)) for image, label in zip(IMAGES, LABELS))


def label_folders(folder):
    write_png(folder)


def split_folders(folder):
    write_png(folder / "Training")
    write_png(folder / "val")


def metadata_csv(folder):
    (folder / "pictures").mkdir()
    rows = ["file_name,label"]
    for row, (image, label) in enumerate(zip(IMAGES, LABELS)):
        Image.fromarray(image).save(folder / "pictures" / f"{row}.png")
        rows.append(f"pictures/{row}.png,{label}")
    (folder / "metadata.csv").write_text("\n".join(rows))


def idx_plain(folder):
    write_idx(folder)


def idx_gz(folder):
    write_idx(folder, pack=gzip.compress, suffix=".gz")


def parquet(folder):
    dataset().to_parquet(folder / "train.parquet")


def saved(folder):
    dataset().save_to_disk(folder)


def dataset():
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageFeature

    names = ["3", "7", "10"]
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=names)})
    rows = {"image": [Image.fromarray(i) for i in IMAGES], "label": [names.index(str(label)) for label in LABELS]}
    return Dataset.from_dict(rows, features=features)


@pytest.mark.parametrize("write", [label_folders, split_folders, metadata_csv, idx_plain, idx_gz, parquet, saved])
def test_every_form_gives_the_same_images(tmp_path, write):
    write(tmp_path)
    assert sorted_by_pixels(read_images(tmp_path)["train"]) == EXPECTED


def test_npz(tmp_path):
    path = tmp_path / "some.npz"
    np.savez(path, x_train=IMAGES, y_train=LABELS, x_test=IMAGES[:2], y_test=LABELS[:2])
    splits = read_images(path)
    assert sorted_by_pixels(splits["train"]) == EXPECTED
    assert len(splits["test"]) == 2


def test_splits_are_told_by_name(tmp_path):
    split_folders(tmp_path)
    assert {split: len(examples) for split, examples in read_images(tmp_path).items()} == {"train": 6, "validation": 6}
    write_idx(tmp_path, "t10k")
    write_idx(tmp_path, "train")
    assert set(read_images(tmp_path)) == {"train", "test"}


def test_a_folder_of_a_test_alone_is_a_test(tmp_path):
    """And not images of the one class "test", unless it stands among folders of other names."""
    for name in ("cat", "dog"):
        (tmp_path / "test" / name).mkdir(parents=True)
        Image.fromarray(IMAGES[0]).save(tmp_path / "test" / name / "a.png")
    assert [example.label for example in read_images(tmp_path)["test"]] == ["cat", "dog"]
    with pytest.raises(BadInput, match="has the splits test and no train"):
        classification_splits(str(tmp_path), None, {"test": 0.2, "validation": 0.0}, None, 0)
    (tmp_path / "exam").mkdir()
    Image.fromarray(IMAGES[0]).save(tmp_path / "exam" / "a.png")
    assert {example.label for example in read_images(tmp_path)["train"]} == {"exam", "test"}


def test_captions_of_metadata_jsonl(tmp_path):
    Image.fromarray(IMAGES[0]).save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": "a grey square"}))
    (example,) = read_images(tmp_path)["train"]
    assert (example.caption, example.label) == ("a grey square", None)


def test_labels_in_file_names(tmp_path):
    for name in ("cat.1.png", "dog.1.png"):
        Image.fromarray(IMAGES[0]).save(tmp_path / name)
    assert [e.label for e in read_images(tmp_path, r"^(\w+)\.")["train"]] == ["cat", "dog"]
    with pytest.raises(BadInput, match=r"is not in 2 file names, the first is .*cat\.1\.png"):
        read_images(tmp_path, r"^(\d+)_")
    with pytest.raises(BadInput, match="has 0 groups; wanted one, the label"):
        read_images(tmp_path, "cat")


def test_cifar_batches(tmp_path):
    data = COLOURS.repeat(7, 1)[:, :32].repeat(7, 2)[:, :, :32]
    batch = {b"data": data.transpose(0, 3, 1, 2).reshape(6, -1), b"labels": [0, 1, 0, 1, 1, 0]}
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps(batch))
    (tmp_path / "test_batch").write_bytes(pickle.dumps(batch))
    (tmp_path / "batches.meta").write_bytes(pickle.dumps({b"label_names": [b"cat", b"dog"]}))
    splits = read_images(tmp_path)
    assert [e.label for e in splits["train"]] == ["cat", "dog", "cat", "dog", "dog", "cat"]
    assert np.array_equal(splits["test"][2].image, data[2])


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code ran')",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps(Evil()), "it names builtins.exec"),
        (pickle.dumps([1, 2]), "holds a list; wanted the dictionary"),
        (pickle.dumps({b"labels": [0]}), "is no CIFAR batch of 32x32 images"),
        (b"", "is not read: Ran out of input"),
        (b"\x80\x04garbage", "is not read: "),
    ],
)
def test_a_pickle_that_is_no_batch_is_refused_and_its_code_not_run(tmp_path, content, message):
    (tmp_path / "data_batch_1").write_bytes(content)
    with pytest.raises(BadInput, match=message):
        read_images(tmp_path)


def test_digits_come_with_the_library():
    pytest.importorskip("sklearn", reason="the vision extra is not installed")
    splits = read_images("builtin:digits")
    assert {split: len(examples) for split, examples in splits.items()} == {"train": 1438, "test": 359}
    assert splits["train"][0].image.shape == (8, 8)
    assert max(e.image.max() for e in splits["train"]) == 255
    assert {(e.label, e.caption) for e in splits["test"]} >= {("3", "a three"), ("8", "an eight")}


def test_pairs_of_digits_hold_ten_of_a_hundred_out_in_both_orders():
    pytest.importorskip("sklearn", reason="the vision extra is not installed")
    splits, digits = read_images("builtin:digit_pairs"), read_images("builtin:digits")
    labels = {split: {e.label for e in examples} for split, examples in splits.items()}
    assert {split: len(examples) for split, examples in splits.items()} == {"train": 14_400, "test": 1000}
    assert len(labels["test"]) == 100
    held_out = labels["test"] - labels["train"]
    assert len(held_out) == 10
    assert {"a three left of an eight", "an eight left of a three"} <= held_out
    assert not any(label in example.caption for label in held_out for example in splits["train"])
    assert not any("three" in e.caption and "eight" in e.caption for e in splits["train"])
    first, second = splits["train"][:2]
    assert (first.caption, second.caption) == ("a zero left of a zero", "a zero right of a zero")
    known = {split: {e.image.tobytes(): e.label for e in examples} for split, examples in digits.items()}
    for split, examples in splits.items():
        for example in examples[::97]:  # each half is a digit of its own split, of the label's kind
            left, right = (known[split][np.ascontiguousarray(half).tobytes()] for half in np.split(example.image, 2, 1))
            words = [DIGITS[int(left)], DIGITS[int(right)]]
            assert example.label == " left of ".join(words)
            assert example.caption in (example.label, " right of ".join(reversed(words)))
    one_form = read_images("builtin:digit_pairs_left_of")
    assert all(e.caption == e.label for examples in one_form.values() for e in examples)
    assert [e.image.tobytes() for e in one_form["train"]] == [e.image.tobytes() for e in splits["train"]]


@pytest.mark.realdata
def test_mnist_is_whole():
    splits = read_images("../shared/data/images/mnist")
    assert {split: len(examples) for split, examples in splits.items()} == {"train": 60_000, "test": 10_000}
    assert [e.label for e in splits["train"][:10]] == list("5041921314")


def test_stratified_keeps_the_shares_and_the_seed():
    examples = [Example(str(i), b"", "a" if i < 20 else "b") for i in range(30)]
    rest, held = stratified(examples, 0.2, seed=1)
    assert [sum(e.label == label for e in held) for label in "ab"] == [4, 2]
    assert {e.name for e in rest} | {e.name for e in held} == {str(i) for i in range(30)}
    assert stratified(examples, 0.2, seed=1)[1] == held
    assert stratified(examples, 0.2, seed=2)[1] != held


def test_what_chooses_is_taken_from_train_and_never_from_the_test(tmp_path):
    write_png(tmp_path / "train", IMAGES.repeat(10, 0), LABELS * 10)
    write_png(tmp_path / "test")
    fractions = {"test": 0.2, "validation": 0.1}
    splits, classes = classification_splits(tmp_path, None, fractions, None, 0)
    assert classes == ["3", "7", "10"]
    assert {name: len(examples) for name, examples in splits.items()} == {"train": 54, "test": 6, "validation": 6}
    assert not {e.name for e in splits["train"]} & {e.name for e in splits["validation"]}
    few, _ = classification_splits(tmp_path, None, {"test": 0.2, "validation": 0}, 4, 0)
    assert {name: len(examples) for name, examples in few.items()} == {"train": 12, "test": 6}


def test_class_names_need_labels_two_classes_and_no_strangers():
    a, b = Example("a.png", b"", "cat"), Example("b.png", b"", "dog")
    with pytest.raises(BadInput, match=r"1 of 2 images of train have no label, the first is c\.png"):
        class_names({"train": [a, Example("c.png", b"")]})
    with pytest.raises(BadInput, match="one class only, 'cat'"):
        class_names({"train": [a]})
    with pytest.raises(BadInput, match="the split test has classes that train lacks: owl"):
        class_names({"train": [a, b], "test": [Example("d", b"", "owl")]})


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds no images"),
        ({"train-images-idx3-ubyte": idx(IMAGES)}, "has no labels beside it"),
        ({"train-images-idx3-ubyte": b"\0\0\x0d\x03", "train-labels-idx1-ubyte": b"\0\0"}, "is not an IDX file"),
        (
            {"train-images-idx3-ubyte": idx(IMAGES)[:-1], "train-labels-idx1-ubyte": idx(np.array(LABELS, np.uint8))},
            "has 149 bytes for an array of 6x5x5; it is cut short",
        ),
        (
            {"train-images-idx3-ubyte": idx(IMAGES), "train-labels-idx1-ubyte": idx(np.array([1], np.uint8))},
            "6 images and 1 labels",
        ),
        ({"metadata.csv": b"file_name,label\n../../etc/passwd,x\n"}, "is no file below"),
        ({"metadata.csv": b"name,label\na.png,x\n"}, "wanted file_name, and label or text"),
    ],
)
def test_what_a_folder_lacks_is_named(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput, match=message):
        read_images(tmp_path)


def test_paths_that_hold_no_images_are_refused(tmp_path):
    with pytest.raises(BadInput, match="does not exist; wanted a folder of images"):
        read_images(tmp_path / "nothing")
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(BadInput, match="is not a form of images lmkit reads"):
        read_images(tmp_path / "a.txt")
    np.savez(tmp_path / "a.npz", images=IMAGES.astype(float), labels=LABELS)
    with pytest.raises(BadInput, match="images is float64"):
        read_images(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", pictures=IMAGES)
    with pytest.raises(BadInput, match=r"has arrays \['pictures'\]"):
        read_images(tmp_path / "b.npz")
    np.savez(tmp_path / "c.npz", images=np.array([Evil()]), labels=[1])
    with pytest.raises(BadInput, match="pickles"):
        read_images(tmp_path / "c.npz")


def test_an_idx_file_reads_back(tmp_path):
    (tmp_path / "x").write_bytes(idx(IMAGES))
    assert np.array_equal(read_idx(tmp_path / "x"), IMAGES)
