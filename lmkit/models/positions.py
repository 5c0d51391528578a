"""How a token knows its place: what is added to embeddings, how queries and keys are turned, what is added to scores.

Shapes: B batch, T tokens, H heads, D width, d width of a head.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_WAVELENGTH = 10_000.0


def positions_of(tokens: Tensor, past: int, attention_mask: Tensor | None, document_ids: Tensor | None) -> Tensor:
    """Positions [B or 1, T] of tokens [B, T, ...] after `past` others: counted from 0 in each row's first token, and in
    each document's."""
    places = torch.arange(past, past + tokens.shape[1], device=tokens.device)[None]
    if attention_mask is not None:
        return (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, past:]
    if document_ids is not None:
        starts = F.pad(document_ids[:, 1:] != document_ids[:, :-1], (1, 0)) * places
        return places - starts.cummax(1).values
    return places


def sinusoids(positions: Tensor, width: int) -> Tensor:
    """Sines and then cosines of positions [...] at wavelengths from 2 pi to 10,000 * 2 pi: float32 [..., D].

    Vaswani et al. 2017, 3.5, which puts them in turn: a permutation of the dimensions.

    >>> sinusoids(torch.tensor([0, 1]), 4)
    tensor([[0.0000, 0.0000, 1.0000, 1.0000],
            [0.8415, 0.0100, 0.5403, 0.9999]])
    """
    angles = positions[..., None].float() * _frequencies(width, MAX_WAVELENGTH, positions.device)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def rotation(positions: Tensor, head_dim: int, theta: float = MAX_WAVELENGTH) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the angles by which `rotate` turns the pairs of a head: [B, 1, T, d / 2] for [B, T]."""
    angles = positions[:, None, :, None].float() * _frequencies(head_dim, theta, positions.device)
    return angles.cos(), angles.sin()


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads [B, H, T, d] with dimension i and i + d / 2 turned as a pair (Su et al. 2021, arXiv:2104.09864).

    A score of a turned query and a turned key depends on the distance of their positions alone.
    """
    first, second = heads.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(heads.dtype)


def alibi_slopes(num_heads: int) -> list[float]:
    """What each head subtracts from a score for a token of distance (Press et al. 2021, arXiv:2108.12409).

    >>> alibi_slopes(4)
    [0.25, 0.0625, 0.015625, 0.00390625]
    >>> alibi_slopes(3)
    [0.0625, 0.00390625, 0.25]
    """
    power = 2 ** int(math.log2(num_heads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    # Of heads that are no power of two the others stand between: every second slope of twice as many.
    return slopes + [2 ** (-8 * (i + 1) / (2 * power)) for i in range(0, 2 * (num_heads - power), 2)]


def relative_buckets(distances: Tensor, bidirectional: bool, num_buckets: int = 32, max_distance: int = 128) -> Tensor:
    """Bucket of each distance (key's place minus query's), as in T5 (Raffel et al. 2020): int64, same shape.

    Half of a side's buckets are one distance each, the others grow with its logarithm; from max_distance on the last.
    A causal stack has one side, what lies behind; distances ahead are bucket 0 there.

    >>> relative_buckets(torch.tensor([0, -1, -15, -16, -40, -500, 3]), bidirectional=False).tolist()
    [0, 1, 15, 16, 23, 31, 0]
    >>> relative_buckets(torch.tensor([0, -1, 1, 500]), bidirectional=True).tolist()
    [0, 1, 17, 31]
    """
    offset = torch.zeros_like(distances)
    if bidirectional:
        num_buckets //= 2
        offset, away = (distances > 0) * num_buckets, distances.abs()
    else:
        away = (-distances).clamp(min=0)
    exact = num_buckets // 2
    grown = (away.clamp(min=1) / exact).log() / math.log(max_distance / exact) * (num_buckets - exact)
    return offset + torch.where(away < exact, away, (exact + grown.long()).clamp(max=num_buckets - 1))


def _frequencies(width: int, theta: float, device: torch.device) -> Tensor:
    return theta ** -(torch.arange(0, width, 2, device=device) / width)
