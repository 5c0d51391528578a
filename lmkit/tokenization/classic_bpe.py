"""Byte-pair encoding as Sennrich, Haddow and Birch (2016, arXiv:1508.07909) describe it, to be read.

A word is a sequence of symbols, at first its characters and a mark for its end. Training merges the most frequent pair
of neighbours again and again; the merges, in their order, are the tokenizer. `lmkit.tokenization.train` does the same
over bytes, in compiled code.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Literal

END_OF_WORD = "</w>"
UNKNOWN = "<unk>"
Merge = tuple[str, str]


def train(
    words: Mapping[str, int],
    num_merges: int,
    ties: Literal["first_seen", "lowest_id"] = "first_seen",
    end: str = END_OF_WORD,
) -> list[Merge]:
    """The merges learnt from words with their counts: up to `num_merges`, fewer when no pair occurs twice.

    ties: among equally frequent pairs take the one that comes first in the words, or the one of the lowest ids, where
    symbols are numbered in sorted order and merged ones follow, as in `tokenizers`. end: the mark added to each word,
    "" for none.

    >>> corpus = {"low": 5, "lower": 2, "newest": 6, "widest": 3}
    >>> train(corpus, 4)
    [('e', 's'), ('es', 't'), ('est', '</w>'), ('l', 'o')]
    >>> train({"abbabyabya": 1}, 2, end="")
    [('a', 'b'), ('ab', 'y')]
    """
    spelled = [(symbols_of(word, end), count) for word, count in words.items()]
    ids = {symbol: i for i, symbol in enumerate(sorted({symbol for symbols, _ in spelled for symbol in symbols}))}
    merges: list[Merge] = []
    while len(merges) < num_merges:
        counts: Counter[Merge] = Counter()
        for symbols, count in spelled:
            for pair in pairwise(symbols):
                counts[pair] += count
        most = max(counts.values(), default=0)
        if most < 2:
            break
        best = [pair for pair, count in counts.items() if count == most]  # in the order in which they were seen
        pair = best[0] if ties == "first_seen" else min(best, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
        merges.append(pair)
        ids.setdefault("".join(pair), len(ids))
        spelled = [(merge(symbols, pair), count) for symbols, count in spelled]
    return merges


def symbols_of(word: str, end: str = END_OF_WORD) -> list[str]:
    """The characters of a word and the mark for its end."""
    return [*word, end] if end else [*word]


def merge(symbols: Sequence[str], pair: Merge) -> list[str]:
    """`symbols` with every occurrence of `pair`, from the left, joined.

    >>> merge(["a", "a", "a", "b"], ("a", "a"))
    ['aa', 'a', 'b']
    """
    merged: list[str] = []
    at = 0
    while at < len(symbols):
        width = 2 if tuple(symbols[at : at + 2]) == pair else 1
        merged.append("".join(symbols[at : at + width]))
        at += width
    return merged


def steps(symbols: list[str], merges: Sequence[Merge]) -> Iterator[tuple[int, list[str]]]:
    """Applies merges in the order they were learnt; yields the number of each merge that applies, and the result."""
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    while True:
        rank = min((ranks.get(pair, len(merges)) for pair in pairwise(symbols)), default=len(merges))
        if rank == len(merges):
            return
        symbols = merge(symbols, merges[rank])
        yield rank, symbols


def encode_by_merges(word: str, merges: Sequence[Merge], end: str = END_OF_WORD) -> list[str]:
    """The tokens of a word by the merges in their order, which is what modern tokenizers do.

    >>> encode_by_merges("lowest", [("e", "s"), ("es", "t"), ("est", "</w>"), ("l", "o"), ("lo", "w")])
    ['low', 'est</w>']
    """
    symbols = symbols_of(word, end)
    for _, result in steps(symbols, merges):
        symbols = result
    return symbols


def encode_by_length(word: str, vocabulary: Sequence[str], end: str = END_OF_WORD) -> list[str]:
    """The tokens of a word by the longest entry of a vocabulary that occurs in it, then the same left and right of it.

    The mark for the end counts as one symbol. What no entry covers becomes `<unk>`.

    >>> vocabulary = ["errrr</w>", "tain</w>", "moun", "est</w>", "high", "the</w>", "a</w>"]
    >>> encode_by_length("mountain", vocabulary)
    ['moun', 'tain</w>']
    """

    def cut(text: str, entries: list[str]) -> list[str]:
        if not text:
            return []
        for number, entry in enumerate(entries):
            left, found, right = text.partition(entry)
            if found:
                return [*cut(left, entries[number + 1 :]), entry, *cut(right, entries[number:])]
        return [UNKNOWN]

    longest_first = sorted(vocabulary, key=lambda entry: -len(entry.replace(end, "\n") if end else entry))
    return cut(word + end, longest_first)


def decode(tokens: Sequence[str], end: str = END_OF_WORD) -> list[str]:
    """The words that tokens spell, each with the mark for its end.

    >>> decode(["moun", "tain</w>", "high", "the</w>"])
    ['mountain</w>', 'highthe</w>']
    """
    return [word + end for word in "".join(tokens).split(end) if word]
