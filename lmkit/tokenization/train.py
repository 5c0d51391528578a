"""Training a tokenizer: byte-level BPE, or SentencePiece BPE and Unigram converted to the same kind of file.

The result is a `PreTrainedTokenizerFast` with the chat template, whose directory `AutoTokenizer` loads without lmkit.
A tokenizer cannot be changed once a model has learnt it, so everything that would make it lossy is refused here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import Literal

from tokenizers import AddedToken, Tokenizer, trainers
from transformers import PreTrainedTokenizerFast

from lmkit.errors import BadInput
from lmkit.tokenization.byte_level import BYTE_CHARACTERS, SPLITS, byte_level_tokenizer
from lmkit.tokenization.chat import CHAT_TEMPLATE, END_OF_TEXT, PAD, SPECIAL_TOKENS

Kind = Literal["bpe", "sentencepiece_bpe", "sentencepiece_unigram"]
SplitName = Literal["qwen2", "gpt2", "gpt4", "llama3"]

MULTIPLE = 128  # of the vocabulary, so that the matrices of a model have a fast shape
MIN_VOCAB = -(-(256 + len(SPECIAL_TOKENS)) // MULTIPLE) * MULTIPLE
SPECIAL_SHAPE = re.compile(r"<\|[A-Za-z0-9_]*[A-Za-z0-9][A-Za-z0-9_]*\|>")


def train_tokenizer(
    documents: Iterable[str],
    *,
    vocab_size: int,
    kind: Kind = "bpe",
    split: SplitName = "qwen2",
    nfc: bool = False,
    max_token_length: int | None = None,
    min_frequency: int = 2,
    special_tokens: Iterable[str] = (),
    allow_smaller_vocab: bool = False,
) -> PreTrainedTokenizerFast:
    """A tokenizer trained on `documents`, which are read once and never held in memory together.

    Args:
        vocab_size: total number of ids, special tokens included; a multiple of 128.
        kind: byte-level BPE, or a SentencePiece model with byte fallback.
        split: how BPE cuts text into words first; a name of `SPLITS`.
        nfc: normalise text to Unicode NFC first; the round trip is then exact only for text in NFC.
        max_token_length: longest token in characters (for BPE, bytes); None for no limit.
        min_frequency: a pair seen less often is not merged (BPE).
        special_tokens: up to 16 names of the shape <|name|>; they take the places of the reserved tokens.
        allow_smaller_vocab: accept what the corpus supports; the total is then filled with reserved tokens up to the next
            multiple of 128.

    Raises BadInput for an impossible size, an empty corpus or an unusable special token.
    """
    specials = special_token_list(special_tokens)
    check_vocab_size(vocab_size)
    documents = _not_empty(documents)
    if kind == "bpe":
        backend = _byte_level_bpe(documents, vocab_size, SPLITS[split], nfc, max_token_length, min_frequency, specials)
    else:
        from lmkit.tokenization.sentencepiece import train_sentencepiece

        backend = train_sentencepiece(documents, vocab_size, kind, nfc, max_token_length, specials)
    reached = backend.get_vocab_size()
    if reached < vocab_size and not allow_smaller_vocab:
        raise BadInput(
            f"The corpus supports a vocabulary of {reached}, not {vocab_size}: no further pair is frequent enough. Set "
            f"vocab_size to {max(MIN_VOCAB, reached // MULTIPLE * MULTIPLE)}, give more text, or set allow_smaller_vocab."
        )
    return wrap(backend, specials)


def special_token_list(names: Iterable[str] = ()) -> list[str]:
    """All special tokens in the order of their ids, `names` in the places of the first reserved ones.

    >>> special_token_list(["<|tool|>"])[2:6]
    ['<|im_end|>', '<|pad|>', '<|tool|>', '<|reserved_1|>']
    """
    names = list(names)
    num_fixed = len(SPECIAL_TOKENS) - 16
    if len(names) > 16:
        raise BadInput(f"{len(names)} special tokens were given; there are 16 reserved places. Give 16 or fewer.")
    for name in names:
        if not SPECIAL_SHAPE.fullmatch(name):
            raise BadInput(
                f"The special token {name!r} is not of the shape <|name|> (letters, digits, underscores). An ordinary "
                "word, a space or an empty text would be cut out of every text it occurs in. Rename it, as in <|tool|>."
            )
    tokens = SPECIAL_TOKENS[:num_fixed] + names + SPECIAL_TOKENS[num_fixed + len(names) :]
    for name in names:
        if tokens.count(name) > 1:
            raise BadInput(f"The special token {name} is given twice or has a fixed place already. Name each once.")
    return tokens


def check_vocab_size(vocab_size: int) -> None:
    if vocab_size < MIN_VOCAB or vocab_size % MULTIPLE:
        wanted = max(MIN_VOCAB, -(-vocab_size // MULTIPLE) * MULTIPLE)
        raise BadInput(
            f"vocab_size {vocab_size} is not possible: wanted at least 256 bytes and {len(SPECIAL_TOKENS)} special tokens, "
            f"and a multiple of {MULTIPLE}. Set it to {wanted}."
        )


def wrap(backend: Tokenizer, specials: list[str]) -> PreTrainedTokenizerFast:
    """The finished tokenizer: special tokens marked as such, the vocabulary filled to a multiple of 128, chat template."""
    missing = -backend.get_vocab_size() % MULTIPLE
    specials = [*specials, *(f"<|reserved_{len(SPECIAL_TOKENS) + i}|>" for i in range(missing))]
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in specials])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        extra_special_tokens=[name for name in specials if name not in (END_OF_TEXT, PAD)],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=1_000_000,  # the context of a model that uses it is the real limit
    )


def _byte_level_bpe(documents, vocab_size, split, nfc, max_token_length, min_frequency, specials) -> Tokenizer:
    trained = byte_level_tokenizer({}, [], split, nfc)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        max_token_length=max_token_length,
        # Bytes are listed here to fix their ids in the order of their values, which decides ties between pairs.
        special_tokens=[*specials, *BYTE_CHARACTERS],
        show_progress=False,
    )
    trained.train_from_iterator(documents, trainer)
    model = json.loads(trained.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    return byte_level_tokenizer(model["vocab"], merges, split, nfc)


def _not_empty(documents: Iterable[str]) -> Iterator[str]:
    """The documents as they come; BadInput at the end when there was no text in any."""
    found = False
    for document in documents:
        found = found or bool(document.strip())
        yield document
    if not found:
        raise BadInput("The corpus holds no text: every document is empty or blank. Check the paths of the corpus.")
