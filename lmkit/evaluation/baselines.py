"""What a text costs models without weights: the lines that a language model is held against.

lines = baselines(train_tokens, validation_tokens, tokenizer, orders=(5, 7))     # bits per byte, by name
beaten_by(model_bits_per_byte, lines)                                            # names of the better ones
"""

from __future__ import annotations

import lzma
import math
from collections.abc import Mapping, Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from lmkit.evaluation.bits_per_byte import countable_targets, token_bytes
from lmkit.models import ngram

# Of a larger corpus the n-grams see its start and xz its end, so that time and memory do not grow with it.
NGRAM_TOKENS = 2**23
XZ_TOKENS = 2**20


def baselines(
    train_tokens: np.ndarray,
    validation_tokens: np.ndarray,
    tokenizer: PreTrainedTokenizerBase,
    orders: Sequence[int] = (5, 7),
) -> dict[str, float]:
    """Bits per byte of `validation_tokens` [N], of the targets that `bits_per_byte` scores in a stream:

    - uniform: every id of the vocabulary alike;
    - unigram: add-one, fitted on `train_tokens`, as all the others are;
    - kneser_ney_5, ...: modified, one line for each of `orders`, with `order - 1` tokens of context everywhere (a
      windowed model has less at the start of each window);
    - xz: what the text adds to the compressed training text (`xz -9`).

    Raises ValueError when no target counts.
    """
    sizes = token_bytes(tokenizer)
    num_tokens, num_bytes = countable_targets(validation_tokens, sizes)
    counts = sizes[validation_tokens[1:]] > 0
    bits_per_nat = 1 / (math.log(2) * num_bytes)
    fitted = {"unigram": (1, "laplace")} | {f"kneser_ney_{order}": (order, "modified_kneser_ney") for order in orders}
    lines = {"uniform": num_tokens * math.log(len(sizes)) * bits_per_nat}
    for name, (order, smoothing) in fitted.items():
        model = ngram.fit(train_tokens[:NGRAM_TOKENS], order, len(sizes), smoothing)
        lines[name] = float(model.nll(validation_tokens)[1:][counts].sum()) * bits_per_nat
    before, text = (
        tokenizer.decode(tokens, skip_special_tokens=True).encode()
        for tokens in (train_tokens[-XZ_TOKENS:], validation_tokens)
    )
    return lines | {"xz": xz_bits_per_byte(before, text)}


def xz_bits_per_byte(before: bytes, text: bytes) -> float:
    """Bits that each byte of `text` adds to `before` when both are compressed together by `xz -9`.

    >>> story = b"the owl had a drum and the fox had a bell. " * 9
    >>> xz_bits_per_byte(story, story) < 0.5 < xz_bits_per_byte(b"", story)
    True
    """
    alone, together = (len(lzma.compress(data, preset=9)) for data in (before, before + text))
    return 8 * (together - alone) / len(text)


def beaten_by(bits_per_byte: float, lines: Mapping[str, float]) -> list[str]:
    """Names of the lines that are better than a model, the best first.

    >>> beaten_by(2.1, {"uniform": 6.0, "xz": 2.0, "kneser_ney_5": 1.9})
    ['kneser_ney_5', 'xz']
    """
    return sorted((name for name, line in lines.items() if not bits_per_byte < line), key=lines.__getitem__)


def verdict(scores: Mapping[str, float], lines: Mapping[str, float]) -> str:
    """What `HeldOut` and `baselines` found, as lines for a person, with a warning where the model is beaten."""
    if "eval/bits_per_byte" not in scores:
        return f"held-out {scores['eval/nats_per_token']:.4f} nats for each token asked for; no model of the next token"
    text = (
        f"validation bits per byte {scores['eval/bits_per_byte']:.4f}, perplexity {scores['eval/perplexity']:.3f} per "
        f"token (context {scores['eval/context_length']}, stride {scores['eval/stride']}); "
        f"{scores['eval/unstrided_bits_per_byte']:.4f} unstrided\n"
        "without weights: " + ", ".join(f"{name} {line:.4f}" for name, line in lines.items())
    )
    if better := beaten_by(scores["eval/bits_per_byte"], lines):
        text += f"\nwarning: the model is worse than {better[0]}; give it more steps or another rate."
    return text
