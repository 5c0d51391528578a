import math
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator

from lmkit.generation.sampler import Completions
from lmkit.rl.config import PPOConfig
from lmkit.rl.metrics import (
    EVALUATED,
    evaluation_metrics,
    explained_variance,
    guard,
    repeated_ngrams,
    rollout_metrics,
    warnings,
)
from lmkit.rl.rollout import unscored

HEALTHY = {
    "val/first_ratio_error": 1e-6,
    "sampling/logprob_diff_mean": 0.01,
    "objective/kl": 3.0,
    "objective/kl_k3": 3.0,
    "objective/scores": 1.0,
    "objective/scores_std": 0.5,
    "val/ratio_max": 2.0,
    "policy/clipfrac_avg": 0.05,
    "policy/entropy_avg": 1.0,
    "rollout/unique_frac": 1.0,
    "rollout/truncated_rate": 0.1,
    "rollout/eos_rate": 0.9,
    "val/explained_var": 0.5,
}


def test_a_healthy_run_is_not_warned_of_also_without_a_critic():
    assert warnings(HEALTHY, Accelerator()) == {}
    assert warnings({k: v for k, v in HEALTHY.items() if k != "val/explained_var"}, Accelerator()) == {}


@pytest.mark.parametrize(
    ("broken", "kind", "cause"),
    [
        ({"val/first_ratio_error": 0.01}, "ratio", "old log-probabilities and the training forward disagree"),
        ({"sampling/logprob_diff_mean": 0.4}, "sampler", "0.4 nats a token from those of the training forward"),
        ({"objective/kl": -2.0}, "kl", "completions are not drawn from the policy"),
        ({"val/ratio_max": 30.0}, "step", "moved 30-fold in one iteration: lower learning_rate"),
        ({"policy/clipfrac_avg": 0.7}, "clip", "70% of the tokens have ratios outside the clip"),
        ({"sampling/importance_sampling_capped": 0.2}, "lag", "20% of the tokens are over importance_sampling_cap"),
        ({"objective/scores_std": 0.0}, "reward", "nothing to learn from this reward"),
        ({"rollout/unique_frac": 0.2}, "same", "the policy has collapsed; raise kl_coef"),
        ({"val/explained_var": -3.0}, "critic", "lower value_learning_rate, raise vf_coef"),
        ({"rollout/truncated_rate": 0.8}, "truncated", "80% of the completions never stop: raise max_new_tokens"),
    ],
)
def test_each_thing_that_looks_broken_has_its_likely_cause(broken, kind, cause):
    found = warnings(HEALTHY | broken, Accelerator())
    assert [*found] == [kind]
    assert cause in found[kind]


@pytest.mark.parametrize("name", ["objective/kl", "rollout/eos_rate", "policy/entropy_avg"])
def test_a_guard_holds_at_its_limit_and_breaks_on_nan(name):
    limits = PPOConfig(guard_max_kl=3.0, guard_min_eos_rate=0.9, guard_min_entropy=1.0)
    assert guard(HEALTHY, limits) is None
    assert "guard_m" in guard(HEALTHY | {name: float("nan")}, limits)
    assert guard(HEALTHY | {name: float("nan")}, PPOConfig()) is None


def test_another_engines_distance_is_no_warning_of_the_sampler():
    other = {"sampling/logprob_diff_mean": 0.4, "sampling/importance_sampling_capped": 0.0}
    assert warnings(HEALTHY | other, Accelerator()) == {}


def test_a_rollouts_metrics_by_hand():
    """Three completions of 1, 2 and 3 tokens, the last cut off; the first two are the same two tokens but for one."""
    lengths = torch.tensor([1, 2, 3])
    mask = torch.arange(3) < lengths[:, None]
    tokens = torch.tensor([[7, 0, 0], [7, 8, 0], [7, 8, 9]])
    logprobs = torch.tensor([[-1.0, 0, 0], [-1.0, -2.0, 0], [-1.0, -2.0, -3.0]])
    drawn = Completions(tokens, lengths, logprobs + 0.5 * mask, ["stop", "stop", "length"])
    numbers = {"logprobs": logprobs, "ref_logprobs": logprobs - 0.25 * mask, "values": 2.0 * mask}
    numbers |= {"entropies": 3.0 * mask, "scores": torch.tensor([1.0, 2.0, 6.0])}
    rollout = replace(unscored([[5], [5, 5], [5, 5, 5, 5]], drawn), **numbers)
    found = rollout_metrics(rollout, PPOConfig(importance_sampling_cap=2.0), kl_coef=0.1)
    assert found == pytest.approx(
        {
            "objective/scores": 3.0,
            "objective/scores_std": math.sqrt(14 / 3),
            "objective/kl": 0.25 * 6 / 3,
            "objective/kl_k3": (math.exp(-0.25) - 1 + 0.25) * 6 / 3,
            "objective/entropy": (1 + 3 + 6) / 3,
            "objective/kl_coef": 0.1,
            "policy/entropy_avg": 3.0,
            "val/mean": 2.0,
            "val/num_eos_tokens": 2,
            "rollout/completion_length_mean": 2.0,
            "rollout/completion_length_max": 3.0,
            "rollout/eos_rate": 2 / 3,
            "rollout/truncated_rate": 1 / 3,
            "rollout/pad_waste": 1 - (2 + 4 + 7) / (3 * 7),
            "rollout/unique_frac": 1.0,
            "rollout/repeat_ngram": 0.0,
            "sampling/logprob_diff_mean": 0.5,
            "sampling/logprob_diff_max": 0.5,
            "sampling/kl": 0.5 * 6 / 3,
            "sampling/importance_sampling_capped": 0.0,
        },
        rel=1e-5,
    )
    far = replace(rollout, sampled_logprobs=logprobs - 1.0 * mask * torch.tensor([0, 0, 1]))
    capped = rollout_metrics(far, PPOConfig(importance_sampling_cap=2.0), kl_coef=0.1)
    assert capped["sampling/importance_sampling_capped"] == pytest.approx(1 / 6)  # e, over 2 by more than rounding


def test_wins_are_counted_row_by_row_and_a_tie_is_half():
    found = evaluation_metrics(dict.fromkeys(EVALUATED.values(), 1.0), [1.0, 2.0, 0.0, 5.0], [0.0, 2.0, 1.0, 4.0])
    assert found["eval/win_rate_vs_ref"] == 2.5 / 4
    assert found["eval/score_gain"] == 1 / 4


def test_explained_variance_is_1_for_the_returns_themselves_0_for_a_constant_and_never_an_error():
    lengths = torch.tensor([3, 2])
    tokens = Completions(torch.ones(2, 3).long(), lengths, torch.zeros(2, 3), ["stop", "stop"])
    rollout = unscored([[4], [5]], tokens)
    returns = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 99.0]])
    values = torch.where(rollout.mask, returns, 0.0)

    def found(table, mask=rollout.mask):
        return explained_variance(replace(rollout, values=table), returns, mask)["val/explained_var"]

    assert found(values) == pytest.approx(1)
    assert found(values + 7) == pytest.approx(1)  # a constant error is no lack of explanation
    assert found(torch.full((2, 3), 2.0)) == pytest.approx(0)
    assert found(-values) == pytest.approx(-3)
    assert found(values, torch.zeros(2, 3).bool()) == 0


def test_repeated_ngrams_of_a_loop_and_of_a_short_row():
    assert repeated_ngrams((1, 2, 3, 4) * 3) == pytest.approx(5 / 9)
    assert repeated_ngrams((1, 2)) == 0.0
