"""From noise to images, level by level, with whatever tells image and noise of an x_t apart.

    ddpm  draws from the posterior q(x_s | x_t, x_0) with the predicted x_0 (Ho et al. 2020)
    ddim  keeps the predicted image and noise for the whole step, and adds nothing (Song et al. 2020)
    euler a step of the ordinary differential equation that has the same distributions
    heun  the mean of the slopes at both ends of that step: two predictions a step (Karras et al. 2022, algorithm 1)

Every schedule is the straight one, scaled: with y = x / (alpha + sigma) and r = sigma / (alpha + sigma),
y = (1 - r) x_0 + r noise, so the equation is dy / dr = noise - x_0 for all of them. A step of ddim is a step of euler;
they differ in where they stop on the way: ddpm and ddim at timesteps equally far apart, euler and heun at equal
distances of r, which on the straight schedule is the same.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lmkit.errors import BadInput
from lmkit.vision.diffusion import Schedule, posterior
from lmkit.vision.diffusion_options import Sampler

Denoise = Callable[[Tensor, int], tuple[Tensor, Tensor]]  # x_t, level -> predicted x_0, noise


def levels(schedule: Schedule, sampler: Sampler, num_steps: int) -> list[int]:
    """Levels to stop at, from the noisiest down; the clean image follows the last. BadInput for more than there are.

    >>> from lmkit.vision.diffusion import make_schedule
    >>> levels(make_schedule("linear"), "ddim", 4), levels(make_schedule("straight"), "euler", 4)
    ([999, 749, 499, 249], [999, 749, 499, 249])
    >>> levels(make_schedule("linear"), "euler", 4)
    [999, 470, 256, 97]
    """
    if not 0 < num_steps <= len(schedule):
        raise BadInput(f"num_inference_steps is {num_steps}; wanted 1 to {len(schedule)}, the levels of the schedule.")
    shares = 1 - torch.arange(num_steps, dtype=torch.float64) / num_steps
    if sampler in ("ddpm", "ddim"):
        return ((shares * len(schedule)).round().long() - 1).tolist()
    ratio = schedule.sigmas / (schedule.alphas + schedule.sigmas)
    nearest = (ratio - shares[:, None] * ratio[-1]).abs().argmin(1).tolist()
    return sorted(set(nearest), reverse=True)


def sample(
    denoise: Denoise, schedule: Schedule, x: Tensor, stops: list[int], sampler: Sampler, draw: Callable[[], Tensor]
) -> Iterator[Tensor]:
    """Yields x after each step; the last is the image. x: [N, C, S, S], noise of the first of `stops`.

    denoise: image and noise in x at a level. draw: standard normal noise of x's shape, asked for by ddpm alone.
    """
    for level, following in itertools.pairwise([*stops, None]):
        at, to = schedule.at(level), schedule.at(following)
        clean, noise = denoise(x, level)
        if sampler == "ddpm":
            mean, variance = posterior(clean, x, at, to)
            x = mean + math.sqrt(variance) * draw() if variance > 0 else mean
        else:
            slope = noise - clean
            ahead = _move(x, slope, at, to)
            if sampler == "heun" and following is not None:  # the clean image is not asked for its noise
                clean, noise = denoise(ahead, following)
                ahead = _move(x, (slope + noise - clean) / 2, at, to)
            x = ahead
        yield x


def _move(x: Tensor, slope: Tensor, at: tuple[float, float], to: tuple[float, float]) -> Tensor:
    """x at the level `to`, along dy / dr = slope."""
    scale, scale_to = sum(at), sum(to)
    return scale_to * (x / scale + (to[1] / scale_to - at[1] / scale) * slope)
