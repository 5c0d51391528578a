"""The n-gram model against the formulas written out over dictionaries, and against known figures."""

import itertools
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from lmkit.errors import BadInput
from lmkit.models import ngram
from lmkit.models.ngram import SMOOTHINGS, discounts, fit

SHAKESPEARE = Path(__file__).parents[3] / "shared" / "data" / "text" / "tinyshakespeare.txt"


def stream(num_tokens, vocab_size, seed=0):
    """Skewed tokens with some memory, so that all counts from 1 to many occur."""
    generator = np.random.default_rng(seed)
    tokens = np.minimum(generator.geometric(0.4, num_tokens) - 1, vocab_size - 1)
    repeats = generator.random(num_tokens) < 0.3
    tokens[2:][repeats[2:]] = tokens[:-2][repeats[2:]]
    return tokens


def kneser_ney_by_definition(tokens, order, vocab_size, context, token, num_discounts=3):
    """Chen and Goodman 1998, equation 26, from sets and dictionaries: the probability of one token."""
    tokens = [int(t) for t in tokens]

    def occurrences(n):
        return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))

    def counts(n):
        if n == order:
            return occurrences(n)
        left_neighbours = {}
        for gram in occurrences(n + 1):
            left_neighbours.setdefault(gram[1:], set()).add(gram[0])
        return Counter({gram: len(left) for gram, left in left_neighbours.items()})

    def discount(n):
        sizes = Counter(counts(n).values())
        n1, n2, n3, n4 = (sizes[k] for k in (1, 2, 3, 4))
        if num_discounts == 1:
            one = n1 / (n1 + 2 * n2) if n1 else 0.5
            return {1: one, 2: one, 3: one}
        fixed = {1: 0.5, 2: 1.0, 3: 1.5}
        if 0 in (n1, n2, n3):
            return fixed
        y = n1 / (n1 + 2 * n2)
        three = {1: 1 - 2 * y * n2 / n1, 2: 2 - 3 * y * n3 / n2, 3: 3 - 4 * y * n4 / n3}
        return three if min(three.values()) > 0 else fixed

    def probability(n):
        if n == 0:
            return 1 / vocab_size
        history = tuple(context[len(context) - n + 1 :])
        lower = probability(n - 1)
        followers = {gram[-1]: count for gram, count in counts(n).items() if gram[:-1] == history}
        total = sum(followers.values())
        if total == 0:
            return lower
        d = discount(n)
        count = followers.get(token, 0)
        own = count - d[min(count, 3)] if count else 0
        return (own + sum(d[min(c, 3)] for c in followers.values()) * lower) / total

    return probability(min(order, len(context) + 1))


@pytest.mark.parametrize(("order", "vocab_size", "num_tokens"), [(1, 4, 40), (2, 6, 60), (3, 6, 300), (4, 3, 80)])
def test_modified_kneser_ney_is_the_published_formula(order, vocab_size, num_tokens):
    tokens = stream(num_tokens, vocab_size)
    model = fit(tokens, order, vocab_size)
    for context in itertools.product(range(vocab_size), repeat=min(order - 1, 2)):
        wanted = [kneser_ney_by_definition(tokens, order, vocab_size, context, w) for w in range(vocab_size)]
        np.testing.assert_allclose(model.probabilities(context), wanted, atol=1e-14)


def test_interpolated_kneser_ney_is_the_published_formula():
    tokens = stream(300, 6)
    for context in itertools.product(range(6), repeat=2):
        wanted = [kneser_ney_by_definition(tokens, 3, 6, context, w, num_discounts=1) for w in range(6)]
        np.testing.assert_allclose(fit(tokens, 3, 6, "kneser_ney").probabilities(context), wanted, atol=1e-14)


def test_three_discounts_were_exercised_by_the_formula_test():
    counts = np.unique(np.lib.stride_tricks.sliding_window_view(stream(300, 6), 3), axis=0, return_counts=True)[1]
    assert discounts(counts)[1:].tolist() != [0.5, 1.0, 1.5]


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
@pytest.mark.parametrize("order", [1, 2, 5])
def test_probabilities_sum_to_one_and_agree_with_nll(smoothing, order):
    train, held_out = stream(2000, 20), stream(60, 23, seed=1)
    model = fit(train, order, 24, smoothing)
    each = []
    for position, token in enumerate(held_out):
        distribution = model.probabilities(held_out[:position])
        assert abs(distribution.sum() - 1) < 1e-12
        assert (distribution >= 0).all()
        each.append(distribution[token])
    with np.errstate(divide="ignore"):
        np.testing.assert_allclose(model.nll(held_out), -np.log(each), rtol=1e-12)


def test_a_token_never_seen_is_possible_only_with_smoothing():
    train = [0, 1, 0, 1, 0]
    assert fit(train, 2, 3, "mle").nll([0, 2])[1] == np.inf
    for smoothing in ("laplace", "kneser_ney", "modified_kneser_ney"):
        assert np.isfinite(fit(train, 2, 3, smoothing).nll([0, 2])).all()


def test_counts_by_hand():
    tokens = [0, 1, 0, 2, 0, 1]  # after 0: 1, 2, 1; the last 1 has no follower, so after 1: 0
    assert fit(tokens, 2, 3, "mle").probabilities([0]).tolist() == pytest.approx([0, 2 / 3, 1 / 3])
    assert fit(tokens, 2, 3, "mle").probabilities([1]).tolist() == pytest.approx([1, 0, 0])
    assert fit(tokens, 2, 3, "laplace").probabilities([0]).tolist() == pytest.approx([1 / 6, 3 / 6, 2 / 6])
    # One discount: bigrams 01 (2), 10, 02, 20 (1 each): D = 3 / (3 + 2). Left neighbours: 0 has 2, 1 and 2 have 1:
    # D = 2 / (2 + 2) for the unigrams, so a unigram is (count - 1/2 + 3/2 * 1/3) / 4.
    unigram = np.array([2, 1, 1]) / 4
    wanted = np.array([0, 2 - 0.6, 1 - 0.6]) / 3 + 2 * 0.6 / 3 * unigram
    assert fit(tokens, 2, 3, "kneser_ney").probabilities([0]).tolist() == pytest.approx(wanted.tolist())


def test_largest_vocabulary_and_order_do_not_overflow():
    """Seven tokens of 16 bits are 112 bits: ids close to the top must still be told apart."""
    tokens = stream(3000, 20)
    high = (tokens + 65536 - 20).astype(np.uint16)
    for small, large in zip(fit(tokens, 7, 20).tables, fit(high, 7, 65536).tables):
        np.testing.assert_array_equal(small.weights, large.weights)
        np.testing.assert_array_equal(small.backoffs, large.backoffs)
    np.testing.assert_array_equal(fit(tokens, 7, 20, "mle").nll(tokens), fit(high, 7, 65536, "mle").nll(high))


@pytest.mark.parametrize("order", [1, 2, 3, 5, 8])
def test_starts_are_sorted_by_all_their_tokens_however_few_fit_in_a_key(order):
    """Of 2^40 ids one fits, of 2^20 three; the end of the stream sorts before any token."""
    for seed, vocab_size in itertools.product(range(20), (3, 2**20, 2**40)):
        tokens = np.random.default_rng(seed).integers(0, 3, 12)
        starts = ngram._sorted_starts(tokens, order, vocab_size)
        found = [tokens[start : start + order].tolist() for start in starts]
        assert found == sorted(found)
        assert sorted(starts) == list(range(12))


@pytest.mark.parametrize("tokens", [[], [1], [1, 0]])
def test_a_stream_shorter_than_the_order(tokens):
    model = fit(tokens, 4, 3)
    for context in ([], [1], [1, 0, 2, 1]):
        assert model.probabilities(context).sum() == pytest.approx(1, abs=1e-12)


def test_generation_is_seeded_and_follows_the_distribution():
    model = fit(stream(500, 4), 2, 4)
    assert model.generate(20, seed=3, prompt=[1]) == model.generate(20, seed=3, prompt=[1])
    assert model.generate(20, seed=3, prompt=[1]) != model.generate(20, seed=4, prompt=[1])
    drawn = np.array([1, *model.generate(8000, seed=0, prompt=[1])])
    after_zero = np.bincount(drawn[1:][drawn[:-1] == 0], minlength=4) / (drawn[:-1] == 0).sum()
    np.testing.assert_allclose(after_zero, model.probabilities([0]), atol=0.03)
    assert fit([0, 1, 2], 3, 3, "mle").generate(1, prompt=[0, 1]) == [2]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([0, 1], 0, 2), "order is 0"),
        (([0, 5], 2, 3), "tokens run from 0 to 5; wanted 0 to 2"),
        (([0, -1], 2, 3), "tokens run from -1 to 0"),
        (([0, 1], 2, 3, "good_turing"), "choose one of mle, laplace"),
    ],
)
def test_bad_arguments_are_named(arguments, words):
    with pytest.raises(ValueError, match=words):
        fit(*arguments)


@pytest.mark.parametrize("vocab_size", [10**12, 2**62])
def test_a_vocabulary_too_large_for_memory_is_refused_before_anything_is_made(vocab_size):
    with pytest.raises(
        BadInput, match=rf"3 tokens over a vocabulary of {vocab_size:,} take .* GB or more; this machine"
    ):
        fit([0, 1, 2], 2, vocab_size)


def test_a_stream_too_long_for_memory_is_refused(monkeypatch):
    monkeypatch.setattr(ngram, "physical_memory", lambda: 64 * 1000 + 24 * 4)
    fit(stream(1000, 4), 2, 4)
    with pytest.raises(BadInput, match="Fit the start of the stream"):
        fit(stream(1001, 4), 2, 4)


def test_memory_does_not_follow_the_vocabulary():
    """65,536 ids, of which 20 occur, take the tables that 20 take."""
    small, large = fit(stream(3000, 20), 5, 20), fit(stream(3000, 20), 5, 65536)
    assert [table.weights.nbytes for table in small.tables] == [table.weights.nbytes for table in large.tables]


@pytest.mark.realdata
@pytest.mark.skipif(not SHAKESPEARE.exists(), reason="tiny-shakespeare is not on this machine")
def test_tiny_shakespeare_characters():
    text = SHAKESPEARE.read_text()
    ids = {character: i for i, character in enumerate(sorted(set(text)))}
    tokens = np.array([ids[character] for character in text])
    train, held_out = np.split(tokens, [int(0.9 * len(tokens))])
    for order, nats in {1: 3.347, 2: 2.4835, 3: 2.038, 5: 1.561, 7: 1.5165}.items():
        assert fit(train, order, len(ids)).nll(held_out).mean() == pytest.approx(nats, abs=5e-4), order


@pytest.mark.parametrize(("order", "vocab_size"), [(5, 64), (7, 50_000)])
def test_fitting_takes_less_than_a_second_per_million_tokens(order, vocab_size):
    tokens = stream(1_000_000, vocab_size)
    start = time.process_time()
    fit(tokens, order, vocab_size)
    assert time.process_time() - start < 1.0
