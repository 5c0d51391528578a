"""Side by side: log-probabilities by hand, KL, best-of-n, and who judges."""

import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, Qwen3Config

from lmkit.errors import BadInput
from lmkit.evaluation.compare import (
    best_of_metrics,
    check_same_tokenizer,
    completion_logprobs,
    gold_components,
    judge,
    model_scores,
    pick_best,
    sequence_kl,
    shape_metrics,
    side_by_side,
)
from lmkit.generation.complete import Completion

REQUEST = "Tell me a story about an otter and an umbrella."


def model(seed, cls=AutoModelForCausalLM):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    config = Qwen3Config(vocab_size=20, num_labels=1, pad_token_id=0, initializer_range=0.3, **sizes, **heads)
    return cls.from_config(config).eval()


def completions(num=7):
    generator = torch.Generator().manual_seed(0)

    def ids(low, high):
        length = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(0, 20, (length,), generator=generator).tolist()  # the pad id 0 is a token like others

    return [Completion(ids(1, 5), ids(1, 6), f"text {i}", i % 2 == 0) for i in range(num)]


def test_log_probabilities_are_those_of_each_sequence_alone():
    policy, rows = model(0), completions()
    totals = completion_logprobs(policy, rows, batch_size=3)
    for row, total in zip(rows, totals):
        logprobs = policy(torch.tensor([row.prompt_ids + row.ids])).logits[0].log_softmax(-1)
        by_hand = sum(logprobs[len(row.prompt_ids) + k - 1, token] for k, token in enumerate(row.ids))
        assert float(total) == pytest.approx(by_hand.item(), abs=1e-4)


def test_the_kl_of_a_model_from_itself_is_zero():
    assert sequence_kl(model(0), model(0), completions()).tolist() == [0.0] * 7
    assert np.abs(sequence_kl(model(0), model(1), completions())).max() > 0.1


def test_the_kl_estimate_is_the_divergence_over_all_completions():
    """One-token completions, each as often as the policy says: the weighted mean is the exact KL of the next token."""
    policy, reference = model(0), model(1)
    rows = [Completion([3, 4], [token], "", True) for token in range(20)]
    p, q = (m(torch.tensor([[3, 4]])).logits[0, -1].log_softmax(-1).double() for m in (policy, reference))
    estimate = float((p.exp().detach().numpy() * sequence_kl(policy, reference, rows)).sum())
    assert estimate == pytest.approx((p.exp() * (p - q)).sum().item(), abs=1e-5)


def test_a_centred_reward_model_scores_less_by_its_mean():
    reward, rows = model(0, AutoModelForSequenceClassification), completions()
    plain = model_scores(reward, rows)
    reward.config.score_mean = 0.25
    assert model_scores(reward, rows) == pytest.approx(plain - 0.25)


def test_best_of_n_grows_with_n_and_headroom_is_over_the_mean():
    values = np.random.default_rng(0).normal(size=(50, 8))
    metrics = best_of_metrics(values, values)
    assert metrics["best_of_n/1"] == pytest.approx(values.mean())
    assert metrics["best_of_n/8"] == pytest.approx(values.max(1).mean())
    assert metrics["best_of_n/1"] < metrics["best_of_n/2"] < metrics["best_of_n/4"] < metrics["best_of_n/8"]
    assert metrics["headroom/by_reward_model"] == pytest.approx(metrics["headroom/by_judge"])
    assert metrics["headroom/by_judge"] == pytest.approx(values.max(1).mean() - values.mean())
    assert metrics["best_of_n_kl/8"] == pytest.approx(math.log(8) - 7 / 8)


def test_the_best_is_picked_for_each_prompt():
    rows = completions(6)
    assert pick_best(rows, np.array([[1.0, 3.0, 2.0], [9.0, 0.0, 1.0]])) == [rows[1], rows[3]]


def test_gold_judges_tales_and_a_reward_model_other_prompts():
    rows = completions(1)
    name, values, many = judge([REQUEST], {"sft": rows}, rows * 3, None)
    assert name == "gold"
    assert values["sft"].shape == (1,)
    assert many.shape == (1, 3)
    name, values, many = judge(["2 + 2?"], {"sft": rows}, rows * 3, model(0, AutoModelForSequenceClassification))
    assert name == "judge"
    assert values["sft"] == pytest.approx(many[:, 0])
    assert judge(["2 + 2?"], {"sft": rows}, rows * 3, None) is None


def test_every_component_of_gold_is_there_by_name():
    metrics = gold_components([REQUEST], {"sft": completions(1)})
    parts = {"animal", "object", "kindness", "ending", "hero", "grammar", "repetition", "length"}
    assert set(metrics) == {f"gold_{part}/sft" for part in parts}


def test_lengths_and_stops_are_counted():
    rows = [Completion([1], [2, 3], "", True), Completion([1], [2, 3, 4, 5], "", False)]
    assert shape_metrics({"sft": rows}) == {"length/sft": 3.0, "eos_rate/sft": 0.5}


def test_rows_lie_side_by_side():
    rows = side_by_side(["p"], {"sft": completions(1)}, {"score": {"sft": np.array([0.5])}})
    assert rows == [{"prompt": "p", "sft": "text 0", "score": {"sft": 0.5}}]


def test_models_with_other_tokenizers_are_refused():
    class Vocabulary:
        def __init__(self, words):
            self.words = words

        def get_vocab(self):
            return self.words

        def __len__(self):
            return len(self.words)

    check_same_tokenizer({"sft": Vocabulary({"a": 0}), "ppo": Vocabulary({"a": 0})})
    with pytest.raises(BadInput, match=r"sft \(1 tokens\) and reward \(2 tokens\) differ"):
        check_same_tokenizer({"sft": Vocabulary({"a": 0}), "reward": Vocabulary({"a": 0, "b": 1})})
