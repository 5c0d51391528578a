"""Labels of pairs: ties, noise, and held-out prompts."""

import numpy as np
import pytest

from lmkit.errors import BadInput
from lmkit.evaluation.label import heldout_rows, label_pairs, prefer, scorer


def by_length(prompts, completions):
    return [len(text) for text in completions]


def test_labels_are_as_noisy_as_asked():
    scores = np.tile([1.0, 0.0], (40_000, 1))
    chosen, kept = prefer(scores, temperature=1.0, flip=0.1, seed=0)
    first = 1 / (1 + np.exp(-1))
    assert kept.all()
    assert np.mean(chosen == 0) == pytest.approx(0.9 * first + 0.1 * (1 - first), abs=0.01)


def test_without_noise_the_better_is_chosen_and_ties_are_dropped():
    texts = ["long one", "short", "same", "size", "a", "longer"]
    rows, facts = label_pairs(["p", "q", "r"], texts, by_length, temperature=0, flip=0, seed=0)
    assert rows["chosen"] == ["long one", "longer"]
    assert rows["rejected"] == ["short", "a"]
    assert rows["prompt"] == ["p", "r"]
    assert rows["score_chosen"] == [8, 6]
    assert facts == {"ties": 1, "ceiling": 1.0}


def test_only_ties_is_an_error():
    with pytest.raises(BadInput, match="all 1 pairs are ties"):
        label_pairs(["p"], ["aa", "bb"], by_length, temperature=1, flip=0, seed=0)


def test_no_prompt_is_on_both_sides():
    prompts = [f"prompt {i % 50}" for i in range(500)]
    held = heldout_rows(prompts, 0.2, seed=1)
    inside = {prompt for prompt, flag in zip(prompts, held) if flag}
    outside = {prompt for prompt, flag in zip(prompts, held) if not flag}
    assert len(inside) == 10
    assert not inside & outside
    assert (held == heldout_rows(prompts, 0.2, seed=1)).all()


def test_one_prompt_is_always_held_out_and_one_is_not_enough():
    assert heldout_rows(["a", "b", "b"], 0.01, seed=0).sum() in (1, 2)
    with pytest.raises(BadInput, match="found 1 different prompts"):
        heldout_rows(["a", "a"], 0.5, seed=0)


def test_a_labeler_is_a_function_or_a_directory(tmp_path):
    assert scorer("lmkit.evaluation.label:gold")(["Tell me a story about an otter and an umbrella."], ["No."])[0] < 1
    with pytest.raises(BadInput, match="cannot be imported"):
        scorer("no_such_module:f")
    with pytest.raises(BadInput, match="wanted module:function"):
        scorer(str(tmp_path / "nothing"))


def test_gold_refuses_other_prompts_and_says_what_to_do():
    with pytest.raises(BadInput, match="--labeler"):
        scorer("lmkit.evaluation.label:gold")(["What is 2 + 2?"], ["4"])
