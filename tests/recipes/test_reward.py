"""The reward stage at nano size: it learns an easy preference, is centred, and says what a person must know."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from reward import RewardStageConfig, main
from transformers import AutoModelForSequenceClassification

from lmkit.artifact import seal
from lmkit.config import load
from lmkit.errors import BadInput, Interrupted
from lmkit.evaluation.reward_model import samples_of
from lmkit.models.heads import last_token_scores
from lmkit.models.load import load_reward_model
from lmkit.stage import Stage, read_record
from lmkit.tokenization.chat import render
from lmkit.tracking import read_jsonl

TRAIN = {
    "num_train_epochs": 1.0,
    "per_device_train_batch_size": 8,
    "learning_rate": 3e-3,
    "logging_steps": 1,
    "save_steps": 4,
    "eval_steps": 4,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Pairs in which the chosen answer says yes, whatever the prompt, with one label in ten turned round."""
    folder = tmp_path_factory.mktemp("pairs") / "data"
    generator = np.random.default_rng(0)

    def row(i):
        yes, no = f"Yes, {i % 7} {'so ' * (i % 5)}it is.", f"No, {i % 3} {'so ' * (i % 4)}it is not."
        flipped = i % 10 == 0
        prompt = f"Is it {int(generator.integers(100))}?"
        chosen, rejected = (no, yes) if flipped else (yes, no)
        scores = (0.0, 1.0) if flipped else (1.0, 0.0)
        names = ("prompt", "chosen", "rejected", "score_chosen", "score_rejected")
        return dict(zip(names, (prompt, chosen, rejected, *scores)))

    with seal(folder) as staging:
        splits = {"train": [row(i) for i in range(128)], "heldout": [row(i) for i in range(128, 178)]}
        DatasetDict({name: Dataset.from_list(rows) for name, rows in splits.items()}).save_to_disk(staging)
    return folder


def config(nano, data, directory, **changes):
    train = RewardStageConfig().train | TRAIN | changes.pop("train", {})
    return RewardStageConfig(output_dir=directory, model=nano / "model", data=data, train=train, **changes)


def test_an_easy_preference_is_learnt_and_measured(nano, data, tmp_path, capsys):
    directory = main(config(nano, data, tmp_path / "reward"))
    metrics = read_record(directory)["metrics"]
    assert metrics["accuracy"] == pytest.approx(0.9, abs=0.03)
    assert metrics["accuracy_low"] < metrics["accuracy"] < metrics["accuracy_high"]
    # TRL's trainer finds the last token by the pad id, everything after it by length
    trained = [row["eval_accuracy"] for row in read_jsonl(directory / "metrics.jsonl") if "eval_accuracy" in row]
    assert trained[-1] == pytest.approx(metrics["accuracy"], abs=1e-6)
    assert metrics["ceiling"] == pytest.approx(0.9, abs=0.03)
    assert metrics["accuracy_noiseless"] == pytest.approx(1.0, abs=0.03)
    assert {"calibration_error", "length_correlation", "accuracy_like_length_low"} <= metrics.keys()
    assert sum(b["count"] for b in metrics["calibration"]) == metrics["num_heldout"] == 50
    said = capsys.readouterr().out
    assert "annotators' ceiling" in said
    assert "warning" not in said
    wrong = metrics["most_wrong"]
    assert all(row["score"]["chosen"] < row["score"]["rejected"] for row in wrong)
    assert all(row["chosen"].startswith("No") and row["rejected"].startswith("Yes") for row in wrong)


def test_scores_are_centred_in_a_plain_directory(nano, data, tmp_path):
    directory = main(config(nano, data, tmp_path / "reward"))
    model, tokenizer = load_reward_model(directory / "model")
    rows = DatasetDict.load_from_disk(str(data))["train"]
    parts = [render(tokenizer, row["prompt"], row[side]) for row in rows for side in ("chosen", "rejected")]
    sequences = [prompt_ids + completion_ids for prompt_ids, completion_ids in parts]
    scores = last_token_scores(model, sequences)
    assert float(scores.mean()) == pytest.approx(0, abs=1e-4)
    stock = AutoModelForSequenceClassification.from_pretrained(directory / "model")
    offset = json.loads((directory / "model/config.json").read_text())["score_mean"]
    logit = stock(input_ids=torch.tensor([sequences[0]])).logits.item()
    assert logit - offset == pytest.approx(float(scores[0]), abs=1e-4)


def test_a_weak_reward_model_is_a_warning(nano, data, tmp_path, capsys):
    pairs = DatasetDict.load_from_disk(str(data))
    turned = {"chosen": pairs["train"]["rejected"], "rejected": pairs["train"]["chosen"]}
    pairs["train"] = Dataset.from_dict({"prompt": pairs["train"]["prompt"], **turned})
    with seal(tmp_path / "data") as staging:
        pairs.save_to_disk(staging)
    main(config(nano, tmp_path / "data", tmp_path / "reward"))
    assert "that the labels allow: expect little of PPO on it. Give more pairs" in capsys.readouterr().out


def test_an_ensemble_is_plain_directories_that_differ_by_seed(nano, data, tmp_path, capsys):
    few = {"train": {"max_steps": 4}}
    directory = main(config(nano, data, tmp_path / "reward", num_members=2, **few))
    metrics, member = read_record(directory)["metrics"], directory / "members/1"
    assert 0 < metrics["member_agreement"] <= 1
    assert metrics["accuracy_members_mean_low"] <= metrics["accuracy_members_mean"]
    assert "members agree on" in capsys.readouterr().out
    weights = [load_reward_model(folder / "model")[0].score.weight for folder in (directory, member)]
    assert not torch.equal(*weights)
    alone = main(config(nano, data, tmp_path / "alone", seed=1000, **few))
    assert (alone / "model/model.safetensors").read_bytes() == (member / "model/model.safetensors").read_bytes()
    assert read_record(alone)["metrics"] == read_record(member)["metrics"]


def test_adapters_end_in_a_plain_reward_model(nano, data, tmp_path):
    lora = {"r": 8, "target_modules": ["q_proj", "v_proj"]}
    directory = main(config(nano, data, tmp_path / "reward", lora=lora, train={"learning_rate": 1e-2}))
    assert read_record(directory)["metrics"]["accuracy"] > 0.6
    before, after = (load_reward_model(folder)[0].state_dict() for folder in (nano / "model", directory / "model"))
    changed = {name.split(".")[-2] for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == {"q_proj", "v_proj", "score"}


def test_scores_can_be_centred_on_samples_of_the_sft_model(nano, data, tmp_path):
    directory = main(config(nano, data, tmp_path / "reward", center_on="samples", max_length=64))
    prompts = DatasetDict.load_from_disk(str(data))["train"]["prompt"]
    drawn = samples_of(nano / "model", prompts, max_length=64, seed=0)
    assert len(drawn) == 128
    scores = last_token_scores(load_reward_model(directory / "model")[0], drawn)
    assert float(scores.mean()) == pytest.approx(0, abs=1e-4)
    with pytest.raises(BadInput, match=r"none of the 2 prompts has at most 4 tokens.*--max_length 8"):
        samples_of(nano / "model", prompts[:2], max_length=8, seed=0)


def test_a_margin_asks_for_a_larger_distance(nano, data, tmp_path):
    """The loss of untrained scores, all zero, is log(1 + exp(margin)) instead of log 2."""
    pairs = DatasetDict.load_from_disk(str(data))
    with seal(tmp_path / "data") as staging:
        pairs.map(lambda row: {"gap": 2.0}, keep_in_memory=True).save_to_disk(staging)
    train = {"learning_rate": 1e-9, "max_steps": 1}
    directory = main(config(nano, tmp_path / "data", tmp_path / "reward", margin="gap", train=train))
    assert read_jsonl(directory / "metrics.jsonl")[0]["loss"] == pytest.approx(float(np.logaddexp(0, 2.0)), abs=1e-3)


def test_stopping_and_going_on_gives_the_same_model(nano, data, tmp_path, monkeypatch):
    whole = main(config(nano, data, tmp_path / "whole"))
    asked = iter(range(1, 100))
    with monkeypatch.context() as patch:
        patch.setattr(Stage, "stop_requested", lambda self: next(asked) == 6)
        with pytest.raises(Interrupted):
            main(config(nano, data, tmp_path / "run"))
    run = main(config(nano, data, tmp_path / "run"))
    assert (run / "model/model.safetensors").read_bytes() == (whole / "model/model.safetensors").read_bytes()
    assert read_record(run)["metrics"] == read_record(whole)["metrics"]


def test_pairs_that_do_not_fit_and_unknown_options_are_bad_input(nano, data, tmp_path):
    with pytest.raises(BadInput, match="longer than max_length 15"):
        main(config(nano, data, tmp_path / "reward", max_length=15))
    with pytest.raises(BadInput, match=r"center_reward_coefficient(.|\n)*Did you mean center_rewards_coefficient"):
        load(RewardStageConfig, ["--train.center_reward_coefficient", "0.1"])
    with pytest.raises(BadInput, match="optim sgd: not read, since matrices learn by Muon"):
        load(RewardStageConfig, ["--train.optim", "sgd"])
    with pytest.raises(BadInput, match=r"adam_epsilon 0\.001: not read, since matrices learn by Muon"):
        load(RewardStageConfig, ["--train.adam_epsilon", "1e-3"])
    load(RewardStageConfig, ["--train.optim", "sgd", "--muon", "false"])
    load(RewardStageConfig, ["--train.optim", "sgd", "--lora.r", "4"])
