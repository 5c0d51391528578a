"""Causal attention for packed rows: a function registered with transformers under the name "lmkit".

transformers makes no mask for a name it knows no mask function of, so this function decides alone: it is causal, and
where `document_ids` are passed to the model's forward, no token sees another document. (With "sdpa", a compiled
forward gets a dense T x T mask and loses the flash kernel; packed `position_ids` are ignored when `use_cache` is
true.)

It knows neither padding nor a cache, so it serves training on full rows; `packed_attention` puts the model's own
implementation back afterwards, and the name is never saved.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from transformers import AttentionInterface, PreTrainedModel

from lmkit.errors import BadInput

NAME = "lmkit"
BLOCK = 128  # queries whose products stay in a CPU's cache
PROBE_TOKENS = 4  # of a document by which `check_documents_apart` asks
MAX_IN_BLOCKS = 1024  # longer rows are left to the fused kernel, which keeps no T x T / 2 weights for the backward


def causal_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float | None = None,
    dropout: float = 0.0,
    document_ids: torch.Tensor | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """Attention output [B, T, H, D] of query [B, H, T, D] and key, value [B, H', T, D] with H a multiple of H'.

    document_ids: [B, T] integers, equal where two tokens of a row belong to the same document; None: one document a
    row.
    """
    if query.shape[2] != key.shape[2]:
        raise ValueError("the attention named lmkit has no cache: call the model with use_cache=False")
    window = kwargs.get("sliding_window")
    asked = [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
    if asked or (window is not None and window < query.shape[2]):
        raise BadInput(
            f"{type(module).__name__} asks for {asked[0] if asked else f'a sliding window of {window} tokens'}, which "
            "training on packed rows does not have. Start from another model"
            + (", or lower model.context_length." if window is not None and not asked else ".")
        )
    mask = None
    if document_ids is not None:
        mask = (document_ids[:, None, :, None] == document_ids[:, None, None, :]).tril()
    options = {"attn_mask": mask, "is_causal": mask is None, "dropout_p": dropout, "scale": scaling}
    options["enable_gqa"] = query.shape[1] != key.shape[1]
    if query.device.type == "cpu":
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        bf16 = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
        with torch.autocast("cpu", enabled=False):
            short = query.shape[2] <= MAX_IN_BLOCKS
            if (bf16 or value.dtype == torch.bfloat16) and short and mask is None and not dropout:
                output = _in_blocks(query, key, value, scaling)
            else:
                output = F.scaled_dot_product_attention(query.float(), key.float(), value.float(), **options)
    else:
        output = F.scaled_dot_product_attention(query, key, value, **options)
    return output.transpose(1, 2).contiguous(), None


def _in_blocks(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
    """Causal attention in bfloat16 as matrix products, a block of queries at a time with the keys they may see.

    On a CPU the fused kernel's backward takes three times as long in bfloat16 as in float32; these products take half
    of what it takes in float32.
    """
    batch, heads, length, size = query.shape
    repeats = heads // key.shape[1]
    key, value = (t.repeat_interleave(repeats, dim=1) if repeats > 1 else t for t in (key, value))
    query, key, value = (t.to(torch.bfloat16).reshape(batch * heads, length, size) for t in (query, key, value))
    outputs = []
    for start in range(0, length, BLOCK):
        end = min(start + BLOCK, length)
        unseen = torch.full((end - start, end), -torch.inf, dtype=query.dtype).triu(start + 1)
        bias = unseen.expand(batch * heads, end - start, end)
        scores = torch.baddbmm(bias, query[:, start:end], key[:, :end].transpose(1, 2), alpha=scaling)
        outputs.append(torch.bmm(scores.softmax(-1), value[:, :end]))
    return torch.cat(outputs, dim=1).view(batch, heads, length, size)


AttentionInterface.register(NAME, causal_attention)


@contextlib.contextmanager
def packed_attention(model: PreTrainedModel) -> Iterator[None]:
    """Inside the block `model` attends by `causal_attention`; call it with use_cache=False and no attention_mask."""
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@torch.no_grad()
def check_documents_apart(model: PreTrainedModel, by: Literal["document_ids", "position_ids"]) -> None:
    """Raises BadInput where a document in a packed row is read otherwise than alone; asked by a few tokens.

    by: how the model is told of documents: "document_ids" with positions that begin again at each, as pretraining does
    inside `packed_attention`, or such "position_ids" alone in its own attention, as SFT does.
    """
    length = min(PROBE_TOKENS, getattr(model.config, "max_position_embeddings", None) or PROBE_TOKENS)
    ids = torch.linspace(0, model.get_input_embeddings().num_embeddings - 1, 3 * length, device=model.device)
    first, other, second = ids.long().split(length)

    def states(*documents: torch.Tensor) -> torch.Tensor:
        """Hidden states [T, D] of the documents in one row."""
        place = torch.arange(length * len(documents), device=model.device)[None]
        told = {"position_ids": place % length}
        if by == "document_ids":
            told["document_ids"] = place // length
        row = torch.cat(documents)[None]
        return model.base_model(input_ids=row, use_cache=False, **told).last_hidden_state[0]

    training = model.training
    model.eval()
    try:
        with packed_attention(model) if by == "document_ids" else contextlib.nullcontext():
            after, after_other, alone = states(first, second), states(other, second), states(second)
    finally:
        model.train(training)
    # In parts of what other tokens change in their own document, so that the scale of the weights is none of it.
    scale = (after[:length] - after_other[:length]).abs().max()
    seen, moved = ((after[length:] - same).abs().max() / scale for same in (after_other[length:], alone))
    # Rows of one shape round alike, those of another do not: of these half the digits must be the same.
    rounding = torch.finfo(after.dtype).eps
    if seen > 8 * rounding or moved > rounding**0.5:
        what = "sees the one before it" if seen > 8 * rounding else "has other positions than alone"
        told, wanted = {
            "document_ids": ("by document_ids", "Use --packing pad, one document a block, or no --document_mask"),
            "position_ids": ("by position_ids alone, as SFT packs", "Leave out train.packing"),
        }[by]
        raise BadInput(
            f"{type(model).__name__} does not keep documents of one row apart when it is told of them {told}: a "
            f"document {what} ({max(seen, moved):.1g} of what other tokens would change). {wanted}."
        )


@contextlib.contextmanager
def faster_attention(accelerator: Accelerator, *models: PreTrainedModel) -> Iterator[None]:
    """Inside the block the models attend by `causal_attention` where it is faster: in bfloat16 on a CPU.

    They are called with use_cache=False and no attention_mask there. Models with another attention than the plain
    causal one keep their own.
    """
    with contextlib.ExitStack() as stack:
        for model in models:
            if accelerator.device.type == "cpu" and accelerator.mixed_precision == "bf16" and is_plain(model):
                stack.enter_context(packed_attention(model))
        yield


def is_plain(model: PreTrainedModel) -> bool:
    """Whether the model attends by the plain causal attention of transformers in all layers."""
    config = model.config.get_text_config()
    others = ("sliding_window", "attention_chunk_size", "attn_logit_softcapping")
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    takes_ours = model._supports_attention_backend and config._attn_implementation == "sdpa"
    return takes_ours and layers == {"full_attention"} and not any(getattr(config, name, None) for name in others)
