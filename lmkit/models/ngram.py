"""N-gram language models over integer tokens: counts, smoothing, likelihood, sampling.

The baseline every neural model has to beat: 7-gram modified Kneser-Ney gives 1.5165 nats per character on
tiny-shakespeare, fitted in a second.

    model = fit(train_tokens, order=5, vocab_size=tokenizer_size)
    model.nll(validation_tokens).mean()        # nats per token
    model.probabilities([3, 1, 4])             # the next token's distribution, [V]
    model.generate(100, seed=0)

Smoothing, for a context h and a token w that followed it c(hw) times:

- `mle`: c(hw) / c(h) after the longest context seen in training; tokens that never followed it get 0.
- `laplace`: (c(hw) + 1) / (c(h) + V) with the whole context, uniform where it was never seen.
- `kneser_ney`: interpolated Kneser-Ney, one discount D = n1 / (n1 + 2 n2) per order.
- `modified_kneser_ney`: the same with three discounts per order, for counts 1, 2 and 3 or more
  (Chen and Goodman 1998, "An Empirical Study of Smoothing Techniques for Language Modeling", equation 26).

Both Kneser-Ney models use raw counts at the highest order and, below it, the number of distinct tokens seen to the
left of an n-gram; the lowest order is mixed with the uniform distribution, so every token has a probability above 0.

The tokens are one stream: a context runs across document boundaries, as it does for a model trained on packed blocks.
The end-of-document token between them is a token like any other. The first tokens of a stream have shorter contexts.

Only n-grams that occur are kept, so memory follows the stream; the vocabulary costs one distribution at a time.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from lmkit.errors import BadInput

SMOOTHINGS = ("mle", "laplace", "kneser_ney", "modified_kneser_ney")


@dataclass(frozen=True)
class Table:
    """All n-grams of one order n, sorted by (context, last token).

    A context is the position of its (n-1)-gram in the table one order below (0 for the empty context), so a code is
    below num_tokens * V however long the n-gram, and fits in 64 bits. `weights` and `backoffs` end with one
    extra entry for what was never seen, reached by index -1: weight 0, backoff 1.
    """

    codes: np.ndarray  # [n-grams] int64: context * V + token
    weights: np.ndarray  # [n-grams + 1] the discounted probability of an n-gram given its context
    backoffs: np.ndarray  # [contexts + 1] the probability a context leaves to the order below

    def find(self, codes: np.ndarray) -> np.ndarray:
        """Positions of `codes` in the table, -1 where absent."""
        if not len(self.codes):
            return np.full(len(codes), -1)
        places = np.minimum(np.searchsorted(self.codes, codes), len(self.codes) - 1)
        return np.where(self.codes[places] == codes, places, -1)


@dataclass(frozen=True)
class NGram:
    """A fitted n-gram model; `fit` makes one. `tables[n - 1]` holds the n-grams of n tokens."""

    tables: tuple[Table, ...]
    vocab_size: int
    smoothing: str

    @property
    def order(self) -> int:
        """Tokens in the longest n-gram, so a context has `order - 1`."""
        return len(self.tables)

    def nll(self, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        """Nats of each token given the up to `order - 1` tokens before it in `tokens`: [T] -> [T] float64.

        `inf` where `mle` gives a token no probability.
        """
        tokens = _checked(tokens, self.vocab_size)
        uniform = 1 / self.vocab_size
        probabilities = np.full(len(tokens), uniform)
        grams = np.zeros(len(tokens), dtype=np.int64)
        for n, table in enumerate(self.tables[: len(tokens)], start=1):
            contexts = grams[: len(tokens) - n + 1]
            grams = table.find(contexts * self.vocab_size + tokens[n - 1 :])
            lower = uniform if self.smoothing == "laplace" else probabilities[n - 1 :]
            probabilities[n - 1 :] = table.weights[grams] + table.backoffs[contexts] * lower
        with np.errstate(divide="ignore"):
            return -np.log(probabilities)

    def probabilities(self, context: Sequence[int] | np.ndarray = ()) -> np.ndarray:
        """The distribution of the token after `context` (any length, the last `order - 1` count): [V] float64.

        >>> fit([0, 1, 0, 1, 0, 0], order=2, vocab_size=2, smoothing="mle").probabilities([0]).round(2).tolist()
        [0.33, 0.67]
        """
        context = _checked(context, self.vocab_size)
        uniform = np.full(self.vocab_size, 1 / self.vocab_size)
        probabilities = uniform
        for n, table in enumerate(self.tables[: len(context) + 1], start=1):
            gram = self._position(context[len(context) - n + 1 :])
            first, last = np.searchsorted(table.codes, [gram * self.vocab_size, (gram + 1) * self.vocab_size])
            lower = uniform if self.smoothing == "laplace" else probabilities
            probabilities = table.backoffs[gram] * lower
            probabilities[table.codes[first:last] % self.vocab_size] += table.weights[first:last]
        return probabilities

    def generate(self, num_tokens: int, seed: int = 0, prompt: Sequence[int] | np.ndarray = ()) -> list[int]:
        """Sample `num_tokens` tokens that continue `prompt`; the same seed gives the same tokens."""
        generator = np.random.default_rng(seed)
        tokens = [int(token) for token in prompt]
        for _ in range(num_tokens):
            cumulative = np.cumsum(self.probabilities(tokens[max(0, len(tokens) - self.order + 1) :]))
            # Scaling by the last entry keeps the draw inside the array when rounding leaves the sum below 1.
            tokens.append(int(np.searchsorted(cumulative, generator.random() * cumulative[-1], side="right")))
        return tokens[len(prompt) :]

    def _position(self, gram: np.ndarray) -> int:
        """Position of one n-gram in its table: 0 for the empty one, -1 if it was never seen."""
        position = 0
        for table, token in zip(self.tables, gram, strict=False):
            if position >= 0:
                position = int(table.find(np.array([position * self.vocab_size + token]))[0])
        return position


def fit(
    tokens: Sequence[int] | np.ndarray, order: int, vocab_size: int, smoothing: str = "modified_kneser_ney"
) -> NGram:
    """Count the n-grams of 1 to `order` tokens in a stream of tokens [N] and smooth them.

    Raises ValueError for a smoothing that does not exist, an order below 1, and tokens outside [0, vocab_size);
    BadInput for a stream or a vocabulary that this machine's memory cannot hold.

    >>> fit([0, 1, 2, 0, 1], order=2, vocab_size=4, smoothing="laplace").probabilities([0]).round(3).tolist()
    [0.167, 0.5, 0.167, 0.167]
    """
    if smoothing not in SMOOTHINGS:
        raise ValueError(f"smoothing {smoothing!r} is unknown; choose one of {', '.join(SMOOTHINGS)}")
    if order < 1:
        raise ValueError(f"order is {order}; an n-gram has at least 1 token")
    check_memory(len(tokens), vocab_size)
    tokens = _checked(tokens, vocab_size)
    counted = _count(tokens, order, vocab_size, distinct_left=smoothing.endswith("kneser_ney"))
    return NGram(tuple(_smooth(*counts, vocab_size, smoothing) for counts in counted), vocab_size, smoothing)


def check_memory(num_tokens: int, vocab_size: int) -> None:
    """BadInput when fitting is sure to fail: too little memory for it, or codes beyond 64 bits.

    At the least a token of the stream takes 64 bytes (it, its places sorted and unsorted, sort keys, n-grams), and an
    id of the vocabulary 24 (three distributions while one is made).
    """
    needed, there = 64 * num_tokens + 24 * vocab_size, physical_memory()
    if needed > there or (num_tokens + 1) * vocab_size >= 2**63:
        raise BadInput(
            f"n-grams of {num_tokens:,} tokens over a vocabulary of {vocab_size:,} take {needed / 1e9:,.1f} GB or "
            f"more; this machine has {there / 1e9:,.1f} GB. Fit the start of the stream, as the pretraining report "
            "does (`tokens[:2**23]`), on a smaller vocabulary (`python recipes/tokenizer.py --vocab_size 32768`)."
        )


def physical_memory() -> int:
    """Bytes of memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _count(
    tokens: np.ndarray, order: int, vocab_size: int, distinct_left: bool
) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """Yield codes, counts and the number of contexts of each order; below the highest, `distinct_left` counts the
    distinct tokens to the left of an n-gram instead of its occurrences.

    One sort serves all orders: where the stream's starts are sorted by the `order` tokens that follow, those that
    share an n-gram stand together for every n, and a new n-gram begins where any of the first n tokens changes.
    """
    # Where 32 bits suffice half the bytes go through memory, which takes most of the time.
    index = np.int32 if max(len(tokens), vocab_size) < 2**31 - 1 else np.int64
    padded = np.append(tokens, -1).astype(index)
    starts = _sorted_starts(tokens, order, vocab_size).astype(index)
    begins = np.arange(len(starts)) == 0
    grams = np.zeros(len(starts), dtype=index)  # the n-gram at each of the sorted starts
    at = np.zeros(len(tokens) + 1, dtype=index)  # the n-gram at each place of the stream
    num_contexts, waiting = 1, None
    for n in range(1, order + 1):
        newest = padded[starts + n - 1]
        begins[1:] |= newest[1:] != newest[:-1]
        ended = np.flatnonzero(newest < 0)  # the one start, if any, that has only n - 1 tokens
        starts, begins, grams, newest = (np.delete(array, ended) for array in (starts, begins, grams, newest))
        firsts = np.flatnonzero(begins)
        codes = grams[firsts].astype(np.int64) * vocab_size + newest[firsts]
        if waiting is not None:
            below, counts, contexts_below = waiting
            if distinct_left:
                counts = np.bincount(at[starts[firsts] + 1], minlength=len(below))
            yield below, counts, contexts_below
        waiting = codes, np.diff(firsts, append=len(starts)), num_contexts
        grams = np.cumsum(begins, dtype=index) - 1
        at[starts] = grams
        num_contexts = len(codes)
    yield waiting


def _sorted_starts(tokens: np.ndarray, order: int, vocab_size: int) -> np.ndarray:
    """Places of the stream, sorted by the `order` tokens from each; the end of the stream sorts before any token."""
    padded = np.concatenate([tokens + 1, np.zeros(order, dtype=np.int64)])
    keys, width, room = padded[: len(tokens)], 1, 2**63 // (vocab_size + 1)
    while width < order and room > vocab_size:  # as many tokens as fit in 63 bits
        keys = keys * (vocab_size + 1) + padded[width : width + len(tokens)]
        width, room = width + 1, room // (vocab_size + 1)
    starts = np.argsort(keys)
    while width < order:
        # The ranks of all n-grams sort longer ones: of two, the second begins in the first or right behind it.
        ranks = np.zeros(len(padded), dtype=np.int64)
        ranks[starts] = 1 + np.cumsum(np.diff(keys[starts], prepend=keys[starts[:1]]) != 0)
        shift = min(width, order - width)
        keys, width = ranks[: len(tokens)] * (len(tokens) + 1) + ranks[shift : shift + len(tokens)], width + shift
        starts = np.argsort(keys)
    return starts


def _smooth(codes: np.ndarray, counts: np.ndarray, num_contexts: int, vocab_size: int, smoothing: str) -> Table:
    """Turn the counts of one order into the weights and backoffs of p = weight + backoff * p_of_the_order_below."""
    contexts = codes // vocab_size
    totals = np.bincount(contexts, weights=counts, minlength=num_contexts)
    if smoothing == "laplace":
        denominators = totals + vocab_size
        weights, backoffs = counts / denominators[contexts], vocab_size / denominators
    else:
        removed = np.zeros(len(counts)) if smoothing == "mle" else discounts(counts, smoothing)[np.minimum(counts, 3)]
        # A context that ends the stream has no continuation, and hands everything to the order below.
        seen = totals > 0
        totals = np.where(seen, totals, 1)
        weights = (counts - removed) / totals[contexts]
        backoffs = np.where(seen, np.bincount(contexts, weights=removed, minlength=num_contexts) / totals, 1)
    return Table(codes, np.append(weights, 0.0), np.append(backoffs, 1.0))


def discounts(counts: np.ndarray, smoothing: str = "modified_kneser_ney") -> np.ndarray:
    """What Kneser-Ney takes off a count of 0, 1, 2, and 3 or more: [4], the first always 0.

    Estimated from n_k, how many n-grams have count k. Where a small vocabulary leaves some n_k empty or an estimate
    not above 0, the fixed discounts 0.5, 1, 1.5 (0.5 for all counts with one discount), as in KenLM.

    >>> discounts(np.array([1, 1, 1, 1, 2, 2, 3, 4])).round(3).tolist()
    [0.0, 0.5, 1.25, 1.0]
    """
    n1, n2, n3, n4 = np.bincount(np.minimum(counts, 5), minlength=6)[1:5].astype(float)
    y = n1 / (n1 + 2 * n2) if n1 else 0.0
    if smoothing == "kneser_ney":
        return np.array([0, y, y, y]) if y else np.array([0, 0.5, 0.5, 0.5])
    if n1 and n2 and n3:
        estimate = np.array([0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
        if (estimate[1:] > 0).all():
            return estimate
    return np.array([0, 0.5, 1.0, 1.5])


def _checked(tokens: Sequence[int] | np.ndarray, vocab_size: int) -> np.ndarray:
    tokens = np.asarray(tokens, dtype=np.int64)
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < vocab_size:
        raise ValueError(f"tokens run from {tokens.min()} to {tokens.max()}; wanted 0 to {vocab_size - 1}")
    return tokens
