import pytest

from lmkit.report.checks import warnings
from lmkit.report.read import Run, StageData

FINE = {
    "judge": "gold",
    "length/sft": 70.0,
    "length/ppo": 75.0,
    "win_rate/ppo_vs_sft": 0.87,
    "win_rate/ppo_vs_sft_low": 0.82,
    "win_rate/ppo_vs_sft_high": 0.91,
    "score/sft": 0.0,
    "score/ppo": 2.0,
    "gold/sft": 3.3,
    "gold/ppo": 5.4,
    "gold_animal/sft": 0.6,
    "gold_animal/ppo": 0.8,
    "eos_rate/sft": 0.95,
    "eos_rate/ppo": 1.0,
    "kl/ppo": 8.4,
    "bits_per_byte/base": 0.22,
    "bits_per_byte/ppo": 0.23,
}


def a_run(tmp_path, evaluation, **stages):
    return Run(tmp_path, stages, evaluation, [])


def a_stage(metrics=None, ending=None, rows=(), log=()):
    return StageData(None if metrics is None else {"metrics": metrics}, ending, list(rows), [], list(log))


def test_a_run_in_order_has_no_warnings(tmp_path):
    assert warnings(a_run(tmp_path, FINE, reward=a_stage({"calibration_error": 0.03, "length_correlation": 0.2}))) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_prompts": 16}, "compared on 16 prompts"),
        ({"judge": "none"}, "No judge independent of the reward model"),
        ({"win_rate/ppo_vs_sft_low": 0.49}, "No difference between PPO and SFT is shown"),
        ({"win_rate/ppo_vs_sft_low": 0.3, "win_rate/ppo_vs_sft_high": 0.4}, "PPO loses to SFT"),
        ({"gold/ppo": 3.0}, "Over-optimisation: PPO gained 2.00 by the reward model and lost 0.30 by gold"),
        ({"gold_animal/ppo": 0.5}, "worse than SFT in the component animal: 0.10 lower"),
        ({"eos_rate/ppo": 0.8}, "20% of the answers of ppo were cut off"),
        ({"length/ppo": 95.0}, "from 70 to 95 tokens"),
        ({"length/ppo": 50.0}, "from 70 to 50 tokens"),
        ({"kl/ppo": -0.1}, "cannot be negative"),
        ({"bits_per_byte/ppo": 0.26}, "Alignment tax: PPO needs 18% more bits per byte"),
    ],
)
def test_what_looks_wrong_in_the_outcome_is_said(tmp_path, change, said):
    (found,) = warnings(a_run(tmp_path, FINE | change))
    assert said in found


@pytest.mark.parametrize(
    ("metrics", "said"),
    [
        ({"num_heldout": 1}, "on 1 held-out pair(s)"),
        ({"calibration_error": 0.2}, "off by 20.0%"),
        ({"length_correlation": -0.6}, "correlation -0.60"),
    ],
)
def test_what_looks_wrong_in_the_reward_model_is_said(tmp_path, metrics, said):
    (found,) = warnings(a_run(tmp_path, FINE, reward=a_stage(metrics)))
    assert said in found


def test_warnings_of_the_stages_are_repeated_once(tmp_path):
    stage = a_stage({}, log=["reward: facts", "warning: accuracy is low", "warning: accuracy is low"])
    assert warnings(a_run(tmp_path, {}, reward=stage)) == ["reward: accuracy is low"]


def test_a_gold_score_that_peaks_and_falls_is_said(tmp_path):
    def found(*values):
        rows = [{"step": 10 * n, "eval/gold": value} for n, value in enumerate(values)]
        return warnings(a_run(tmp_path, {}, ppo=a_stage({}, rows=rows)))

    assert found(2.0, 3.0, 3.9, 3.8) == []
    (said,) = found(2.0, 3.0, 3.9, 2.6)
    assert "highest at iteration 20 (3.90) and ended at 2.60" in said


def test_how_an_unfinished_stage_ended_is_said(tmp_path):
    stage = a_stage(ending={"code": 4, "reason": "KL 30 is above guard_max_kl"})
    assert warnings(a_run(tmp_path, {}, ppo=stage)) == ["ppo ended with exit code 4: KL 30 is above guard_max_kl"]
    finished = a_stage({}, ending={"code": 0, "reason": "done"})
    assert warnings(a_run(tmp_path, {}, ppo=finished)) == []
