"""Diffusion as pure functions: how images are noised, what a network predicts of that, and one step back.

    x_t = alpha_t x_0 + sigma_t noise

A schedule lists alpha and sigma from almost clean to almost noise. Every objective is a combination a x_0 + b noise, so
that two linear equations give image and noise back from any of them:

objective   a         b         from
eps         0         1         Ho et al. 2020, Denoising Diffusion Probabilistic Models
v           -sigma_t  alpha_t   Salimans and Ho 2022, Progressive Distillation
flow        -1        1         Liu et al. 2022, rectified flow, on the straight schedule: the velocity d x_t / d t

Shapes: images [B, C, S, S]; alpha and sigma numbers, or tensors that broadcast against images.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lmkit.vision.diffusion_options import Objective, ScheduleName

Number = float | Tensor
MAX_BETA = 0.999  # cosine: the last step would otherwise leave nothing of the image, and eps could not be undone


@dataclass(frozen=True)
class Schedule:
    """alphas, sigmas: float64 [L], of levels from the least noise to the most. `level + first_timestep` is what a
    network is told, and what the scheduler of diffusers calls that level's timestep."""

    name: ScheduleName
    alphas: Tensor
    sigmas: Tensor
    first_timestep: int

    def at(self, level: int | None) -> tuple[float, float]:
        """alpha and sigma of a level; None is the clean image."""
        return (1.0, 0.0) if level is None else (self.alphas[level].item(), self.sigmas[level].item())

    def __len__(self) -> int:
        return len(self.alphas)


def make_schedule(name: ScheduleName, num_levels: int = 1000) -> Schedule:
    """A schedule by name: linear (Ho et al. 2020), cosine (Nichol and Dhariwal 2021), straight (rectified flow).

    The first two keep alpha^2 + sigma^2 = 1 and state beta, the share of variance replaced from one level to the next:
    linear rises from 0.1 / L to 20 / L. The straight one has sigma = 1/L, 2/L, ..., 1 and alpha = 1 - sigma.

    >>> [round(make_schedule("linear").alphas[level].item() ** 2, 6) for level in (0, 499, 999)]
    [0.9999, 0.078587, 4e-05]
    >>> [round(make_schedule("cosine").alphas[level].item() ** 2, 6) for level in (0, 499, 999)]
    [0.999959, 0.493844, 0.0]
    >>> make_schedule("straight", 4).sigmas.tolist()
    [0.25, 0.5, 0.75, 1.0]
    """
    if name == "straight":
        sigmas = torch.arange(1, num_levels + 1, dtype=torch.float64) / num_levels
        return Schedule(name, 1 - sigmas, sigmas, first_timestep=1)
    if name == "linear":
        betas = torch.linspace(0.1 / num_levels, 20 / num_levels, num_levels, dtype=torch.float64)
    else:
        places = torch.arange(num_levels + 1, dtype=torch.float64) / num_levels
        kept = torch.cos((places + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = (1 - kept[1:] / kept[:-1]).clamp(max=MAX_BETA)
    kept = torch.cumprod(1 - betas, 0)
    return Schedule(name, kept.sqrt(), (1 - kept).sqrt(), first_timestep=0)


def add_noise(clean: Tensor, noise: Tensor, alpha: Number, sigma: Number) -> Tensor:
    """x_t, the image at a level.

    >>> add_noise(torch.tensor(1.0), torch.tensor(0.5), 0.6, 0.8).item()
    1.0
    """
    return alpha * clean + sigma * noise


def target(clean: Tensor, noise: Tensor, alpha: Number, sigma: Number, objective: Objective) -> Tensor:
    """What a network that was perfect would predict."""
    a, b = _weights(alpha, sigma, objective)
    return a * clean + b * noise


def clean_and_noise(
    prediction: Tensor, x: Tensor, alpha: Number, sigma: Number, objective: Objective
) -> tuple[Tensor, Tensor]:
    """(x_0, noise) that a prediction at x_t means: the solution of its equation and x_t = alpha x_0 + sigma noise.

    Affine in the prediction with x fixed, so predictions mixed with weights that sum to 1 mean images mixed alike.
    """
    a, b = _weights(alpha, sigma, objective)
    determinant = alpha * b - sigma * a  # eps: alpha, v: alpha^2 + sigma^2, flow: alpha + sigma
    return (b * x - sigma * prediction) / determinant, (alpha * prediction - a * x) / determinant


def _weights(alpha: Number, sigma: Number, objective: Objective) -> tuple[Number, Number]:
    return {"eps": (0.0, 1.0), "v": (-sigma, alpha), "flow": (-1.0, 1.0)}[objective]


def posterior(clean: Tensor, x: Tensor, at: tuple[float, float], to: tuple[float, float]) -> tuple[Tensor, float]:
    """(mean, variance) of q(x_s | x_t, x_0), Gaussian: the image at less noise `to`, when it is x at level `at`.

    at, to: (alpha, sigma). Kingma et al. 2021, Variational Diffusion Models, equation 25; between neighbours of the
    linear schedule it is equation 7 of Ho et al. 2020.

    >>> mean, variance = posterior(torch.tensor(1.0), torch.tensor(0.0), (0.0, 1.0), (0.6, 0.8))
    >>> round(mean.item(), 4), round(variance, 4)
    (0.6, 0.64)
    """
    (alpha, sigma), (alpha_to, sigma_to) = at, to
    ratio = alpha / alpha_to
    added = sigma**2 - (ratio * sigma_to) ** 2  # variance that the way from `to` to `at` adds
    mean = (ratio * sigma_to**2 * x + alpha_to * added * clean) / sigma**2
    return mean, added * sigma_to**2 / sigma**2


def guided(unconditional: Tensor, conditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance (Ho and Salimans 2022): scale 0 ignores the condition, 1 is the conditional prediction.

    >>> guided(torch.tensor(1.0), torch.tensor(3.0), 2.0).item()
    5.0
    """
    return unconditional + scale * (conditional - unconditional)
