"""Bits per byte: the loss that compares models with different tokenizers.

Two functions, on plain arrays of token ids (a memory-mapped shard is one):

    bytes_of = token_bytes(tokenizer)                                                # [V], once per tokenizer
    bits_per_byte(model, validation_tokens, bytes_of, context_length=256)            # a dict of numbers

    bits per byte = sum of nll(target) in nats / (ln 2 * sum of UTF-8 bytes of the targets)

A target counts if its token stands for bytes of the text. Special tokens stand for none: they are context, never
targets, so neither their loss nor a length enters. The first token of the stream has nothing before it and is not
scored. Sums are float64.
"""

import itertools
import json
import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerBase

# Decoders that leave the characters of a token as they are, but for the space mark and the byte tokens.
_TEXT_DECODERS = {"Sequence", "Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """UTF-8 bytes of the text each token id stands for: [V] int64, 0 for special tokens and ids without a token.

    Exact for byte-level tokenizers, for SentencePiece-like ones (with or without byte fallback) and for those whose
    tokens are pieces of the text as it is. A space that such a tokenizer puts before a document counts as a byte.

    Raises ValueError for a tokenizer that does not keep the text (WordPiece) or cannot be read (not a fast one).
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(f"found {type(tokenizer).__name__}, wanted a fast tokenizer: bytes per token are read from it")
    decoders = _types(json.loads(backend.to_str())["decoder"])
    byte_level = "ByteLevel" in decoders
    if not byte_level and not decoders <= _TEXT_DECODERS:
        raise ValueError(
            f"found a tokenizer decoded by {', '.join(sorted(decoders))}, wanted a byte-level or SentencePiece-like "
            "one: bits per byte needs tokens that keep every byte of the text"
        )
    marks_spaces = not decoders.isdisjoint({"Replace", "Metaspace"})
    vocabulary, added = tokenizer.get_vocab(), tokenizer.added_tokens_decoder
    sizes = np.zeros(max(vocabulary.values()) + 1, dtype=np.int64)
    for token, i in vocabulary.items():
        if i in added:
            sizes[i] = 0 if added[i].special else len(token.encode())
        elif byte_level:
            sizes[i] = len(token)  # each byte is written as one printable character
        elif "ByteFallback" in decoders and len(token) == 6 and token.startswith("<0x"):
            sizes[i] = 1
        else:
            sizes[i] = len((token.replace("\u2581", " ") if marks_spaces else token).encode())
    return sizes


def _types(decoder: dict[str, Any] | None) -> set[str]:
    """Names of a decoder and of those it is a sequence of."""
    if decoder is None:
        return set()
    return {decoder["type"]}.union(*(_types(part) for part in decoder.get("decoders", ())))


def windows(num_tokens: int, context_length: int, stride: int) -> list[tuple[int, int]]:
    """How a stream is cut: (start, first) for windows of equal length, each with the inputs
    `tokens[start : start + length]`, one target after each input, of which those from index `first` on are scored.

    Every token but the first of the stream is scored once. A window after the first scores `stride` targets, the last
    one perhaps fewer: it ends with the stream, and starts earlier rather than being shorter.

    >>> windows(num_tokens=10, context_length=4, stride=4)
    [(0, 0), (4, 0), (5, 3)]
    >>> windows(num_tokens=7, context_length=4, stride=1)
    [(0, 0), (1, 3), (2, 3)]
    """
    num_targets = num_tokens - 1
    length = min(context_length, num_targets)
    cuts = [(0, 0)]
    for scored in range(length, num_targets, stride):
        start = min(scored + stride, num_targets) - length
        cuts.append((start, scored - start))
    return cuts


@torch.no_grad()
def bits_per_byte(
    model: torch.nn.Module,
    tokens: np.ndarray,
    tokenizer: PreTrainedTokenizerBase | np.ndarray,
    context_length: int,
    stride: int | None = None,
    batch_size: int = 8,
    document_offsets: np.ndarray | None = None,
) -> dict[str, float | int]:
    """Score a stream of tokens [N] in windows of at most `context_length`, and return
    `bits_per_byte, nats_per_token, perplexity, num_tokens, num_bytes, context_length, stride`.

    `model` is called as `model(input_ids=[B, T], use_cache=False).logits`, in evaluation mode. `tokenizer` is a
    tokenizer or what `token_bytes` made of it. By default windows do not overlap (`stride` = `context_length`); a
    smaller stride gives each target more context at more cost, and stride 1 gives each the full context. Rows are
    padded on the right, which a causal model never sees, so `batch_size` changes memory and not the result.

    With `document_offsets` [D + 1], where each document begins and the last one ends, no window crosses a document:
    each is read alone, behind the end-of-text token before it (before the first: the stream's last token).

    Raises ValueError for ids the tokenizer does not have, a stride outside [1, context_length], and a stream
    without a target that counts.
    """
    stride = context_length if stride is None else stride
    if not 1 <= stride <= context_length:
        raise ValueError(f"stride is {stride}; wanted 1 to context_length, which is {context_length}")
    sizes = tokenizer if isinstance(tokenizer, np.ndarray) else token_bytes(tokenizer)
    countable_targets(tokens, sizes)
    device = next(model.parameters()).device
    # (place of the first input, which is -1 before the first document; number of targets; first target that is scored)
    spans = [(0, len(tokens))]
    if document_offsets is not None:
        spans = [(begin - 1, end) for begin, end in itertools.pairwise(document_offsets.tolist())]
    cuts = [
        (begin + start, min(context_length, end - begin - 1), first)
        for begin, end in spans
        for start, first in windows(end - begin, context_length, stride)
    ]
    was_training = model.training
    model.eval()
    nats, num_tokens, num_bytes = 0.0, 0, 0
    for at in range(0, len(cuts), batch_size):
        starts, lengths, firsts = np.array(cuts[at : at + batch_size]).T[:, :, None]
        steps = np.arange(lengths.max())
        places = starts + np.minimum(np.arange(len(steps) + 1), lengths)
        rows = np.asarray(tokens[places], dtype=np.int64)
        targets = sizes[rows[:, 1:]] * ((steps >= firsts) & (steps < lengths))
        counts, rows = torch.from_numpy(targets > 0).to(device), torch.from_numpy(rows).to(device)
        logits = model(input_ids=rows[:, :-1], use_cache=False).logits
        losses = F.cross_entropy(logits[counts].float(), rows[:, 1:][counts], reduction="none")
        nats += losses.double().sum().item()
        num_tokens, num_bytes = num_tokens + len(losses), num_bytes + int(targets.sum())
    model.train(was_training)
    return {
        "bits_per_byte": nats / (math.log(2) * num_bytes),
        "nats_per_token": nats / num_tokens,
        "perplexity": torch.tensor(nats / num_tokens, dtype=torch.float64).exp().item(),
        "num_tokens": num_tokens,
        "num_bytes": num_bytes,
        "context_length": context_length,
        "stride": stride,
    }


def countable_targets(tokens: np.ndarray, sizes: np.ndarray) -> tuple[int, int]:
    """Number of targets that count among `tokens[1:]`, and of their bytes; `sizes` is what `token_bytes` returns.

    Raises ValueError for ids the tokenizer does not have, and when no target counts.
    """
    if len(tokens) and tokens.max() >= len(sizes):
        raise ValueError(
            f"found token {tokens.max()}, wanted at most {len(sizes) - 1}: encode the text with this tokenizer"
        )
    targets = sizes[tokens[1:]]
    num_tokens, num_bytes = int((targets > 0).sum()), int(targets.sum())
    if not num_tokens:
        raise ValueError(f"found {len(tokens)} tokens, wanted one after the first that stands for text: take more")
    return num_tokens, num_bytes
