"""The merges of a byte-level BPE by `rustbpe`, several times faster than by `tokenizers` and the same.

Both take the most frequent pair and, among equals, the pair of the lowest ids, once bytes have their ids in the order
of their values. What rustbpe does not have is done here: the cap on words, and the least frequency of a pair.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

from tokenizers import Regex, normalizers, pre_tokenizers

from lmkit.tokenization.byte_level import BYTE_CHARACTERS, byte_level_tokenizer, capped, has_long_run, make_encoder

SAMPLE_CHARACTERS = 4_000_000


def train_rustbpe(
    documents: Iterable[str], num_tokens: int, split: str, nfc: bool, min_frequency: int
) -> list[tuple[str, str]] | None:
    """Merges in their order, as pairs of byte-level tokens; None where they may differ from those of `tokenizers`.

    num_tokens: bytes and merges together. None when the corpus ends before that, when two merges give one token, or
    when the last pair is not seen `min_frequency` times in the first documents, which are kept for that.
    """
    import rustbpe

    sample: list[str] = []
    learner = rustbpe.Tokenizer()
    learner.train_from_iterator(_prepared(documents, split, nfc, sample), num_tokens, pattern=split)
    ranks = {bytes(token): rank for token, rank in learner.get_mergeable_ranks()}
    if len(ranks) < num_tokens:
        return None
    merges = [_last_merge(token, ranks) for token, rank in ranks.items() if rank >= 256]
    spelled = [tuple("".join(BYTE_CHARACTERS[byte] for byte in part) for part in merge) for merge in merges]
    # The token of the last merge stands for all occurrences of its pair: nothing merged it further.
    vocab = {token: i for i, token in enumerate([*BYTE_CHARACTERS, *(left + right for left, right in spelled)])}
    encode = make_encoder(byte_level_tokenizer(vocab, spelled, split, nfc=False).to_str(), fast=True)
    seen = sum(int((ids == num_tokens - 1).sum()) for ids in encode(sample))
    return spelled if seen >= min_frequency else None


def _prepared(documents: Iterable[str], split: str, nfc: bool, sample: list[str]) -> Iterator[str]:
    words = pre_tokenizers.Split(Regex(capped(split)), "isolated")
    normalizer, kept = normalizers.NFC(), 0
    for document in documents:
        text = normalizer.normalize_str(document) if nfc else document
        if kept < SAMPLE_CHARACTERS:
            sample.append(text)
            kept += len(text)
        if has_long_run(text):
            yield from (word for word, _ in words.pre_tokenize_str(text))
        else:
            yield text


def _last_merge(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two tokens whose merge made `token`: what its bytes are once every earlier merge is made."""
    limit, parts = ranks[token], [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        rank, at = min((ranks.get(a + b, limit), i) for i, (a, b) in enumerate(itertools.pairwise(parts)))
        if rank == limit:
            raise ValueError(f"the token {token!r} does not follow from earlier merges")
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]
