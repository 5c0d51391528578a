"""TRL's trainers through sealed checkpoints: stopping and resuming changes no bit, damage and NaN are noticed."""

import json

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast, Qwen3Config
from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from lmkit.artifact import verify
from lmkit.config import StageConfig
from lmkit.errors import BadInput, Interrupted, Stopped
from lmkit.stage import Stage
from lmkit.tracking import read_jsonl
from lmkit.training.sealed import SealedCheckpoints, arguments, save_model, train

TRAIN = {
    "max_steps": 5,  # not the end of an epoch, where the trainer's own resume would hide a step too many
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_steps": 2,
    "gradient_checkpointing": False,
}
NUM_ROWS = 10  # not a multiple of the batch: the third step is the short end of an epoch


class SFT(SealedCheckpoints, SFTTrainer):
    pass


class Reward(SealedCheckpoints, RewardTrainer):
    pass


def tokenizer():
    words = {f"w{i}": i for i in range(30)} | {"<pad>": 30, "<eos>": 31}
    backend = Tokenizer(WordLevel(words, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


def rows(*columns):
    generator = torch.Generator().manual_seed(0)

    def ids():
        length = int(torch.randint(4, 9, (1,), generator=generator))
        return torch.randint(0, 30, (length,), generator=generator).tolist()

    made = [{column: ids() for column in columns} for _ in range(NUM_ROWS)]
    return Dataset.from_list([row | ({"labels": row["input_ids"]} if "input_ids" in row else {}) for row in made])


def trainer(kind, directory, train_block=TRAIN):
    config = Qwen3Config(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        attention_dropout=0.1,  # draws random numbers, which resuming has to continue
        pad_token_id=30,
        num_labels=1,
    )
    torch.manual_seed(0)
    stage = Stage(kind, StageConfig(output_dir=directory, seed=3))
    stage.checkpoints.mkdir(parents=True, exist_ok=True)
    common = {"processing_class": tokenizer()}
    if kind == "sft":
        model = AutoModelForCausalLM.from_config(config)
        args = arguments(SFTConfig, train_block, stage)
        return SFT(stage, model=model, args=args, train_dataset=rows("input_ids"), **common)
    model = AutoModelForSequenceClassification.from_config(config)
    args = arguments(RewardConfig, train_block | {"disable_dropout": False}, stage)
    common |= {"train_dataset": rows("chosen_ids", "rejected_ids"), "muon": True}
    return Reward(stage, model=model, args=args, **common)


def stop_after(made, step, monkeypatch):
    asked = iter(range(1, 100))
    monkeypatch.setattr(made.stage, "stop_requested", lambda: next(asked) == step)


def count_steps(made, monkeypatch):
    taken, step = [], made.training_step
    monkeypatch.setattr(made, "training_step", lambda *args, **kwargs: taken.append(1) or step(*args, **kwargs))
    return taken


def losses(directory):
    return {row["step"]: row["loss"] for row in read_jsonl(directory / "metrics.jsonl")}


@pytest.fixture(params=["sft", "reward"])
def kind(request):
    return request.param


@pytest.fixture
def whole(kind, tmp_path):
    """The weights and losses of a run that was never stopped."""
    made = trainer(kind, tmp_path / "whole")
    train(made)
    return made.model.state_dict(), losses(tmp_path / "whole")


def assert_same(made, directory, whole):
    weights, logged = whole
    assert all(torch.equal(value, weights[name]) for name, value in made.model.state_dict().items())
    assert losses(directory) == logged


@pytest.mark.parametrize("step", [1, 3, 4])
def test_stopping_and_resuming_changes_no_bit(kind, step, whole, tmp_path, monkeypatch):
    first = trainer(kind, tmp_path / "run")
    stop_after(first, step, monkeypatch)
    with pytest.raises(Interrupted, match=f"step {step} of 5"):
        train(first)
    second = trainer(kind, tmp_path / "run")
    taken = count_steps(second, monkeypatch)
    train(second)
    assert second.state.global_step == 5
    assert len(taken) == 5 - step
    assert_same(second, tmp_path / "run", whole)


def test_a_damaged_checkpoint_is_passed_over(kind, whole, tmp_path, monkeypatch):
    first = trainer(kind, tmp_path / "run")
    stop_after(first, 3, monkeypatch)
    with pytest.raises(Interrupted):
        train(first)
    newest = tmp_path / "run/checkpoints/step-000003"
    (newest / "optimizer.pt").write_bytes(b"cut off")
    second = trainer(kind, tmp_path / "run")
    train(second)
    assert list(newest.parent.glob(".corrupt-step-000003-*"))
    assert_same(second, tmp_path / "run", whole)


def test_a_run_that_has_all_its_steps_takes_no_more(kind, whole, tmp_path, monkeypatch):
    again = trainer(kind, tmp_path / "whole")
    taken = count_steps(again, monkeypatch)
    train(again)
    assert not taken
    assert_same(again, tmp_path / "whole", whole)


def test_checkpoints_are_sealed_and_two_are_kept(kind, whole, tmp_path):
    kept = sorted(path.name for path in (tmp_path / "whole/checkpoints").iterdir())
    assert kept == ["step-000004", "step-000005"]
    for name in kept:
        verify(tmp_path / "whole/checkpoints" / name)
    assert {path.name for path in (tmp_path / "whole").iterdir()} == {"checkpoints", "metrics.jsonl"}
    assert not (tmp_path / "whole/checkpoints/step-000005/training_args.bin").exists()


def test_a_gradient_that_is_not_finite_stops_before_the_update(kind, tmp_path):
    made = trainer(kind, tmp_path)
    with torch.no_grad():
        made.model.base_model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    before = {name: value.clone() for name, value in made.model.state_dict().items()}
    with pytest.raises(Stopped, match="step 1 is not finite"):
        train(made)
    assert all(torch.equal(v.nan_to_num(), before[k].nan_to_num()) for k, v in made.model.state_dict().items())
    assert not list((tmp_path / "checkpoints").iterdir())


def test_the_saved_model_is_a_plain_directory(kind, tmp_path):
    made = trainer(kind, tmp_path)
    save_model(made)
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "MANIFEST.json"} <= names
    assert "training_args.bin" not in names
    cls = AutoModelForCausalLM if kind == "sft" else AutoModelForSequenceClassification
    loaded = cls.from_pretrained(tmp_path / "model").state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in made.model.state_dict().items())


def test_metrics_have_losses_and_speed_but_no_clock_of_the_trainer(kind, whole, tmp_path):
    row = read_jsonl(tmp_path / "whole/metrics.jsonl")[0]
    assert {"step", "seconds", "loss", "grad_norm", "learning_rate", "tokens_per_second"} <= set(row)
    assert not [name for name in row if name.startswith("train_") or name in ("epoch", "num_tokens")]


def test_values_the_class_refuses_are_bad_input(tmp_path):
    stage = Stage("sft", StageConfig(output_dir=tmp_path))
    with pytest.raises(BadInput, match="train: SFTConfig refuses"):
        arguments(SFTConfig, {"eval_strategy": "steps", "save_strategy": "no", "optim": "adamw_bad"}, stage)


def test_what_the_stage_decides_is_in_the_arguments(tmp_path):
    args = arguments(SFTConfig, {"max_steps": 2}, Stage("sft", StageConfig(output_dir=tmp_path, seed=7)))
    assert (args.seed, args.report_to, args.max_length, args.logging_nan_inf_filter) == (7, [], None, False)
    if not torch.cuda.is_available():
        assert args.use_cpu
        assert not args.bf16
    assert json.loads(args.to_json_string())["disable_tqdm"]
