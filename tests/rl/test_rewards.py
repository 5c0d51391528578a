import math
import sys

import pytest
import torch

from lmkit.errors import BadInput
from lmkit.models.heads import last_token_scores
from lmkit.rl.rewards import Batch, make_reward


@pytest.fixture
def batch():
    ids = [[21, 22, 2], [23, 24, 25, 3], [26, 3, 3]]
    return Batch(["w1", "w3", "w6"], ["w2", "w4 w5", ""], ids, {"answer": [4, 5, 6], "source": ["a", "b", "c"]})


def make(reward, tokenizer):
    return make_reward(reward, tokenizer, batch_size=2)


def test_model_directory_and_function_give_the_same_scores(batch, reward_model, tokenizer, tmp_path):
    reward_model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    expected = last_token_scores(reward_model, batch.ids)

    def function(prompts, completions, answer, source):
        return expected.tolist()

    for reward in (reward_model, tmp_path, str(tmp_path), function):
        assert torch.allclose(make(reward, tokenizer)(batch), expected, atol=1e-6)


def test_a_model_scores_the_last_token_also_where_it_equals_pad(batch, reward_model, tokenizer):
    """Ids 3 are the pad: the stock forward would score the token before them."""
    scores = make(reward_model, tokenizer)(batch)
    shorter = make(reward_model, tokenizer)(Batch([""] * 3, [""] * 3, [ids[:-1] for ids in batch.ids], {}))
    assert (scores - shorter).abs().min() > 1e-4


def test_a_function_is_given_prompts_completions_and_every_column(batch, tokenizer):
    seen = {}
    make(lambda **given: seen.update(given) or [0, 1, 2], tokenizer)(batch)
    assert seen == {"prompts": batch.prompts, "completions": batch.completions, **batch.columns}


@pytest.mark.parametrize("scores", [[1, 2.5, True], torch.tensor([1.0, 2.5, 1.0]), (1, 2.5, 1.0)])
def test_any_sequence_of_numbers_will_do(batch, tokenizer, scores):
    found = make(lambda **_: scores, tokenizer)(batch)
    assert found.tolist() == [1.0, 2.5, 1.0]
    assert found.dtype == torch.float32


def too_short(prompts, completions, **columns):
    return [1.0, 2.0]


def not_a_number(prompts, completions, **columns):
    return [1.0, math.nan, 2.0]


def a_text(prompts, completions, **columns):
    return [1.0, 2.0, "3"]


def nothing(prompts, completions, **columns):
    return [None, 1.0, 2.0]


def one_text(prompts, completions, **columns):
    return "abc"


def one_number(prompts, completions, **columns):
    return 1.0


def raises(prompts, completions, **columns):
    raise KeyError("answr")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (too_short, "too_short returned 2 values for 3 completions; wanted one each"),
        (not_a_number, "not_a_number returned nan for row 1; wanted a finite number.*'w4 w5'"),
        (a_text, "a_text returned '3' for row 2"),
        (nothing, "nothing returned None for row 0"),
        (one_text, "one_text returned 'abc' for 3 completions"),
        (one_number, "one_number returned 1.0 for 3 completions"),
        (raises, "raises raised KeyError: 'answr'"),
    ],
)
def test_what_a_function_does_wrong_is_named_with_its_row(batch, tokenizer, function, message):
    with pytest.raises(BadInput, match=message):
        make(function, tokenizer)(batch)


def test_a_function_by_name(batch, tokenizer, tmp_path, monkeypatch):
    (tmp_path / "my_rewards_for_a_test.py").write_text(
        "def ones(prompts, completions, **_): return [1.0] * len(prompts)"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != ""])
    assert make("my_rewards_for_a_test:ones", tokenizer)(batch).tolist() == [1.0, 1.0, 1.0]
    with pytest.raises(BadInput, match=r"'my_rewards_for_a_test:twos' cannot be imported.*twos"):
        make("my_rewards_for_a_test:twos", tokenizer)


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("runs/nowhere/model", "'runs/nowhere/model' is not a directory; wanted a reward model's directory or 'module"),
        ("no_such_module:f", "'no_such_module:f' cannot be imported: No module named"),
        (3, "reward is 3; wanted a reward model, its directory"),
    ],
)
def test_what_is_no_reward_is_refused(tokenizer, reward, message):
    with pytest.raises(BadInput, match=message):
        make(reward, tokenizer)


def test_a_reward_model_of_another_vocabulary_is_refused(reward_model, tokenizer, tmp_path):
    reward_model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    tokenizer.add_tokens(["w99"])
    with pytest.raises(BadInput, match=r"another vocabulary \(43 tokens|another vocabulary \(\d+ tokens"):
        make(tmp_path, tokenizer)
