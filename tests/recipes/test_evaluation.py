"""The evaluation stage at nano size: the keys others read, with gold and without."""

import json
import math

import pytest
from evaluation import EvaluationConfig, main

from lmkit.errors import BadInput
from lmkit.models.load import load_reward_model
from lmkit.tracking import read_jsonl


def config(nano, reward_model, directory, **changes):
    values = {name: nano / "model" for name in ("base", "sft", "ppo")}
    values |= {"output_dir": directory, "reward": reward_model, "shards": nano / "shards", "best_of": 4}
    values |= {"prompts": str(nano / "prompts.heldout.jsonl"), "max_new_tokens": 16}
    return EvaluationConfig(**(values | changes))


def test_results_have_the_keys_others_read(nano, reward_model, tmp_path, capsys):
    directory = main(config(nano, reward_model, tmp_path / "evaluation"))
    metrics = json.loads((directory / "results/metrics.json").read_text())
    names = ("base", "sft", "best_of_4", "ppo")
    for name in names:
        assert {f"gold/{name}", f"length/{name}", f"eos_rate/{name}", f"score/{name}", f"gold_kindness/{name}"} <= set(
            metrics
        )
    for key in ("win_rate/ppo_vs_sft", "kl/ppo", "gold/ppo"):
        assert metrics[f"{key}_low"] <= metrics[key] <= metrics[f"{key}_high"]
    assert {"bits_per_byte/base", "bits_per_byte/sft", "bits_per_byte/ppo", "headroom/by_reward_model"} <= set(metrics)
    assert metrics["judge"] == "gold"
    assert metrics["kl/ppo"] == 0  # ppo is the SFT model here
    assert metrics["score/best_of_4"] >= metrics["score/sft"]
    rows = read_jsonl(directory / "results/samples.jsonl")
    assert len(rows) == metrics["num_prompts"] == 6
    assert {"prompt", *names, "gold", "score"} <= set(rows[0])
    said = capsys.readouterr().out
    assert "win rate" in said
    assert "sample: " in said


def test_two_runs_give_the_same_results(nano, reward_model, tmp_path):
    first = main(config(nano, reward_model, tmp_path / "a"))
    second = main(config(nano, reward_model, tmp_path / "b", report_to=["tensorboard"]))
    assert [folder.exists() for folder in (first / "tensorboard", second / "tensorboard")] == [False, True]
    assert (first / "results/metrics.json").read_bytes() == (second / "results/metrics.json").read_bytes()


def test_a_judge_of_another_vocabulary_is_refused(nano, reward_model, tmp_path):
    model, tokenizer = load_reward_model(reward_model)
    tokenizer.add_tokens(["<|other|>"])
    model.resize_token_embeddings(len(tokenizer))
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "judge")
    with pytest.raises(BadInput, match=r"the tokenizers of base .* and judge .* differ"):
        main(config(nano, reward_model, tmp_path / "evaluation", judge=tmp_path / "judge"))


def test_without_gold_another_reward_model_judges_or_nobody(nano, reward_model, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"What is {i} + {i}?"}) + "\n" for i in range(4)))
    own = {"prompts": str(path), "num_prompts": 3}
    directory = main(config(nano, reward_model, tmp_path / "judged", judge=reward_model, **own))
    metrics = json.loads((directory / "results/metrics.json").read_text())
    assert metrics["judge"] == "judge"
    assert "win_rate/ppo_vs_sft" in metrics
    assert not [key for key in metrics if key.startswith("gold")]
    directory = main(config(nano, reward_model, tmp_path / "alone", **own))
    metrics = json.loads((directory / "results/metrics.json").read_text())
    assert metrics["judge"] == "none"
    assert "win_rate/ppo_vs_sft" not in metrics
    assert {"win_rate_by_score/ppo_vs_sft", "win_rate_by_length/ppo_vs_sft", "kl/ppo"} <= set(metrics)
    assert metrics["kl/best_of_4"] == pytest.approx(math.log(4) - 3 / 4)
