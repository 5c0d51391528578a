"""A layer of the configurable Transformer: norms, attention over heads, feed-forward, and how a branch is joined.

Shapes: B batch, T tokens (queries), S tokens seen (keys), H heads, D width, d width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from lmkit.models.attention import causal_attention
from lmkit.models.positions import rotate

if TYPE_CHECKING:
    from lmkit.models.transformer import TransformerConfig

ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu, "relu2": lambda x: F.relu(x).square(), "swiglu": F.silu}


class RMSNorm(nn.Module):
    """x over the root of its mean square, times a gain (Zhang and Sennrich 2019), in float32."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


def make_norm(config: TransformerConfig, width: int) -> nn.Module:
    return (nn.LayerNorm if config.norm == "layernorm" else RMSNorm)(width, eps=config.norm_eps)


@dataclass(frozen=True)
class Mask:
    """Who sees whom. seen: bool (True: is seen) or float (is added to the scores), broadcast to [B, H, T, S], or None.

    causal: query t sees keys 0 to t; said instead of a table where that is all.
    """

    seen: Tensor | None = None
    causal: bool = False


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Mask, weights: list[Tensor] | None = None) -> Tensor:
    """softmax(Q K^T / sqrt(d) + mask) V: [B, T, H, d] of query [B, H, T, d] and key, value [B, G, S, d], G dividing H.

    weights: a list that the weights [B, H, T, S] are appended to; None: they never exist, by a fused kernel.
    """
    if mask.causal and weights is None:
        return causal_attention(None, query, key, value, None)[0]
    kind = query.device.type
    with torch.autocast(kind, enabled=kind != "cpu" and torch.is_autocast_enabled(kind)):
        if kind == "cpu":  # the backward of its kernel takes three times as long in bfloat16
            query, key, value = query.float(), key.float(), value.float()
        seen = mask.seen
        if seen is not None and seen.dtype != torch.bool:
            seen = seen.to(query.dtype)
        groups = query.shape[1] // key.shape[1]
        # For the one query of a decoding step two products take half the time of the CPU kernel.
        if weights is None and (kind != "cpu" or query.shape[2] > 1):
            out = F.scaled_dot_product_attention(query, key, value, attn_mask=seen, enable_gqa=groups > 1)
            return out.transpose(1, 2)
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        scores = query @ key.mT * query.shape[-1] ** -0.5
        if mask.causal:
            seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        if seen is not None:
            scores = scores.masked_fill(~seen, -torch.inf) if seen.dtype == torch.bool else scores + seen
        shares = scores.softmax(-1)
        if weights is not None:
            weights.append(shares)
        return (shares @ value).transpose(1, 2)


class MultiHead(nn.Module):
    """H heads of queries over as many or fewer of keys and values (Vaswani et al. 2017; Ainslie et al. 2023)."""

    def __init__(self, config: TransformerConfig, index: int, gain: float):
        super().__init__()
        self.index, self.head_dim = index, config.head_dim
        sizes = config.hidden_size, config.num_attention_heads * self.head_dim
        shared = config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(*sizes, bias=config.bias)
        self.k_proj = nn.Linear(sizes[0], shared, bias=config.bias)
        self.v_proj = nn.Linear(sizes[0], shared, bias=config.bias)
        self.o_proj = nn.Linear(*sizes[::-1], bias=config.bias)
        self.q_proj.gain = self.k_proj.gain = 1.0
        self.v_proj.gain = self.o_proj.gain = gain
        self.q_norm = make_norm(config, self.head_dim) if config.qk_norm else nn.Identity()
        self.k_norm = make_norm(config, self.head_dim) if config.qk_norm else nn.Identity()

    def forward(
        self, x: Tensor, mask: Mask, turn=None, cache=None, source: Tensor | None = None, weights=None
    ) -> Tensor:
        """x: [B, T, D]. turn: what `rotation` gives. cache: of this kind of attention. source: [B, S, D], read instead
        of x, and once alone where there is a cache. weights: see `attend`."""
        query = self.q_norm(self._heads(self.q_proj(x)))
        if source is not None and cache is not None and cache.get_seq_length(self.index):
            key, value = cache.layers[self.index].keys, cache.layers[self.index].values
        else:
            read = x if source is None else source
            key, value = self.k_norm(self._heads(self.k_proj(read))), self._heads(self.v_proj(read))
            if turn is not None:
                query, key = rotate(query, *turn), rotate(key, *turn)
            if cache is not None:
                key, value = cache.update(key, value, self.index)
        return self.o_proj(attend(query, key, value, mask, weights).flatten(2).to(x.dtype))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class FeedForward(nn.Module):
    """Two linear layers with an activation between; swiglu: times a third (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, config: TransformerConfig, gain: float):
        super().__init__()
        sizes = config.hidden_size, config.intermediate_size
        self.activation = ACTIVATIONS[config.activation]
        self.gate_proj = nn.Linear(*sizes, bias=config.bias) if config.activation == "swiglu" else None
        self.up_proj, self.down_proj = nn.Linear(*sizes, bias=config.bias), nn.Linear(*sizes[::-1], bias=config.bias)
        for layer in self.children():
            layer.gain = gain

    def forward(self, x: Tensor) -> Tensor:
        if self.gate_proj is None:
            return self.down_proj(self.activation(self.up_proj(x)))
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


def deepnorm(num_decoder_layers: int, num_encoder_layers: int = 0, encoder: bool = False) -> tuple[float, float]:
    """(alpha, beta) of DeepNorm: N(alpha x + F(x)), initial weights of F times beta (Wang et al. 2022, table 2).

    >>> deepnorm(8), deepnorm(2, 1)[1] == 24**-0.25
    ((2.0, 0.3535533905932738), True)
    """
    if not num_encoder_layers:
        return (2 * num_decoder_layers) ** 0.25, (8 * num_decoder_layers) ** -0.25
    if encoder:
        both = num_encoder_layers**4 * num_decoder_layers
        return 0.81 * both**0.0625, 0.87 * both**-0.0625
    return (3 * num_decoder_layers) ** 0.25, (12 * num_decoder_layers) ** -0.25


class Layer(GradientCheckpointingLayer):
    """Attention, in a decoder that reads an encoder a second one over what that gives, and a feed-forward layer."""

    def __init__(self, config: TransformerConfig, index: int, encoder: bool):
        super().__init__()
        self.placement = config.norm_placement
        deep = self.placement == "deep"
        stacks = config.num_hidden_layers, config.num_encoder_layers
        self.alpha, gain = deepnorm(*stacks, encoder) if deep else (1.0, 1.0)
        self.self_attn, self.mlp = MultiHead(config, index, gain), FeedForward(config, gain)
        reads = config.is_encoder_decoder and not encoder
        self.cross_attn = MultiHead(config, index, gain) if reads else None
        branches = ["self_attn", "mlp", *(["cross_attn"] if reads else [])]
        self.norms = nn.ModuleDict({name: make_norm(config, config.hidden_size) for name in branches})
        sandwich = branches if self.placement == "sandwich" else []
        self.norms_after = nn.ModuleDict({name: make_norm(config, config.hidden_size) for name in sandwich})

    def forward(
        self, x: Tensor, mask, turn=None, source=None, source_mask=None, weights=(None, None), past_key_values=None
    ):
        own = across = past_key_values
        if self.cross_attn is not None and past_key_values is not None:
            own, across = past_key_values.self_attention_cache, past_key_values.cross_attention_cache
        x = self._join("self_attn", x, mask, turn, own, None, weights[0])
        if self.cross_attn is not None:
            x = self._join("cross_attn", x, source_mask, None, across, source, weights[1])
        return self._join("mlp", x)

    def _join(self, name: str, x: Tensor, *inputs: Any) -> Tensor:
        """x and a branch F of it: pre x + F(N(x)); post, deep N(alpha x + F(x)); sandwich x + N'(F(N(x)))."""
        branch, norm = getattr(self, name), self.norms[name]
        if self.placement in ("post", "deep"):
            return norm(self.alpha * x + branch(x, *inputs))
        out = branch(norm(x), *inputs)
        return x + (self.norms_after[name](out) if self.placement == "sandwich" else out)
