"""Labels of pairs: ties, noise, and held-out prompts."""

import numpy as np
import pytest

from lmkit.errors import BadInput, Interrupted
from lmkit.evaluation.label import heldout_rows, label_pairs, pairs_of, people_labelled, prefer, scorer, write_pairs
from lmkit.label.store import Answers, answers_path, read_pairs


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
    pairs = pairs_of(num_prompts=3, num_generations=2, num_pairs=3)
    rows, facts = label_pairs(list("ppqqrr"), texts, pairs, by_length, temperature=0, flip=0, seed=0)
    assert rows["chosen"] == ["long one", "longer"]
    assert rows["rejected"] == ["short", "a"]
    assert rows["prompt"] == ["p", "r"]
    assert rows["score_chosen"] == [8, 6]
    assert facts == {"ties": 1, "ceiling": 1.0}


def test_only_ties_is_an_error():
    with pytest.raises(BadInput, match="all 1 pairs are ties"):
        label_pairs(["p", "p"], ["aa", "bb"], np.array([[0, 1]]), by_length, temperature=1, flip=0, seed=0)


def test_of_three_completions_each_two_are_compared():
    texts = ["a", "aaa", "aa", "b", "bb", "bbb"]
    rows, _ = label_pairs(list("pppqqq"), texts, pairs_of(2, 3, 5), by_length, temperature=0, flip=0, seed=0)
    assert list(zip(rows["prompt"], rows["chosen"], rows["rejected"])) == [
        ("p", "aaa", "a"),
        ("p", "aa", "a"),
        ("p", "aaa", "aa"),
        ("q", "bb", "b"),
        ("q", "bbb", "b"),
    ]


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([1.0], r"gave \(1,\) numbers for 2 completions"),
        (1.0, r"gave \(\) numbers"),
        ("good", "gave 'good'; wanted one number"),
        ([None, "a"], "gave .* wanted one number for each"),
        ([1.0, float("nan")], "gave nan for completion 1: 'bb'"),
        ([float("inf"), 1.0], "gave inf for completion 0: 'aa'"),
    ],
)
def test_what_a_labeler_does_wrong_is_named(scores, message):
    def mine(prompts, completions):
        return scores

    with pytest.raises(BadInput, match=f"labeler .*mine {message}"):
        label_pairs(["p", "p"], ["aa", "bb"], np.array([[0, 1]]), mine, temperature=1, flip=0, seed=0)


def test_people_label_what_is_written_for_them(tmp_path):
    path, said, texts = tmp_path / "pairs.jsonl", [], ["a", "b", "same", "same", "c", "d"]
    write_pairs(path, ["p", "p", "q", "q", "r", "r"], texts, pairs_of(3, 2, 3))
    first, second = read_pairs(path)
    assert (first.prompt, first.completions, second.prompt) == ("p", ("a", "b"), "r")
    with pytest.raises(Interrupted, match="2 of 2 pairs wait for a person: `lmkit label "):
        people_labelled(path, print)
    answers = Answers(answers_path(path, "anna"))
    answers.add(first.id, "second", False, 1)
    with pytest.raises(Interrupted, match="1 of 2 pairs"):
        people_labelled(path, print)
    answers.add(second.id, "tie", False, 1)
    answers.close()
    rows, facts = people_labelled(path, said.append)
    assert rows.to_list() == [{"prompt": "p", "chosen": "b", "rejected": "a", "num_votes": 1, "agreement": 1.0}]
    assert facts == {"undecided": 1, "num_annotators": 1}
    assert "anna" in said[0]
    with pytest.raises(BadInput, match="nothing to compare"):
        write_pairs(path, ["q", "q"], ["same", "same"], pairs_of(1, 2, 1))


def test_only_ties_of_people_is_an_error(tmp_path):
    write_pairs(tmp_path / "pairs.jsonl", ["p", "p"], ["a", "b"], pairs_of(1, 2, 1))
    answers = Answers(answers_path(tmp_path / "pairs.jsonl", "anna"))
    answers.add(read_pairs(tmp_path / "pairs.jsonl")[0].id, "skip", False, 1)
    answers.close()
    with pytest.raises(BadInput, match="every answer is a tie, a skip"):
        people_labelled(tmp_path / "pairs.jsonl", print)


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
    with pytest.raises(BadInput, match="wanted gold, people, module:function"):
        scorer(str(tmp_path / "nothing"))


def test_gold_refuses_other_prompts_and_says_what_to_do():
    with pytest.raises(BadInput, match="--labeler"):
        scorer("lmkit.evaluation.label:gold")(["What is 2 + 2?"], ["4"])
