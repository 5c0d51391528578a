"""The merges of a byte-level BPE by `rustbpe`, several times faster than by `tokenizers` and the same.

Both take the most frequent pair and, among equals, the pair of the lowest ids, once bytes have their ids in the order
of their values. What rustbpe does not have is done here: the cap on runs, and the least frequency of a pair.
"""

from __future__ import annotations

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
            spelled = {token: "".join([BYTE_CHARACTERS[byte] for byte in token]) for token in ranks}
            return [(spelled[left], spelled[right]) for left, right in merges_of(ranks)]
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


def merges_of(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The two tokens whose merge made each token, in the order of the merges.

    ranks: every token's rank, bytes first, ascending. Where a token can be cut into two earlier ones in several ways,
    it was made by the cut whose two sides stay apart until every earlier merge is done.

    >>> merges_of({b"a": 0, b"b": 1, b"ab": 2, b"ba": 3, b"aba": 4})
    [(b'a', b'b'), (b'b', b'a'), (b'ab', b'a')]
    """
    merges, parts, merged = [], {}, {}
    for token, rank in ranks.items():
        if len(token) == 1:
            continue
        cuts = []
        for at in range(1, len(token)):
            if (left := ranks.get(token[:at], rank)) < rank and (right := ranks.get(token[at:], rank)) < rank:
                cuts.append((at, left, right))
        if len(cuts) > 1:
            cuts = [cut for cut in cuts if _stay_apart(*cut[1:], rank, parts, merged)]
        if len(cuts) != 1:
            raise ValueError(f"the token {token!r} does not follow from earlier merges")
        ((at, left, right),) = cuts
        merges.append((token[:at], token[at:]))
        parts[rank], merged[left, right] = (left, right), rank
    return merges


def _stay_apart(
    left: int, right: int, bound: int, parts: dict[int, tuple[int, int]], merged: dict[tuple[int, int], int]
) -> bool:
    """Whether two neighbouring tokens are left as they are by all merges of a rank below `bound`.

    Their merges are undone, the latest first: a pair that met at the seam must not have been merged before that one.
    """
    while True:
        if merged.get((left, right), bound) < bound:
            return False
        if left > right:
            if left not in parts:
                return True
            # Of equal pairs that overlap the left one is merged: at the seam one of this rank would come too late.
            bound, left = left, parts[left][1]
        else:
            if right not in parts:
                return True
            bound, right = right + 1, parts[right][0]
