"""Two digits side by side and a caption that says which is where: the smallest data that needs words in an order."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lmkit.vision.data import Example

DIGITS = ("a zero", "a one", "a two", "a three", "a four", "a five", "a six", "a seven", "an eight", "a nine")
SCENES_A_PAIR = {"train": 160, "test": 10}


def is_held_out(left: int, right: int) -> bool:
    """Whether a pair is kept out of train: digits five apart, in both orders, 10 of 100 pairs and each digit twice."""
    return abs(left - right) == 5


def digits_in(label: str) -> list[str]:
    """The digits that a label of `digit_pairs` names, from left to right; any other label as it is.

    >>> digits_in("a three left of an eight"), digits_in("cat")
    (['3', '8'], ['cat'])
    """
    names = label.split(" left of ")
    return [str(DIGITS.index(name)) for name in names] if set(names) <= set(DIGITS) else [label]


def digit_pairs(digits: dict[str, list[Example]], one_form: bool = False) -> dict[str, list[Example]]:
    """Scenes uint8 [8, 16] from the digits of each split, labelled "a three left of a seven".

    Train has 160 scenes of each of the 90 pairs that are not held out; half of its captions tell the same from the
    other side, "a seven right of a three", unless all are to have `one_form`. Test has 10 of each of all 100 pairs,
    whose caption is the label.
    """
    return {split: _scenes(examples, split, one_form) for split, examples in digits.items()}


def _scenes(examples: Sequence[Example], split: str, one_form: bool) -> list[Example]:
    images = [[example.image for example in examples if example.label == str(digit)] for digit in range(10)]
    draw, scenes = np.random.default_rng(0), []
    for left in range(10):
        for right in range(10):
            if split == "train" and is_held_out(left, right):
                continue
            for number in range(SCENES_A_PAIR[split]):
                sides = [images[digit][draw.integers(len(images[digit]))] for digit in (left, right)]
                label = f"{DIGITS[left]} left of {DIGITS[right]}"
                turned = split == "train" and number % 2 and not one_form
                caption = f"{DIGITS[right]} right of {DIGITS[left]}" if turned else label
                name = f"builtin:digit_pairs/{split}[{len(scenes)}]"
                scenes.append(Example(name, np.concatenate(sides, axis=1), label, caption))
    return scenes
