"""Training a tokenizer: byte-level BPE, or SentencePiece BPE and Unigram converted to the same kind of file.

The result is a `PreTrainedTokenizerFast` with the chat template, whose directory `AutoTokenizer` loads without lmkit.
A tokenizer cannot be changed once a model has learnt it, so everything that would make it lossy is refused here.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal

from tokenizers import AddedToken, Tokenizer, trainers
from transformers import PreTrainedTokenizerFast

from lmkit.errors import BadInput
from lmkit.tokenization.byte_level import BYTE_CHARACTERS, SPLITS, byte_level_tokenizer
from lmkit.tokenization.chat import CHAT_TEMPLATE
from lmkit.tokenization.vocabulary import (
    END_OF_TEXT,
    MIN_VOCAB,
    MULTIPLE,
    NUM_RESERVED,
    PAD,
    check_vocab_size,
    special_token_list,
)

Kind = Literal["bpe", "sentencepiece_bpe", "sentencepiece_unigram"]
Trainer = Literal["auto", "tokenizers", "rustbpe"]


def train_tokenizer(
    read: Callable[[], Iterable[str]],
    *,
    vocab_size: int,
    kind: Kind = "bpe",
    split: str = "qwen2",
    nfc: bool = False,
    max_token_length: int | None = None,
    min_frequency: int = 2,
    special_tokens: Sequence[str] = (),
    allow_smaller_vocab: bool = False,
    trainer: Trainer = "auto",
) -> PreTrainedTokenizerFast:
    """A tokenizer trained on the documents that `read()` yields; they are never held in memory together.

    Args:
        read: starts one pass over the documents. With rustbpe a second one ends early or starts `tokenizers`.
        vocab_size: total number of ids, special tokens included; a multiple of 128.
        kind: byte-level BPE, or a SentencePiece model with byte fallback.
        split: how BPE cuts text into words first; a name of `byte_level.SPLITS`.
        nfc: normalise text to Unicode NFC first; the round trip is then exact only for text in NFC.
        max_token_length: longest token in characters (for BPE, bytes); None for no limit.
        min_frequency: a pair seen less often is not merged (BPE).
        special_tokens: up to 16 names of the shape <|name|>; they take the places of the reserved tokens.
        allow_smaller_vocab: accept what the corpus supports; the total is then filled with reserved tokens up to the
            next multiple of 128.
        trainer: who counts and merges (BPE). "auto" is rustbpe, which gives the same merges several times faster, where
            it is installed and there is no max_token_length; else tokenizers.

    Raises BadInput for an impossible size, an empty corpus or an unusable special token.
    """
    specials = special_token_list(list(special_tokens))
    check_vocab_size(vocab_size)
    if kind == "bpe":
        backend = _byte_level_bpe(
            read, vocab_size, SPLITS[split], nfc, max_token_length, min_frequency, specials, trainer
        )
    else:
        from lmkit.tokenization.sentencepiece_trainer import train_sentencepiece

        backend = train_sentencepiece(not_empty(read()), vocab_size, kind, nfc, max_token_length, specials)
    reached = backend.get_vocab_size()
    if reached < vocab_size and not allow_smaller_vocab:
        possible = reached // MULTIPLE * MULTIPLE
        lower = f"Set vocab_size to {possible}, give" if possible >= MIN_VOCAB else "Give"
        raise BadInput(
            f"The corpus supports a vocabulary of {reached}, not {vocab_size}: no more is frequent enough. {lower} "
            "more text, or set allow_smaller_vocab to true."
        )
    return wrap(backend, specials)


def wrap(backend: Tokenizer, specials: list[str]) -> PreTrainedTokenizerFast:
    """The finished tokenizer: special tokens marked, the vocabulary filled to a multiple of 128, a chat template."""
    missing = -backend.get_vocab_size() % MULTIPLE
    specials = [*specials, *(f"<|reserved_{NUM_RESERVED + i}|>" for i in range(missing))]
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in specials])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        extra_special_tokens=[name for name in specials if name not in (END_OF_TEXT, PAD)],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=1_000_000,  # the real limit is the context of the model that uses it
    )


def not_empty(documents: Iterable[str]) -> Iterator[str]:
    """The documents as they come; BadInput at the end when there was no text in any."""
    found = False
    for document in documents:
        found = found or bool(document.strip())
        yield document
    if not found:
        raise BadInput("The corpus holds no text: every document is empty or blank. Check the paths of the corpus.")


def _byte_level_bpe(
    read: Callable[[], Iterable[str]],
    vocab_size: int,
    split: str,
    nfc: bool,
    max_token_length: int | None,
    min_frequency: int,
    specials: list[str],
    trainer: Trainer,
) -> Tokenizer:
    rustbpe = importlib.util.find_spec("rustbpe") is not None
    if trainer == "rustbpe" and (not rustbpe or max_token_length):
        why = "cannot limit the length of tokens; leave max_token_length out" if rustbpe else "is not installed"
        raise BadInput(f"trainer is rustbpe, which {why}. Set trainer to auto, or `pip install rustbpe`.")
    if trainer != "tokenizers" and rustbpe and not max_token_length:
        from lmkit.tokenization.rustbpe_trainer import train_rustbpe

        merges = train_rustbpe(lambda: not_empty(read()), vocab_size - len(specials), split, nfc, min_frequency)
        if merges is not None:
            tokens = [*specials, *BYTE_CHARACTERS, *(left + right for left, right in merges)]
            return byte_level_tokenizer({token: i for i, token in enumerate(tokens)}, merges, split, nfc)
    learner = byte_level_tokenizer({}, [], split, nfc)
    learner.train_from_iterator(
        not_empty(read()),
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=min_frequency,
            max_token_length=max_token_length and max_token_length + 1,  # tokenizers keeps tokens shorter than this
            # Bytes are listed here to give them ids in the order of their values, which decides ties between pairs.
            special_tokens=[*specials, *BYTE_CHARACTERS],
            show_progress=False,
        ),
    )
    model = json.loads(learner.to_str())["model"]
    return byte_level_tokenizer(model["vocab"], [tuple(merge) for merge in model["merges"]], split, nfc)
