"""Word vectors: the loss against its definition, what it converges to, and structure put into a corpus."""

import itertools
import math

import numpy as np
import pytest
import torch

from lmkit.errors import BadInput
from lmkit.models import embeddings
from lmkit.models.embeddings import analogy, cosine_table, loss_of, nearest, num_updates, train


def loss_by_definition(vectors, contexts, row, reach, negatives, num_negatives, objective):
    """Sum over pairs of one segment, with loops and logarithms; and the number of pairs."""
    window = (len(row) - len(reach)) // 2

    def sigmoid(x):
        return 1 / (1 + math.exp(-float(x)))

    total, pairs = 0.0, 0
    for place, far in enumerate(reach, start=window):
        around = [p for p in range(place - far, place + far + 1) if p != place and row[p] >= 0]
        if row[place] < 0 or not around:
            continue
        if objective == "skipgram":
            scored = [(vectors[row[place]], contexts[row[p]]) for p in around]
        else:
            scored = [(torch.stack([vectors[row[p]] for p in around]).mean(0), contexts[row[place]])]
        for source, target in scored:
            total -= math.log(sigmoid(source @ target))
            noise = [math.log(sigmoid(-(source @ contexts[n]))) for n in negatives]
            total -= num_negatives * sum(noise) / len(noise)
            pairs += 1
    return total, pairs


@pytest.mark.parametrize("objective", ["cbow", "skipgram"])
def test_the_loss_is_its_definition(objective):
    torch.manual_seed(0)
    vectors, contexts = torch.randn(7, 4), torch.randn(7, 4)
    rows = torch.tensor([[-1, -1, 3, 0, 5, 5, 1], [0, 1, 2, 3, -1, -1, -1], [-1, -1, 6, -1, -1, -1, -1]])
    reach, negatives = torch.tensor([[1, 2, 2], [2, 1, 1], [2, 2, 2]]), torch.tensor([4, 0, 0, 6])
    found, pairs = loss_of(vectors, contexts, rows, reach, negatives, 5, objective)
    each = [
        loss_by_definition(vectors, contexts, row, far, negatives, 5, objective)
        for row, far in zip(rows.tolist(), reach.tolist())
    ]
    assert pairs == sum(number for _, number in each) > 0
    assert found.item() == pytest.approx(sum(loss for loss, _ in each), rel=1e-5)


def test_skip_gram_converges_to_the_shifted_mutual_information(monkeypatch):
    """Levy and Goldberg 2014: u . v = log(n(v, u) / (k n(v) P(u))) with n the known counts of neighbours.

    Of two places on either side the far one is seen half of the time.
    """
    monkeypatch.setattr(embeddings, "SHARED_NOISE", 256)
    generator, tokens = np.random.default_rng(0), [0]
    transitions = generator.dirichlet(np.ones(5), size=5)
    for _ in range(1500):
        tokens.append(int(generator.choice(5, p=transitions[tokens[-1]])))
    tokens = np.array(tokens)
    neighbours = np.zeros((5, 5))
    for distance, share in ((1, 1.0), (2, 0.5)):
        np.add.at(neighbours, (tokens[:-distance], tokens[distance:]), share)
    neighbours += neighbours.T
    options = {"hidden_size": 8, "window": 2, "num_negatives": 3, "subsample": None, "num_epochs": 300}
    vectors, contexts = train(tokens, 5, learning_rate=0.2, **options)
    noise = np.bincount(tokens) ** 0.75 / (np.bincount(tokens) ** 0.75).sum()
    wanted = np.log(neighbours / (3 * neighbours.sum(1, keepdims=True) * noise))
    np.testing.assert_allclose((vectors @ contexts.T).numpy(), wanted, atol=0.1)


# Nouns by three attributes; a sentence is a noun between words that go with its attributes, and with nothing else.
NAMES = ["man", "woman", "boy", "girl", "king", "queen", "prince", "princess"]
NOUNS = dict(zip(itertools.product((0, 1), repeat=3), NAMES))
COMPANY = [("field", "crown"), ("his", "her"), ("old", "young")]
ATTRIBUTES = {noun: (royal, female, young) for (royal, young, female), noun in NOUNS.items()}
WORDS = sorted({*ATTRIBUTES, *itertools.chain(*COMPANY), "."})
ID = {word: i for i, word in enumerate(WORDS)}


def royal_corpus(num_sentences):
    generator, words = np.random.default_rng(0), []
    for _ in range(num_sentences):
        noun = generator.choice(list(ATTRIBUTES))
        company = generator.permutation([pair[value] for pair, value in zip(COMPANY, ATTRIBUTES[noun])])
        words += [company[0], noun, *company[1:], "."]
    return np.array([ID[word] for word in words])


@pytest.mark.parametrize("objective", ["cbow", "skipgram"])
def test_analogies_put_into_a_corpus_are_found(objective):
    options = {"hidden_size": 16, "window": 2, "subsample": None, "num_epochs": 12}
    vectors, _ = train(royal_corpus(4000), len(WORDS), objective=objective, **options)
    assert WORDS[analogy(vectors, ID["man"], ID["king"], ID["woman"])[0][0]] == "queen"
    flips = [
        (a, b, c, d)
        for a, b, c, d in itertools.permutations(ATTRIBUTES, 4)
        if all(ATTRIBUTES[a][i] - ATTRIBUTES[b][i] == ATTRIBUTES[c][i] - ATTRIBUTES[d][i] for i in range(3))
    ]
    right = [WORDS[analogy(vectors, ID[a], ID[b], ID[c])[0][0]] == d for a, b, c, d in flips]
    assert len(right) == 96
    assert np.mean(right) > 0.95, np.mean(right)


def test_words_in_like_company_are_near():
    vectors, _ = train(royal_corpus(4000), len(WORDS), hidden_size=16, window=2, subsample=None, num_epochs=12)
    table = cosine_table(vectors[[ID["king"], ID["queen"], ID["girl"]]])
    assert table[0, 1] > table[0, 2]
    assert np.diag(table) == pytest.approx(1)


def test_of_one_hot_codes_no_word_is_like_another():
    np.testing.assert_array_equal(cosine_table(np.eye(4)), np.eye(4))
    assert nearest(np.eye(3), np.eye(3)[1], 3) == [(1, 1.0), (0, 0.0), (2, 0.0)]


def test_the_same_seed_gives_the_same_bits_and_another_does_not():
    tokens, options = royal_corpus(300), {"hidden_size": 8, "num_epochs": 2, "batch_tokens": 512}
    one, again, other = (train(tokens, len(WORDS), seed=seed, **options)[0] for seed in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_the_log_counts_every_token_once_an_epoch():
    tokens, seen = royal_corpus(100), []
    train(tokens, len(WORDS), num_epochs=2, batch_tokens=128, log=lambda *row: seen.append(row))
    assert [update for update, _, _ in seen] == list(range(1, num_updates(len(tokens), 2, 128) + 1))
    assert sum(num_tokens for _, _, num_tokens in seen) == 2 * len(tokens)
    assert seen[-1][1] < seen[0][1]


def test_frequent_tokens_are_thinned_out_by_the_published_rule(monkeypatch):
    tokens, lengths = np.array([0] * 9000 + [1] * 1000), []
    monkeypatch.setattr(embeddings, "shuffled", lambda p, n, s: lengths.append(len(p) * embeddings.SEGMENT) or p)
    train(tokens, 2, hidden_size=2, subsample=0.1, num_epochs=1)
    assert lengths[0] == pytest.approx(9000 * math.sqrt(0.1 / 0.9) + 1000, rel=0.05)


def test_a_stream_without_neighbours_is_refused():
    with pytest.raises(BadInput, match="word vectors need tokens beside each other; found 1"):
        train(np.array([3]), 5)
