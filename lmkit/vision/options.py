"""Settings of the vision wing: preprocessing, augmentation, and the training loop counted in epochs. No torch."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Literal

from pydantic import model_validator

from lmkit.artifact import write_json
from lmkit.config import Config, knob, setting
from lmkit.errors import BadInput
from lmkit.training.options import TrainConfig

FILE = "preprocess.json"


class Preprocess(Config):
    """How an image becomes a model's input."""

    size: int = setting(32, "side of the square, in pixels", gt=0)
    channels: Literal[1, 3] = setting(3, "1: grey, 3: red, green and blue")
    resize: Literal["pad", "stretch", "crop"] = setting("pad", "how a picture that is not square becomes so")
    mean: list[float] | None = setting(
        None, "subtracted, a number a channel on the scale 0 to 1; empty: the train split's"
    )
    std: list[float] | None = setting(None, "divided by, likewise")

    def save(self, directory: Path) -> None:
        """Writes preprocess.json into a model's directory."""
        write_json(Path(directory) / FILE, self.model_dump())

    @classmethod
    def load(cls, directory: Path) -> Preprocess:
        """What `save` wrote; BadInput without it, because a guess would be read at chance."""
        path = Path(directory) / FILE
        if not path.is_file():
            raise BadInput(f"{path} is missing: without it nobody knows how {directory} saw its images.")
        return cls(**json.loads(path.read_text(encoding="utf-8")))


DIGITS = Preprocess(size=8, channels=1)  # the built-in digits as they are


class Augment(Config):
    """Random changes of training images; 0 and false leave each out."""

    shift: float = setting(0.0, "moved by at most this share of the side, each way", ge=0, le=0.5)
    rotation: float = setting(0.0, "turned by at most these degrees, each way", ge=0, le=180)
    flip: bool = setting(False, "mirrored left to right, half of them")
    jitter: float = setting(0.0, "brightness and contrast changed by at most this share", ge=0, lt=1)
    erase: float = setting(0.0, "share of images in which a random rectangle is blanked", ge=0, le=1)
    randaug: bool = setting(False, "two random operations of RandAugment (Cubuk et al. 2019)")
    mixup: float = setting(0.0, "alpha of mixup's Beta distribution (Zhang et al. 2017)", ge=0)
    label_smoothing: float = setting(0.0, "share of each target that is spread over all classes", ge=0, lt=1)


class ImageTrainConfig(TrainConfig):
    """`TrainConfig` in epochs. A warmup of 0.3 and cosine are the one-cycle schedule (Smith and Topin 2017)."""

    num_train_epochs: float = setting(15, "passes over the train split", gt=0)
    max_steps: int | None = setting(None, "optimizer updates; empty: num_train_epochs passes", gt=0)
    warmup_ratio: float = setting(0.3, "share of the updates until the learning rate has its peak", ge=0, lt=1)
    warmup_steps: int | None = setting(None, "the same in updates; empty: warmup_ratio", ge=0)
    eval_steps: int | None = knob(None, "updates between two evaluations; empty: one an epoch", gt=0)
    save_steps: int | None = knob(None, "updates between two checkpoints; empty: one an epoch", gt=0)

    @model_validator(mode="after")
    def _warmup_ends(self) -> ImageTrainConfig:
        if None not in (self.max_steps, self.warmup_steps) and self.warmup_steps >= self.max_steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} must be below max_steps {self.max_steps}")
        return self

    def in_steps(self, num_samples: int, num_processes: int = 1) -> ImageTrainConfig:
        """The same with every number of steps filled in. Raises BadInput when there is less than one batch."""
        batch = self.per_device_train_batch_size * self.gradient_accumulation_steps * num_processes
        if num_samples < batch:
            raise BadInput(
                f"the train split has {num_samples} images, fewer than one batch of {batch}. "
                "Lower train.per_device_train_batch_size."
            )
        epoch = num_samples / batch
        steps = self.max_steps or max(1, math.ceil(self.num_train_epochs * epoch))
        filled: dict[str, Any] = {"max_steps": steps}
        if self.warmup_steps is None:
            filled["warmup_steps"] = int(self.warmup_ratio * steps)
        for name in ("eval_steps", "save_steps"):
            filled[name] = getattr(self, name) or math.ceil(epoch)
        return type(self)(**self.model_dump() | filled)
