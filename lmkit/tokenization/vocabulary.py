"""The special tokens and the size of a vocabulary: fixed when the tokenizer is trained, checked before."""

from __future__ import annotations

import re

from lmkit.errors import BadInput

END_OF_TEXT, START_OF_TURN, END_OF_TURN, PAD = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"
NUM_RESERVED = 16
# The position in this list is the token's id. Reserved ones leave room for names that a later stage needs, so that no
# stage ever changes the size of a model's embeddings.
SPECIAL_TOKENS = [END_OF_TEXT, START_OF_TURN, END_OF_TURN, PAD, *[f"<|reserved_{i}|>" for i in range(NUM_RESERVED)]]
MULTIPLE = 128  # so that the matrices of a model have a fast shape
MIN_VOCAB = -(-(256 + len(SPECIAL_TOKENS)) // MULTIPLE) * MULTIPLE
_SHAPE = re.compile(r"<\|[A-Za-z0-9_]*[A-Za-z0-9][A-Za-z0-9_]*\|>")


def check_vocab_size(vocab_size: int) -> int:
    """The size itself; BadInput unless it is a multiple of 128 with room for the bytes and the special tokens."""
    if vocab_size < MIN_VOCAB or vocab_size % MULTIPLE:
        wanted = max(MIN_VOCAB, -(-vocab_size // MULTIPLE) * MULTIPLE)
        raise BadInput(
            f"{vocab_size} is not a possible size: wanted a multiple of {MULTIPLE} with room for 256 bytes and "
            f"{len(SPECIAL_TOKENS)} special tokens. Set it to {wanted}."
        )
    return vocab_size


def check_special_tokens(names: list[str]) -> list[str]:
    """The names themselves; BadInput unless they are distinct, new, at most 16, and of the shape <|name|>."""
    if len(names) > NUM_RESERVED:
        raise BadInput(f"{len(names)} special tokens were given; there are {NUM_RESERVED} places. Leave some out.")
    for name in names:
        if not _SHAPE.fullmatch(name):
            raise BadInput(
                f"The special token {name!r} is not of the shape <|name|> (letters, digits, underscores). An ordinary "
                "word, a space or an empty text would be cut out of every text it occurs in. Rename it, as in <|tool|>."
            )
        if names.count(name) > 1 or name in SPECIAL_TOKENS:
            raise BadInput(f"The special token {name} is given twice, or is there already. Name each once.")
    return names


def special_token_list(names: list[str]) -> list[str]:
    """All special tokens in the order of their ids, `names` in the places of the first reserved ones.

    >>> special_token_list(["<|tool|>"])[2:6]
    ['<|im_end|>', '<|pad|>', '<|tool|>', '<|reserved_1|>']
    """
    num_fixed = len(SPECIAL_TOKENS) - NUM_RESERVED
    return SPECIAL_TOKENS[:num_fixed] + check_special_tokens(names) + SPECIAL_TOKENS[num_fixed + len(names) :]
