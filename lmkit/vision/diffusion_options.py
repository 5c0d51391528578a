"""Settings of diffusion: what is predicted, the networks' sizes, how images are drawn. No torch."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from lmkit.config import Config, setting

Objective = Literal["eps", "v", "flow"]
ScheduleName = Literal["linear", "cosine", "straight"]
Sampler = Literal["ddpm", "ddim", "euler", "heun"]


class ProcessOptions(Config):
    """How images are noised in training and what the network predicts of it; `lmkit.vision.diffusion` says both."""

    objective: Objective = setting("flow", "predicted: the noise, v, or the velocity of the straight way to noise")
    schedule: ScheduleName = setting("straight", "linear or cosine for eps and v, straight for flow")

    @model_validator(mode="after")
    def _belong_together(self) -> ProcessOptions:
        if (self.objective == "flow") != (self.schedule == "straight"):
            raise ValueError(
                f"objective {self.objective} with schedule {self.schedule}: wanted flow with straight, "
                "or eps or v with linear or cosine"
            )
        return self


class UNetOptions(Config):
    """The U-Net: a class of diffusers."""

    widths: list[int] = setting(
        [32, 64], "channels at each resolution, each half the one before; multiples of 8", min_length=1
    )
    num_layers: int = setting(1, "blocks at each resolution on the way down; one more on the way up", gt=0)
    num_heads: int = setting(4, "heads of its attention, which is at all resolutions but the first", gt=0)

    @property
    def width(self) -> int:
        """The narrowest, which decides whether bfloat16 is faster."""
        return min(self.widths)


class DiTOptions(Config):
    """The diffusion transformer, of the language model's blocks."""

    hidden_size: int = setting(128, "width; a multiple of 32, the width of a head", gt=0)
    num_hidden_layers: int = setting(4, "blocks", gt=0)
    patch_size: int = setting(2, "side of the squares that are its tokens, in pixels", gt=0)

    @property
    def width(self) -> int:
        """Likewise."""
        return self.hidden_size


class SamplingOptions(Config):
    """From noise to an image."""

    sampler: Sampler = setting("euler", "way from noise to image")
    num_inference_steps: int = setting(20, "steps of it; heun predicts twice in each", gt=0)
    guidance_scale: float = setting(1.0, "0 ignores the condition, 1 follows it, more exaggerates it", ge=0)


def why_not_guided(condition: str, drop_condition: float) -> str | None:
    """Why a model trained so can be sampled with a guidance scale of 1 alone; None when with any."""
    if condition != "none" and drop_condition > 0:
        return None
    lack = "has no condition" if condition == "none" else "never sees its condition left out"
    return f"the model {lack}: only 1 goes. Train with condition text or class, and drop_condition above 0."


class DiffusionRecord(Config):
    """diffusion.json: what a directory of diffusers has no place for."""

    process: ProcessOptions
    condition: Literal["text", "class", "none"]
    classes: list[str] = setting([], "of condition class, in order")
    drop_condition: float = setting(0.1, "share of the training images whose condition was left out")
    sampling: SamplingOptions = setting(SamplingOptions(), "how images are drawn unless asked otherwise")
