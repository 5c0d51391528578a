import subprocess
import sys
from pathlib import Path

import pytest

from lmkit.rl.config import PPOConfig


def test_needs_no_torch():
    code = "import sys, lmkit.rl.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0


RLOO = {"advantage_estimator": "rloo"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rollout_batch_size": 2, "num_mini_batches": 4}, "num_mini_batches 4 is more than rollout_batch_size 2"),
        (
            {"rollout_batch_size": 6, "num_generations": 4},
            "rollout_batch_size 6 is not a multiple of the 4",
        ),
        ({"kl_estimator": "k3"}, "kl_placement reward and kl_estimator k3: .* k3 none; use k1, or kl_placement loss"),
        ({"kl_estimator": "k2"}, "kl_placement reward and kl_estimator k2"),
        ({"kl_placement": "loss"}, "kl_placement loss and kl_estimator k1: k1 has no gradient there"),
        ({"truncation": "mask"}, "truncation mask and missing_eos_penalty 1.0: .* set missing_eos_penalty 0"),
        ({"truncation": "bootstrap"}, "truncation bootstrap and missing_eos_penalty 1.0"),
        (RLOO | {"num_generations": 1}, "advantage_estimator rloo and num_generations 1"),
        (RLOO | {"critic": "separate"}, "advantage_estimator rloo and critic separate"),
        (
            RLOO | {"truncation": "bootstrap", "missing_eos_penalty": 0},
            "advantage_estimator rloo and truncation bootstrap",
        ),
        (RLOO | {"gamma": 0.9}, "advantage_estimator rloo and gamma 0.9"),
        (RLOO | {"whiten_rewards": True}, "advantage_estimator rloo and whiten_rewards"),
        ({"adaptive_kl_target": 6.0, "kl_coef": 0}, r"adaptive_kl_target 6\.0 and kl_coef 0: it is multiplied"),
        (
            {"adaptive_kl_target": 6.0, "adaptive_kl_horizon": 50, "rollout_batch_size": 512},
            "adaptive_kl_horizon 50 and rollout_batch_size 512: one iteration could take the whole price away",
        ),
        ({"one_step_off_policy": True}, "one_step_off_policy without importance_sampling_cap: .* usually 2"),
        ({"vllm_mode": "server"}, "vllm_mode server and use_vllm false"),
    ],
)
def test_two_options_that_conflict_are_both_named(options, message):
    with pytest.raises(ValueError, match=message):
        PPOConfig(**options)


def test_every_conflict_is_told_at_once():
    with pytest.raises(ValueError, match=r"(?s)kl_placement loss.*rloo and critic separate"):
        PPOConfig(kl_placement="loss", critic="separate", **RLOO)


def test_right_combinations_pass():
    assert PPOConfig(kl_placement="loss", kl_estimator="k2").completions_per_prompt == 1
    assert PPOConfig(truncation="mask", missing_eos_penalty=0, **RLOO).completions_per_prompt == 4
    assert PPOConfig(num_generations=2).completions_per_prompt == 2
