"""The SFT stage at nano size: a plain model directory, counts, bad input, stopping and going on."""

import json

import pytest
import torch
from sft import SFTStageConfig, main
from transformers import AutoModelForCausalLM, AutoTokenizer

from lmkit.config import load
from lmkit.errors import BadInput, Interrupted
from lmkit.models.load import load_language_model
from lmkit.models.presets import ModelConfig, build_model
from lmkit.stage import Stage, read_record
from lmkit.tokenization.chat import render, stop_token_ids
from lmkit.tracking import read_jsonl

TRAIN = {
    "max_steps": 4,
    "per_device_eval_batch_size": 4,
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
    "save_steps": 2,
    "eval_steps": 2,
}


def config(nano, directory, **changes):
    values = {"output_dir": directory, "model": nano / "model", "data": str(nano / "sft.jsonl")} | changes
    values["train"] = SFTStageConfig().train | TRAIN | values.get("train", {})
    return SFTStageConfig(**values)


def test_the_model_is_a_plain_directory_that_knows_when_to_stop(nano, tmp_path, capsys):
    directory = main(config(nano, tmp_path / "sft"))
    model = AutoModelForCausalLM.from_pretrained(directory / "model")
    tokenizer = AutoTokenizer.from_pretrained(directory / "model")
    assert tokenizer.chat_template
    assert set(model.generation_config.eos_token_id) == set(stop_token_ids(tokenizer))
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    before = AutoModelForCausalLM.from_pretrained(nano / "model").state_dict()
    assert any(not torch.equal(value, before[name]) for name, value in model.state_dict().items())
    said = capsys.readouterr().out
    assert "demonstrations: 38 rows" in said
    assert "2 held out rows" in said
    assert "sample: " in said
    record = read_record(directory)
    assert record["metrics"]["eval_loss"] > 0
    assert record["inputs"].keys() == {"model", "data"}
    rows = read_jsonl(directory / "samples.jsonl")
    assert [row["step"] for row in rows] == [2] * 2 + [4] * 2  # two held-out prompts at each evaluation
    assert rows[0].keys() == {"step", "prompt", "completion"}


def test_a_second_run_is_skipped(nano, tmp_path, capsys):
    main(config(nano, tmp_path / "sft"))
    main(config(nano, tmp_path / "sft"))
    assert "finished already, skipped" in capsys.readouterr().out


def test_stopping_and_going_on_gives_the_same_model(nano, tmp_path, monkeypatch):
    whole = main(config(nano, tmp_path / "whole"))
    asked = iter(range(1, 100))
    with monkeypatch.context() as patch:
        patch.setattr(Stage, "stop_requested", lambda self: next(asked) == 3)
        with pytest.raises(Interrupted):
            main(config(nano, tmp_path / "run"))
    run = main(config(nano, tmp_path / "run"))
    assert (run / "model/model.safetensors").read_bytes() == (whole / "model/model.safetensors").read_bytes()


def test_adapters_end_in_a_plain_directory_and_resume_exactly(nano, tmp_path, monkeypatch):
    lora = {"r": 4, "lora_dropout": 0.1, "target_modules": ["q_proj", "down_proj"]}
    whole = main(config(nano, tmp_path / "whole", lora=lora))
    asked = iter(range(1, 100))
    with monkeypatch.context() as patch:
        patch.setattr(Stage, "stop_requested", lambda self: next(asked) == 3)
        with pytest.raises(Interrupted):
            main(config(nano, tmp_path / "run", lora=lora))
    run = main(config(nano, tmp_path / "run", lora=lora))
    assert (run / "model/model.safetensors").read_bytes() == (whole / "model/model.safetensors").read_bytes()
    assert not (whole / "model/adapter_config.json").exists()
    before = AutoModelForCausalLM.from_pretrained(nano / "model").state_dict()
    after = AutoModelForCausalLM.from_pretrained(whole / "model").state_dict()
    changed = {name.split(".")[-2] for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == {"q_proj", "down_proj"}


def test_packed_rows_give_the_loss_of_single_ones(nano, tmp_path):
    """No packed row sees another: the first step's loss is the mean over the same tokens as without packing."""
    first, few = {}, tmp_path / "few.jsonl"
    few.write_text("".join((nano / "sft.jsonl").read_text().splitlines(keepends=True)[:10]))
    for packing in (False, True):
        train = {"packing": packing, "max_steps": 1, "per_device_train_batch_size": 64, "eval_strategy": "no"}
        directory = main(config(nano, tmp_path / str(packing), data=str(few), eval_fraction=0.2, train=train))
        first[packing] = read_jsonl(directory / "metrics.jsonl")[0]["loss"]
    assert first[True] == pytest.approx(first[False], rel=1e-4)


@pytest.mark.parametrize("size", [1, 3, 8])
def test_the_held_out_loss_is_a_mean_over_tokens(nano, tmp_path, size):
    """Of answers of very unequal length, in batches of any size: that of each row by itself, over all tokens."""
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"Say {n}", "completion": "so " * (1 + 20 * (n % 3))} for n in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = {"max_steps": 1, "per_device_eval_batch_size": size, "learning_rate": 0.05}
    directory = main(config(nano, tmp_path / "sft", eval_data=str(path), train=train))
    model, tokenizer = load_language_model(directory / "model")
    total = count = 0.0
    for row in rows:
        prompt, completion = render(tokenizer, row["prompt"], row["completion"])
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        total += torch.nn.functional.cross_entropy(logits, torch.tensor(completion), reduction="sum").item()
        count += len(completion)
    assert read_record(directory)["metrics"]["eval_loss"] == pytest.approx(total / count, rel=1e-5)


def test_packing_is_refused_where_rows_would_see_each_other(nano, tmp_path):
    torch.manual_seed(0)
    tokenizer = load_language_model(nano / "model")[1]
    for part in (build_model(ModelConfig(arch="lstm", preset="nano", context_length=256), tokenizer), tokenizer):
        part.save_pretrained(tmp_path / "model")
    with pytest.raises(BadInput, match=r"does not keep documents of one row apart.*Leave out train\.packing"):
        main(config(nano, tmp_path / "sft", model=tmp_path / "model", train={"packing": True}))


def test_one_row_leaves_nothing_to_hold_out(nano, tmp_path):
    path = tmp_path / "one.jsonl"
    path.write_text((nano / "sft.jsonl").read_text().splitlines(keepends=True)[0])
    with pytest.raises(BadInput, match="1 row: nothing is left to learn from beside what is held out"):
        main(config(nano, tmp_path / "sft", data=str(path)))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--train.learning_rte", "1"], "learning_rte: unknown option of SFTConfig. Did you mean learning_rate?"),
        (["--train.max_steps", "many"], "max_steps: Input should be a valid integer"),
        (["--on_truncation", "ignore"], "on_truncation"),
        (["--train.assistant_only_loss", "true"], "is set by the stage; remove it. Instead: --assistant_only_loss"),
        (["--lora.load_in_4bit", "true"], "lora  load_in_4bit: weights in 4 bits cannot be trained. Give the adapters"),
        (["--lora.alpha", "8"], "lora.alpha  unknown option. Did you mean lora_alpha?"),
    ],
)
def test_wrong_flags_are_answered_before_anything_starts(flags, message):
    with pytest.raises(BadInput) as error:
        load(SFTStageConfig, flags)
    assert message in str(error.value)


def test_columns_that_do_not_fit_are_named_with_the_mapping_to_write(nano, tmp_path):
    path = tmp_path / "odd.jsonl"
    path.write_text('{"frage": "a", "antwort": "b"}\n' * 30)
    with pytest.raises(BadInput, match=r"frage, antwort(.|\n)*mapping"):
        main(config(nano, tmp_path / "sft", data=str(path)))
    mapping = {"prompt": "frage", "completion": "antwort"}
    main(config(nano, tmp_path / "sft2", data=str(path), mapping=mapping))


def test_rows_that_do_not_fit_stop_the_stage(nano, tmp_path):
    with pytest.raises(BadInput, match="longer than max_length 60"):
        main(config(nano, tmp_path / "sft", max_length=60))
