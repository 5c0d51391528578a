"""What a model learns from a block of text: the next token, tokens that are hidden, what follows a prefix, lost spans.

Each is a function of a text's tokens and of a generator keyed by seed and position, so a stop and a number of processes
change nothing. They are numpy, to be drawn in threads ahead of time.

Shapes: B rows, T tokens of a row, n tokens of a text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from lmkit.data.order import shuffled
from lmkit.errors import BadInput

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from lmkit.data.mixture import Mixture
    from lmkit.models.presets import ModelConfig

Name = Literal["next_token", "masked", "prefix", "span_corruption"]
RATE, SPAN_TOKENS = 0.15, 3.0  # of tokens hidden (BERT, T5), and the mean length of a lost span (T5)
IGNORED = -100
WIDTHS = 16  # rows are padded to a multiple: a compiled model meets few shapes
RECURRENT = ("rnn", "lstm", "gru", "elmo")


def check(name: Name, model: ModelConfig | PreTrainedConfig | None, document_mask: bool = False) -> None:
    """Raises BadInput, with the nearest combination that works, where the model cannot learn the objective.

    model: as it is configured or as it is; None: not known yet, and nothing is raised.
    """
    if model is None:
        return
    arch, num_layers, reads, sees_all = _kind(model)
    recurrent = arch in RECURRENT
    if document_mask and recurrent:
        raise BadInput(
            f"document_mask: the state of arch {arch} goes from one document to the next, and no mask undoes "
            "that. Use packing pad, one document a block"
        )
    if document_mask and (reads or name in ("masked", "span_corruption")):
        raise BadInput(f"document_mask: objective {name} reads a block as one text. Use packing pad")
    if reads and name in ("next_token", "masked"):
        why = "leaves the encoder nothing to read" if name == "next_token" else "has no second text for the decoder"
        raise BadInput(
            f"objective {name} {why}. Use objective prefix or span_corruption, or model.block.num_encoder_layers 0"
        )
    if sees_all and name != "masked":
        raise BadInput(
            f"objective {name}: with model.block.causal false a token sees what it is asked for. Use objective masked, "
            "or model.block.causal true"
        )
    if name == "masked" and not sees_all:
        raise BadInput(
            "objective masked: a causal model fills a gap without what follows it. Use --model.arch transformer "
            "--model.block.causal false, or objective next_token"
        )
    if name == "span_corruption" and not reads:
        raise BadInput(
            "objective span_corruption: an encoder reads the text with its gaps, a decoder writes them. Use "
            f"--model.arch transformer --model.block.num_encoder_layers {num_layers}, or objective next_token"
        )
    if name == "prefix" and arch != "transformer":
        why = "reads token by token" if recurrent or arch == "neural_ngram" else "is causal throughout"
        raise BadInput(f"objective prefix: arch {arch} {why}. Use --model.arch transformer, or next_token")


def _kind(model: ModelConfig | PreTrainedConfig) -> tuple[str, int, int, bool]:
    """arch, layers, layers of an encoder that these read, and whether a token sees later ones."""
    if hasattr(model, "block"):
        sizes = model.sizes()["num_hidden_layers"], model.block.num_encoder_layers
        return model.arch, *sizes, not model.block.causal
    names = {"lmkit_transformer": "transformer"}
    if model.model_type == "lmkit_recurrent":
        names["lmkit_recurrent"] = "elmo" if model.bidirectional else model.cell
    sizes = model.num_hidden_layers, getattr(model, "num_encoder_layers", 0)
    return names.get(model.model_type, model.model_type), *sizes, not getattr(model, "causal", True)


def keyed(seed: int, position: int) -> np.random.Generator:
    """The generator of one row: the same for a seed and a position counted from the start of training."""
    return np.random.Generator(np.random.Philox(key=[seed % 2**64, position]))


def mask_tokens(
    tokens: np.ndarray, rng: np.random.Generator, mask_id: int, vocab_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """(what is shown, what is asked), [n] each: 15 % of the tokens and at least one are asked for, the others -100; of
    those 80 % are shown as mask_id, 10 % as any token, 10 % as they are (Devlin et al. 2019, arXiv:1810.04805)."""
    chosen = rng.random(len(tokens)) < RATE
    chosen[rng.integers(len(tokens))] |= not chosen.any()
    how, drawn = rng.random(len(tokens)), rng.integers(vocab_size, size=len(tokens))
    shown = np.where(how < 0.8, mask_id, np.where(how < 0.9, drawn, tokens))
    return np.where(chosen, shown, tokens), np.where(chosen, tokens, IGNORED)


def corrupt_spans(
    tokens: np.ndarray, rng: np.random.Generator, sentinels: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """(the text with each lost span replaced by a sentinel of its own, the sentinels each followed by its span).

    15 % of the tokens are lost, in spans of 3 on average (Raffel et al. 2020, arXiv:1910.10683, 3.1.4), anywhere.

    >>> shown, asked = corrupt_spans(np.arange(100, 120), keyed(0, 0), [7, 8])
    >>> shown.tolist()
    [100, 101, 102, 103, 104, 105, 7, 109, 110, 111, 112, 113, 114, 115, 116, 117, 118, 119]
    >>> asked.tolist()
    [7, 106, 107, 108]
    """
    lost = min(max(round(RATE * len(tokens)), 1), max(len(tokens) - 1, 1))
    spans = min(num_spans(len(tokens)), lost, len(tokens) - lost + 1)
    # Kept and lost parts in turn, a kept one on either end, where it may be empty.
    kept, gone = _parts(len(tokens) - lost + 2, spans + 1, rng), _parts(lost, spans, rng)
    kept[[0, -1]] -= 1
    lengths = np.append(np.stack([kept[:-1], gone], 1).ravel(), kept[-1])
    pieces = np.split(tokens, np.cumsum(lengths)[:-1])
    shown = [part for kept, mark in zip(pieces[::2], sentinels) for part in (kept, [mark])][: 2 * spans]
    asked = [part for mark, gone in zip(sentinels, pieces[1::2]) for part in ([mark], gone)]
    return np.concatenate([*shown, pieces[-1]]).astype(np.int64), np.concatenate(asked).astype(np.int64)


def num_spans(length: int) -> int:
    """Spans that a text of so many tokens loses.

    >>> num_spans(256), num_spans(1024)
    (13, 51)
    """
    return max(1, round(RATE * length / SPAN_TOKENS))


def _parts(total: int, parts: int, rng: np.random.Generator) -> np.ndarray:
    """`total` divided at random into `parts` numbers, none of them 0."""
    cuts = np.sort(rng.permutation(total - 1)[: parts - 1]) + 1
    return np.diff(np.concatenate([[0], cuts, [total]])).astype(np.int64)


class Objective:
    """Batches of an objective from batches of blocks.

    Special tokens are the tokenizer's reserved ones: the first is the mask, and they are the sentinels. Raises BadInput
    when a block of context_length tokens needs more than there are.
    """

    def __init__(
        self, name: Name, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, context_length: int, seed: int
    ):
        self.name, self.seed, self.vocab_size, self.end = name, seed, len(tokenizer), tokenizer.eos_token_id
        self.encodes, self.both_ways = config.is_encoder_decoder, getattr(config, "bidirectional", False)
        vocabulary = tokenizer.get_vocab()
        self.reserved = sorted(i for token, i in vocabulary.items() if token.startswith("<|reserved_"))
        needed = {"masked": 1, "span_corruption": num_spans(context_length)}.get(name, 0)
        if needed > len(self.reserved):
            longest = int((len(self.reserved) + 0.4) * SPAN_TOKENS / RATE)
            raise BadInput(
                f"objective {name} needs {needed} reserved tokens for {context_length} tokens of text, and the "
                f"tokenizer has {len(self.reserved)} (<|reserved_0|> and so on). "
                + (f"Lower model.context_length to {longest}." if self.reserved else "Train one with lmkit.")
            )

    @property
    def writes(self) -> bool:
        """Whether the model can be asked for the next token of a text, and so has bits per byte."""
        return not self.encodes and self.name != "masked"

    def reading(self, data: Mixture) -> tuple[Callable[[np.ndarray], Mapping[str, Tensor]], int | None]:
        """`fetch` and `num_samples` of `lmkit.training.loop.fit`: data's own, or a fetch that is given positions."""
        if self.name == "next_token" and not self.both_ways:
            return data.fetch, data.num_samples

        def fetch(positions: np.ndarray) -> Mapping[str, Tensor]:
            known = data.num_samples is not None
            numbers = shuffled(positions, data.num_samples, self.seed) if known else positions
            return self.batch(data.fetch(numbers), positions)

        return fetch, None

    def batch(
        self, blocks: Mapping[str, Tensor], positions: Sequence[int], seed: int | None = None
    ) -> dict[str, Tensor]:
        """What the model is given and asked for of blocks (input_ids, labels [B, T]) at positions [B] of training.

        seed: instead of the training's.
        """
        import torch

        seed = self.seed if seed is None else seed
        inputs, labels = (blocks[name].numpy() for name in ("input_ids", "labels"))
        rows: dict[str, list[Any]] = {}
        for first, row, position in zip(inputs[:, 0], labels, positions):
            text = row[row != IGNORED]
            for name, value in self._row(text, first, keyed(seed, int(position))).items():
                rows.setdefault(name, []).append(value)
        if self.name == "prefix" and not self.encodes:
            lengths = torch.tensor(rows["prefix_lengths"])
            inside = torch.arange(labels.shape[1]) < lengths[:, None] - 1  # what follows them is seen
            return {**blocks, "prefix_lengths": lengths, "labels": blocks["labels"].masked_fill(inside, IGNORED)}
        if self.both_ways:
            back = [_padded(rows[name], fill, labels.shape[1]) for name, fill in (("ids", 0), ("labels", IGNORED))]
            asked = torch.cat([blocks["labels"], torch.from_numpy(back[1])], dim=1)
            return {"input_ids": blocks["input_ids"], "backward_ids": torch.from_numpy(back[0]), "labels": asked}
        tables = {name: _padded(values, IGNORED if name == "labels" else 0) for name, values in rows.items()}
        mask = _padded([np.ones(len(values), np.int64) for values in rows["input_ids"]], 0)
        return {name: torch.from_numpy(table) for name, table in (tables | {"attention_mask": mask}).items()}

    def _row(self, text: np.ndarray, first: int, rng: np.random.Generator) -> dict[str, Any]:
        """A row from the tokens of a text [n] and the end of text before it."""
        if self.both_ways:  # as the backward stack reads it
            back = np.concatenate([[first], text])[::-1]
            return {"ids": back[:-1], "labels": back[1:]}
        if self.name == "masked":
            shown, asked = mask_tokens(text, rng, self.reserved[0], self.vocab_size)
            return {"input_ids": shown, "labels": asked}
        if not self.encodes:
            return {"prefix_lengths": int(rng.integers(1, len(text) + 1))}
        if self.name == "prefix":
            length = rng.integers(len(text))
            shown, asked = np.concatenate([[first], text[:length]]), text[length:]
        else:
            shown, asked = corrupt_spans(text, rng, self.reserved)
            asked = np.concatenate([asked, [self.end]])
        return {"input_ids": shown, "decoder_input_ids": np.concatenate([[first], asked[:-1]]), "labels": asked}


def _padded(rows: Sequence[np.ndarray], fill: int, width: int | None = None) -> np.ndarray:
    width = width or -(-max(map(len, rows)) // WIDTHS) * WIDTHS
    table = np.full((len(rows), width), fill, np.int64)
    for number, row in enumerate(rows):
        table[number, : len(row)] = row
    return table
