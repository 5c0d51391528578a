import json
import math
import subprocess
import sys

import pretrain
import pytest
import torch
from transformers import AutoModelForCausalLM

from lmkit.config import validate
from lmkit.errors import BadInput
from lmkit.stage import verify


def configure(nano, folder, **changes):
    mapping = {
        "output_dir": str(folder),
        "tokenizer": str(nano / "model"),
        "shards": str(nano / "shards"),
        "model": {"preset": "nano", "context_length": 64},
        "train": {"max_steps": 4, "warmup_steps": 1, "per_device_train_batch_size": 4, "logging_steps": 2},
        "validation_tokens": 500,
    }
    return validate(pretrain.PretrainConfig, mapping | changes)


@pytest.fixture(scope="module")
def trained(nano, tmp_path_factory):
    config = configure(nano, tmp_path_factory.mktemp("run") / "pretrain")
    pretrain.main(config)
    return config


def test_the_model_is_sealed_and_loads_without_lmkit(trained):
    verify(trained.output_dir / "model")
    files = {path.name for path in (trained.output_dir / "model").iterdir()}
    wanted = "model.safetensors config.json generation_config.json tokenizer.json chat_template.jinja"
    assert set(wanted.split()) < files
    logits = AutoModelForCausalLM.from_pretrained(trained.output_dir / "model")(torch.arange(9)[None]).logits
    torch.save(logits, trained.output_dir / "logits.pt")
    script = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("model")
assert "lmkit" not in sys.modules
assert torch.equal(model(torch.arange(9)[None]).logits, torch.load("logits.pt"))
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=trained.output_dir)


def test_the_log_has_both_scores_every_line_the_warning_and_a_sample(trained):
    log = (trained.output_dir / "log.txt").read_text()
    assert "(context 64, stride 32)" in log
    for line in ("uniform", "unigram", "kneser_ney_5", "kneser_ney_7", "xz"):
        assert f"{line} " in log
    assert (
        "warning: the model is worse than xz" in log
    )  # four steps teach nothing, and the split is its own training text
    assert "sample: " in log
    metrics = json.loads((trained.output_dir / "stage.json").read_text())["metrics"]
    assert {"loss", "eval/bits_per_byte", "eval/kneser_ney_7_bits_per_byte", "eval/xz_bits_per_byte"} < set(metrics)
    assert metrics["eval/unstrided_bits_per_byte"] > metrics["eval/bits_per_byte"]
    assert metrics["eval/perplexity"] == pytest.approx(math.exp(metrics["eval/nats_per_token"]))
    assert (metrics["eval/context_length"], metrics["eval/stride"]) == (64, 32)
    rows = [json.loads(line) for line in (trained.output_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [2, 4]
    assert rows[-1]["eval/bits_per_byte"] == metrics["eval/bits_per_byte"]


def test_every_evaluation_continues_the_same_texts(nano, tmp_path):
    train = {"max_steps": 4, "warmup_steps": 1, "per_device_train_batch_size": 4, "eval_steps": 2}
    pretrain.main(configure(nano, tmp_path / "run", train=train))
    rows = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2] * 4 + [4] * 4
    assert [row["prompt"] for row in rows[:4]] == [row["prompt"] for row in rows[4:]]
    assert rows[0]["prompt"] == ""
    assert rows[1]["prompt"] != rows[2]["prompt"] != ""
    assert [row["completion"] for row in rows[:4]] != [row["completion"] for row in rows[4:]]


def test_the_same_command_is_skipped_and_another_setting_refused(trained, nano, capsys):
    pretrain.main(trained)
    assert "finished already" in capsys.readouterr().out
    changed = configure(nano, trained.output_dir, train={"max_steps": 4, "warmup_steps": 1, "learning_rate": 0.1})
    with pytest.raises(BadInput, match="learning_rate"):
        pretrain.main(changed)


def test_training_goes_on_from_a_model_directory(trained, nano, tmp_path):
    path = pretrain.main(configure(nano, tmp_path / "more", init_from=str(trained.output_dir / "model")))
    first = json.loads((tmp_path / "more" / "metrics.jsonl").read_text().splitlines()[0])["loss"]
    fresh = json.loads((trained.output_dir / "metrics.jsonl").read_text().splitlines()[0])["loss"]
    assert first < fresh
    assert verify(path / "model") != verify(trained.output_dir / "model")


def test_a_context_longer_than_the_models_is_refused(trained, nano, tmp_path):
    model = {"preset": "nano", "context_length": 128}
    with pytest.raises(BadInput, match="context_length 128 is more than the 64"):
        pretrain.main(configure(nano, tmp_path, model=model, init_from=str(trained.output_dir / "model")))


def test_shards_of_another_tokenizer_are_refused(nano, tmp_path):
    from lmkit.tokenization.train import train_tokenizer

    train_tokenizer(lambda: ["the owl had a drum"] * 9, vocab_size=384, allow_smaller_vocab=True).save_pretrained(
        tmp_path / "other"
    )
    with pytest.raises(BadInput, match="another tokenizer"):
        pretrain.main(configure(nano, tmp_path / "run", tokenizer=str(tmp_path / "other")))


def test_a_number_that_is_not_finite_ends_the_recipe_with_4(nano, tmp_path):
    config = configure(nano, tmp_path / "run", train={"max_steps": 9, "warmup_steps": 0, "learning_rate": 1e30})
    flags = []
    for name in ("output_dir", "tokenizer", "shards"):
        flags += [f"--{name}", str(getattr(config, name))]
    flags += ["--model.preset", "nano", "--model.context_length", "64", "--train.warmup_steps", "0"]
    flags += ["--train.learning_rate", "1e30", "--train.max_steps", "9", "--train.per_device_train_batch_size", "4"]
    done = subprocess.run([sys.executable, "recipes/pretrain.py", *flags], capture_output=True, text=True)
    assert done.returncode == 4, done.stderr[-2000:]
    assert "not finite" in done.stderr
    assert json.loads((tmp_path / "run" / "exit.json").read_text())["code"] == 4
    assert not (tmp_path / "run" / "model").exists()
