import json
import math
import re
import shutil
import signal
import subprocess
import sys

import pretrain
import pytest
import torch
from transformers import AutoModelForCausalLM, StableLmConfig, StableLmForCausalLM

from lmkit.config import validate
from lmkit.errors import BadInput, Interrupted
from lmkit.stage import Stage, run, seal, verify


def configure(nano, folder, **changes):
    mapping = {
        "output_dir": str(folder),
        "tokenizer": str(nano / "model"),
        "shards": str(nano / "shards"),
        "model": {"preset": "nano", "context_length": 64},
        "packing": "stream",
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


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 1}, "seed: 0, now 1"),
        ({"train": {"per_device_train_batch_size": 8}}, "train.per_device_train_batch_size: 4, now 8"),
        ({"train": {"global_batch_size": 8}}, "train.global_batch_size: None, now 8"),
        ({"shards": "other"}, "the content of shards"),
        ({"weights": [1.0]}, "weights"),
    ],
)
def test_going_on_with_other_settings_is_refused_by_name(trained, nano, tmp_path, changes, named):
    if "shards" in changes:
        for split in ("train", "validation"):
            folder = shutil.copytree(nano / "shards" / split, tmp_path / split)
            (folder / "documents.bin").write_bytes((folder / "documents.bin").read_bytes()[::-1])
        changes = {"shards": str(tmp_path)}
    train = {"max_steps": 4, "warmup_steps": 1, "per_device_train_batch_size": 4, "logging_steps": 2}
    changes = changes | {"train": train | changes.get("train", {})}
    with pytest.raises(BadInput, match=re.escape(named)):
        pretrain.main(configure(nano, trained.output_dir, **changes))


@pytest.fixture(scope="module")
def adapted(trained, nano, tmp_path_factory):
    """Continued by adapters on two corpora of packed documents, with averaged weights."""
    config = configure(
        nano,
        tmp_path_factory.mktemp("adapted") / "run",
        init_from=str(trained.output_dir / "model"),
        lora={"r": 4},
        shards=[str(nano / "shards"), str(nano / "shards")],
        weights=[3, 1],
        packing="bos_bestfit",
        document_mask=True,
        z_loss=1e-4,
        train={"max_steps": 4, "warmup_steps": 1, "per_device_train_batch_size": 4, "ema_decay": 0.9},
    )
    pretrain.main(config)
    return config


def test_adapters_are_merged_into_a_plain_directory(trained, adapted):
    before, after, averaged = (
        AutoModelForCausalLM.from_pretrained(folder)
        for folder in (trained.output_dir / "model", adapted.output_dir / "model", adapted.output_dir / "model_ema")
    )
    assert not list((adapted.output_dir / "model").glob("adapter*"))
    for name, weight in after.state_dict().items():
        is_adapted = name.endswith("_proj.weight")
        assert torch.equal(weight, before.state_dict()[name]) != is_adapted, name
        assert torch.equal(weight, averaged.state_dict()[name]) != is_adapted, name


def test_averaged_weights_are_scored_and_verified(adapted):
    verify(adapted.output_dir / "model_ema")
    metrics = json.loads((adapted.output_dir / "stage.json").read_text())["metrics"]
    assert metrics["eval/ema_bits_per_byte"] != metrics["eval/bits_per_byte"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora": {"r": 4}}, "lora: adapts the model that init_from names"),
        ({"init_from": "x", "model": {"depth": 4, "arch": "gpt2"}}, "model.depth, model.arch: for a fresh model"),
        ({"init_from": "x", "embeddings": "y"}, "embeddings: for a fresh model; leave out with init_from"),
        ({"ngram_orders": [5, 0]}, "ngram_orders.1  Input should be greater than or equal to 1"),
        ({"ngram_orders": [5000]}, "ngram_orders.0  Input should be less than or equal to 32"),
        ({"weights": [-1, 2]}, r"weights.0  Input should be greater than 0 \(found -1\)"),
        ({"weights": [1, 0.0]}, r"weights.1  Input should be greater than 0 \(found 0.0\)"),
        ({"weights": [math.nan]}, "weights.0  Input should be a finite number"),
        ({"weights": [math.inf]}, "weights.0  Input should be a finite number"),
        ({"packing": "tight"}, "packing  Input should be 'stream', 'bos_bestfit' or 'pad'"),
    ],
)
def test_settings_that_do_not_go_together_are_named(nano, tmp_path, changes, message):
    with pytest.raises(BadInput, match=message):
        configure(nano, tmp_path, **changes)


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


def test_documents_cut_at_their_block_are_counted_or_refused(nano, tmp_path):
    train = {"max_steps": 1, "warmup_steps": 0, "per_device_train_batch_size": 4}
    for length, said in (
        (256, "2,449 tokens in 20 blocks of 256,"),
        (145, "2,446 tokens in 20 blocks of 145 (3 more are beyond their blocks),"),
    ):
        model = {"preset": "nano", "context_length": length}
        pretrain.main(configure(nano, tmp_path / str(length), packing="pad", model=model, train=train))
        log = (tmp_path / str(length) / "log.txt").read_text()
        assert re.search(
            rf"pretrain: [\d,]+ parameters, {re.escape(said)} vocabulary 512, 1 process\(es\) on cpu, ", log
        )
    with pytest.raises(BadInput, match=r"47\.7% of the 2,449 tokens would be lost.*--packing bos_bestfit"):
        pretrain.main(configure(nano, tmp_path / "run", packing="pad"))
    pretrain.main(configure(nano, tmp_path / "run", packing="bos_bestfit"))  # as the message says, in the same folder


@pytest.mark.parametrize("packing", ["stream", "bos_bestfit"])
def test_a_model_that_does_not_keep_documents_apart_is_not_trained_with_document_mask(nano, tmp_path, packing):
    sizes = {"vocab_size": 512, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = StableLmForCausalLM(StableLmConfig(**sizes, num_key_value_heads=2, intermediate_size=32))
    model.save_pretrained(tmp_path / "model")
    for path in (nano / "model").glob("*token*"):
        shutil.copy(path, tmp_path / "model")
    changes = {"init_from": str(tmp_path / "model"), "packing": packing, "document_mask": True}
    with pytest.raises(BadInput, match=r"StableLmForCausalLM does not keep documents of one row .*--packing pad"):
        pretrain.main(configure(nano, tmp_path / "run", **changes))
    model = {"preset": "nano", "context_length": 256}
    pretrain.main(configure(nano, tmp_path / "run", **changes | {"packing": "pad", "model": model}))


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
    flags += [
        "--model.preset",
        "nano",
        "--model.context_length",
        "64",
        "--packing",
        "stream",
        "--train.warmup_steps",
        "0",
    ]
    flags += ["--train.learning_rate", "1e30", "--train.max_steps", "9", "--train.per_device_train_batch_size", "4"]
    done = subprocess.run([sys.executable, "recipes/pretrain.py", *flags], capture_output=True, text=True)
    assert done.returncode == 4, done.stderr[-2000:]
    assert "not finite" in done.stderr
    assert json.loads((tmp_path / "run" / "exit.json").read_text())["code"] == 4
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.parametrize("failure", [None, IndexError("index out of range in self"), BadInput("too short")])
def test_shards_with_a_flipped_bit_teach_nothing(nano, tmp_path, monkeypatch, capsys, failure):
    """Compared while the stage starts, since they are large; told as damage, whatever else it leads to."""
    monkeypatch.setattr("lmkit.artifact.READ_AT_ONCE", 1000)
    config = configure(nano, tmp_path / "run", shards=str(tmp_path / "shards"))
    with seal(config.shards) as folder:
        shutil.copytree(nano / "shards", folder, dirs_exist_ok=True)
    damaged = config.shards / "train" / "tokens.bin"
    data = bytearray(damaged.read_bytes())
    data[1001] ^= 1
    damaged.write_bytes(data)
    if failure is not None:
        monkeypatch.setattr("lmkit.data.shards.Shards.open", raiser(failure))
    monkeypatch.setattr("sys.argv", ["pretrain.py"])
    monkeypatch.setattr("lmkit.stage.load", lambda *_: config)
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)  # the tests' own stay
    with pytest.raises(SystemExit) as caught:
        run(pretrain.main, pretrain.PretrainConfig, "")
    assert caught.value.code == 5
    assert f"error: {damaged} is damaged: it is not the file the manifest lists." in capsys.readouterr().err
    left = {path.name for path in config.output_dir.rglob("*")}
    assert not left & {"model", "checkpoints", "stage.json"}
    assert json.loads((config.output_dir / "exit.json").read_text())["code"] == 5


def raiser(error):
    def fail(*_):
        raise error

    return fail


@pytest.mark.slow
def test_a_compiled_run_learns_the_same_and_goes_on_to_the_bit(trained, nano, tmp_path, monkeypatch):
    train = trained.train.model_dump() | {"torch_compile": True, "save_steps": 2}
    configs = [configure(nano, tmp_path / name, train=train) for name in ("whole", "stopped")]
    pretrain.main(configs[0])
    looks = iter([False, True])
    with monkeypatch.context() as patch:
        patch.setattr(Stage, "stop_requested", lambda stage: next(looks))
        with pytest.raises(Interrupted):
            pretrain.main(configs[1])
    pretrain.main(configs[1])
    whole, stopped = ((config.output_dir / "model" / "model.safetensors").read_bytes() for config in configs)
    assert whole == stopped
    scores = [json.loads((config.output_dir / "stage.json").read_text())["metrics"] for config in (trained, configs[0])]
    for name in ("loss", "eval/bits_per_byte"):
        assert scores[0][name] == pytest.approx(scores[1][name], rel=1e-4)
