"""The numbers that judge, against brute force and simulation."""

import itertools
import math

import numpy as np
import pytest

from lmkit.evaluation.preference import (
    best_of,
    best_of_kl,
    bootstrap_interval,
    calibration,
    component_means,
    correlation,
    expected_accuracy,
    gold_scores,
    preference_probability,
    share,
    wins,
)

REQUEST = "Tell me a story about an otter and an umbrella."


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_best_of_is_the_mean_over_all_subsets(n):
    generator = np.random.default_rng(0)
    scores, values = generator.normal(size=(4, 5)), generator.normal(size=(4, 5))
    for row in range(4):
        subsets = list(itertools.combinations(range(5), n))
        brute = np.mean([values[row, max(subset, key=lambda i: scores[row, i])] for subset in subsets])
        assert best_of(scores, values, n)[row] == pytest.approx(brute)


def test_best_of_kl_is_that_of_independent_samples_of_equal_probability():
    """Best-of-n over K equally likely outcomes has KL sum_k p_k log(K p_k), which tends to the formula."""
    num_outcomes, n = 20_000, 8
    ranks = np.arange(num_outcomes)
    probability = ((ranks + 1) / num_outcomes) ** n - (ranks / num_outcomes) ** n
    exact = float(np.sum(probability * np.log(num_outcomes * probability)))
    assert best_of_kl(n) == pytest.approx(exact, abs=1e-3)


def test_the_interval_covers_the_mean_as_often_as_it_says():
    generator, covered = np.random.default_rng(1), 0
    for trial in range(300):
        low, high = bootstrap_interval(generator.random(60), num_resamples=400, seed=trial)
        covered += low <= 0.5 <= high
    assert covered / 300 == pytest.approx(0.95, abs=0.04)


def test_the_interval_is_that_of_the_normal_approximation():
    values = (np.arange(400) % 5 == 0).astype(float)
    half = 1.96 * math.sqrt(0.2 * 0.8 / 400)
    assert bootstrap_interval(values) == pytest.approx((0.2 - half, 0.2 + half), abs=0.005)


def test_a_tie_is_half_a_win():
    assert share("win_rate", wins([1, 1, 1, 1], [0, 1, 1, 2]))["win_rate"] == 0.5
    assert wins([2.0], [1.0]) == [1.0]


def test_the_ceiling_is_what_a_perfect_scorer_reaches_on_simulated_labels():
    generator = np.random.default_rng(2)
    gaps = generator.normal(scale=2, size=200_000)
    prefers_first = generator.random(len(gaps)) < preference_probability(gaps, 1.5)
    prefers_first ^= generator.random(len(gaps)) < 0.05
    agreed = np.mean(prefers_first == (gaps > 0))
    assert expected_accuracy(gaps, temperature=1.5, flip=0.05) == pytest.approx(agreed, abs=0.005)
    assert expected_accuracy([1.0, -2.0], temperature=0, flip=0.1) == pytest.approx(0.9)


def test_a_reward_model_that_says_its_true_probabilities_is_calibrated():
    generator = np.random.default_rng(3)
    margins = np.abs(generator.normal(scale=2, size=50_000))
    right = generator.random(len(margins)) < preference_probability(margins, 1.0)
    bins, error = calibration(np.where(right, margins, -margins))
    assert error < 0.01
    assert sum(b["count"] for b in bins) == len(margins)
    assert all(b["accuracy"] == pytest.approx(b["confidence"], abs=0.05) for b in bins)


def test_an_overconfident_reward_model_is_not_calibrated():
    generator = np.random.default_rng(4)
    margins = np.abs(generator.normal(scale=2, size=50_000))
    right = generator.random(len(margins)) < preference_probability(margins, 1.0)
    _, error = calibration(5 * np.where(right, margins, -margins))
    assert error > 0.1


def test_correlation_sees_a_preference_for_length():
    lengths = np.arange(100)
    assert correlation(3.0 * lengths, lengths) == pytest.approx(1)
    assert correlation(-lengths, lengths) == pytest.approx(-1)
    assert correlation(np.ones(100), lengths) == 0


def test_gold_is_none_where_a_prompt_is_not_of_tales():
    golds = gold_scores([REQUEST], ["Once there was a fox."])
    assert golds[0]["gold"] < 6
    assert "kindness" in component_means(golds)
    assert gold_scores([REQUEST, "What is the capital of France?"], ["a", "b"]) is None
    assert gold_scores([[{"role": "user", "content": "Hello"}]], ["a"]) is None
