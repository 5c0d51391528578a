"""A judge that is right by construction: shares and distances that can be counted; judges that do not fit."""

import pytest
import torch

from lmkit.errors import BadInput
from lmkit.vision.classifier import new_classifier
from lmkit.vision.judge import Judge, distances, judged, load_judge, parts
from lmkit.vision.options import Preprocess

PREPROCESS = Preprocess(size=4, channels=1, mean=[0.0], std=[1.0])
DIGITS = [str(digit) for digit in range(10)]


def directory(path, classes=DIGITS, preprocess=PREPROCESS):
    """A classifier whose class is the place of the brightest of the first pixels."""
    model = new_classifier("softmax_regression", preprocess, classes)
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.weight[:, : len(classes)] = torch.eye(len(classes))
        model.head.bias.zero_()
    model.save_pretrained(path)
    preprocess.save(path)
    return path


def image(*digits):
    """[1, S, S]: squares side by side in the middle rows, each showing its digit."""
    squares = [torch.zeros(16, dtype=torch.uint8).index_fill(0, torch.tensor([d]), 200).view(4, 4) for d in digits]
    picture = torch.zeros(1, 4 * len(digits), 4 * len(digits), dtype=torch.uint8)
    top = (picture.shape[1] - 4) // 2
    picture[0, top : top + 4] = torch.cat(squares, 1)
    return picture


def test_shares_are_counted(tmp_path):
    labels = ["3", "5", "5", "7"]
    judge = load_judge(directory(tmp_path), PREPROCESS, labels)
    found = judged(judge, torch.stack([image(3), image(5), image(9), image(7)]), labels, {"3", "5"})
    assert found["accuracy"] == 0.75
    assert found["accuracy_seen"] == pytest.approx(2 / 3)
    assert found["accuracy_held_out"] == 1.0


def test_two_digits_are_judged_each_in_its_place_or_in_any(tmp_path):
    labels = ["a three left of an eight", "an eight left of a three", "a one left of a one"]
    seen = PREPROCESS.model_copy(update={"size": 8})
    judge = load_judge(directory(tmp_path), seen, labels)
    found = judged(judge, torch.stack([image(3, 8), image(3, 8), image(1, 2)]), labels, set(labels[:1]))
    assert found["accuracy"] == pytest.approx(1 / 3)
    assert found["accuracy_any_order"] == pytest.approx(2 / 3)
    assert (found["accuracy_seen"], found["accuracy_held_out"], found["accuracy_any_order_held_out"]) == (1, 0, 0.5)


def test_other_images_labels_are_chance(tmp_path):
    labels = [str(n % 10) for n in range(1000)]
    judge = load_judge(directory(tmp_path), PREPROCESS, labels)
    found = judged(judge, torch.stack([image(n % 10) for n in range(1000)]), labels, set(DIGITS))
    assert found["accuracy"] == 1.0
    assert found["accuracy_shuffled"] == pytest.approx(0.1, abs=0.03)


def test_parts_are_cut_where_padding_put_them():
    pictures = torch.stack([image(3, 8), image(1, 2)])
    assert torch.equal(parts(pictures, 2), torch.stack([image(digit) for digit in (3, 8, 1, 2)]))


def test_distance_is_zero_to_the_same_and_what_a_shift_makes_it(tmp_path):
    """A judge whose features are the pixels: moving all images by c in one pixel adds c^2."""
    judge = load_judge(directory(tmp_path), PREPROCESS, ["3"])
    generator = torch.Generator().manual_seed(0)
    test, train = (torch.randint(0, 200, (40, 1, 4, 4), dtype=torch.uint8, generator=generator) for _ in range(2))
    labels, train_labels = ["3"] * 30 + ["5"] * 10, ["3"] * 40  # train has no 5: those ten are left out
    drawn = test.clone()
    drawn[:, 0, 0, 0] += 51
    found = distances(judge, drawn, test, labels, train, train_labels)
    assert found["fd"] == pytest.approx(0.2**2, abs=1e-4)
    other = distances(judge, test, test, labels, train, train_labels)
    assert other["fd"] == pytest.approx(0, abs=1e-4)
    assert other["fd_floor"] == found["fd_floor"] > 0.01
    assert other["nearest_drawn"] == other["nearest_test"]
    assert distances(judge, train, test, labels, train, train_labels)["nearest_drawn"] < 1e-3


def test_as_many_real_images_of_the_same_labels_are_the_floor(tmp_path):
    """Train has the same images as the test, in another order and with more threes: the floor is 0."""
    judge = load_judge(directory(tmp_path), PREPROCESS, ["3"])
    test = torch.randint(0, 200, (20, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = ["3"] * 10 + ["5"] * 10
    train, train_labels = torch.cat([test[10:], test[:10], test[:5]]), ["5"] * 10 + ["3"] * 15
    assert distances(judge, test, test, labels, train, train_labels)["fd_floor"] == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize(
    ("seen", "labels", "message"),
    [
        ({"size": 8}, ["3"], r"sees images with size 4, channels 1, resize pad, these have size 8, channels 1"),
        ({"channels": 3}, ["3"], r"these have size 4, channels 3"),
        ({"resize": "stretch"}, ["3"], r"these have size 4, channels 1, resize stretch"),
        ({}, ["3", "cat"], r"does not know cat. It knows 0, 1, 2"),
        ({}, ["3", None], r"1 of 2 test images have no label, which the judge asks for"),
        ({}, ["3", "a three left of an eight"], r"labels name 1 to 2 things"),
    ],
)
def test_a_judge_that_does_not_fit_is_refused(tmp_path, seen, labels, message):
    with pytest.raises(BadInput, match=message):
        load_judge(directory(tmp_path), PREPROCESS.model_copy(update=seen), labels)


def test_a_judge_of_another_kind_is_refused(tmp_path):
    from transformers import ResNetConfig, ResNetForImageClassification

    sizes = {"num_channels": 1, "embedding_size": 8, "hidden_sizes": [8], "depths": [1], "layer_type": "basic"}
    ResNetForImageClassification(ResNetConfig(**sizes, num_labels=10)).save_pretrained(tmp_path)
    PREPROCESS.save(tmp_path)
    with pytest.raises(BadInput, match=r"is a ResNetForImageClassification; a judge is a network of lmkit.vision.cnn"):
        load_judge(tmp_path, PREPROCESS, ["3"])


def test_looking_gives_a_feature_of_every_part():
    model = new_classifier("softmax_regression", PREPROCESS, DIGITS)
    judge = Judge(model, PREPROCESS, DIGITS, 2)
    predicted, features = judge.look(torch.stack([image(3, 8)] * 3))
    assert predicted.shape == (3, 2)
    assert features.shape == (3, 32)
