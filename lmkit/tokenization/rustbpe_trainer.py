"""The merges of a byte-level BPE by `rustbpe`, several times faster than by `tokenizers` and the same.

Both take the most frequent pair and, among equals, the pair of the lowest ids, once bytes have their ids in the order
of their values. What rustbpe does not have is done here: the cap on runs, and the least frequency of a pair.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator

import tiktoken
from tokenizers import Regex, normalizers, pre_tokenizers

from lmkit.tokenization.byte_level import BYTE_CHARACTERS, capped, has_long_run

BUFFER_DOCUMENTS = 128  # rustbpe holds as many at once, 8192 unless told
# Between a line end and the next line's first character no expression joins words.
_LINES = re.compile(r"(?<=\S\n)(?=\S)")


def train_rustbpe(
    read: Callable[[], Iterable[str]], num_tokens: int, split: str, nfc: bool, min_frequency: int
) -> list[tuple[str, str]] | None:
    """Merges in their order, as pairs of byte-level tokens; None where they may differ from those of `tokenizers`.

    read: starts a pass over the documents; a second one goes on until the last pair is seen `min_frequency` times.
    num_tokens: bytes and merges together. None when the corpus ends before that, when two merges give one token, or
    when that last pair is rarer.
    """
    import rustbpe

    learner = rustbpe.Tokenizer()
    texts = _prepared(read(), split, nfc)
    learner.train_from_iterator(texts, num_tokens, buffer_size=BUFFER_DOCUMENTS, pattern=split)
    ranks = {bytes(token): rank for token, rank in learner.get_mergeable_ranks()}
    if len(ranks) < num_tokens:
        return None
    # The token of the last merge stands for all occurrences of its pair: nothing merged it further.
    twin = tiktoken.Encoding(name="learnt", pat_str=split, mergeable_ranks=ranks, special_tokens={})
    last, seen = next(reversed(ranks)), 0
    for document in read():
        if nfc or last in document.encode():
            texts = _prepared([document], split, nfc)
            seen += sum(twin.encode_ordinary(text).count(num_tokens - 1) for text in texts)
        if seen >= min_frequency:
            return [_last_merge(token, ranks) for token, rank in ranks.items() if rank >= 256]
    return None


def _prepared(documents: Iterable[str], split: str, nfc: bool) -> Iterator[str]:
    words, normalizer = pre_tokenizers.Split(Regex(capped(split)), "isolated"), normalizers.NFC()
    for document in documents:
        text = normalizer.normalize_str(document) if nfc else document
        if not has_long_run(text):
            yield text
            continue
        for line in _LINES.split(text):
            yield from (word for word, _ in words.pre_tokenize_str(line)) if has_long_run(line) else [line]


def _last_merge(token: bytes, ranks: dict[bytes, int]) -> tuple[str, str]:
    """The two tokens whose merge made `token`: what its bytes are once every earlier merge is made."""
    limit = ranks[token]
    known = [
        ranks.get(token[:at], limit) < limit and ranks.get(token[at:], limit) < limit for at in range(1, len(token))
    ]
    at = known.index(True) + 1 if sum(known) == 1 else _last_seam(token, ranks)
    left, right = ("".join([BYTE_CHARACTERS[byte] for byte in part]) for part in (token[:at], token[at:]))
    return left, right


def _last_seam(token: bytes, ranks: dict[bytes, int]) -> int:
    """Where the two parts of `token` meet that are left once every earlier merge is made."""
    limit, parts = ranks[token], [token[i : i + 1] for i in range(len(token))]
    following = [ranks.get(left + right, limit) for left, right in itertools.pairwise(parts)]  # of each with the next
    while len(parts) > 2:
        at = following.index(min(following))
        if following[at] == limit:
            raise ValueError(f"the token {token!r} does not follow from earlier merges")
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
        del following[at]
        for left in range(max(at - 1, 0), min(at + 1, len(following))):
            following[left] = ranks.get(parts[left] + parts[left + 1], limit)
    return len(parts[0])
