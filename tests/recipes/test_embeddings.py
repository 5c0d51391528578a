"""Word vectors as a stage, asked by the command, and as what a language model starts from."""

import json
import shutil

import embeddings
import numpy as np
import pretrain
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from lmkit.cli import app
from lmkit.config import validate
from lmkit.errors import BadInput
from lmkit.models.embeddings import load_vectors, start_from, token_of
from lmkit.models.presets import ModelConfig, build_model
from lmkit.stage import verify
from lmkit.tokenization.read import load_tokenizer
from lmkit.tokenization.train import train_tokenizer


def configure(nano, folder, **changes):
    mapping = {"output_dir": str(folder), "tokenizer": str(nano / "model"), "shards": str(nano / "shards")}
    mapping |= {"hidden_size": 64, "num_epochs": 2, "batch_tokens": 512, "logging_steps": 4}
    return validate(embeddings.EmbeddingsConfig, mapping | changes)


@pytest.fixture(scope="module")
def vectors(nano, tmp_path_factory):
    return embeddings.main(configure(nano, tmp_path_factory.mktemp("run") / "embeddings")) / "vectors"


@pytest.fixture(scope="module")
def tokenizer(nano):
    return load_tokenizer(nano / "model")


def ask(*arguments):
    done = CliRunner().invoke(app, list(map(str, arguments)))
    return done.exit_code, " ".join(done.output.split())


def test_the_vectors_are_sealed_and_the_log_has_speed_loss_and_a_sample(vectors):
    verify(vectors)
    rows = [json.loads(line) for line in (vectors.parent / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert rows[-1]["tokens_per_second"] > 0
    metrics = json.loads((vectors.parent / "stage.json").read_text())["metrics"]
    assert metrics["num_updates"] == rows[-1]["step"]
    log = (vectors.parent / "log.txt").read_text()
    assert "nats a pair at the end" in log
    assert "sample: skipgram vectors of 512 tokens, width 64\nnearest to '" in log


def test_the_same_command_is_skipped_and_cbow_gives_others(nano, vectors, tmp_path, capsys):
    embeddings.main(configure(nano, vectors.parent))
    assert "finished already" in capsys.readouterr().out
    other = embeddings.main(configure(nano, tmp_path / "run", objective="cbow", num_epochs=1)) / "vectors"
    assert load_vectors(other)[1] == "cbow"
    assert not torch.equal(load_vectors(other)[0], load_vectors(vectors)[0])


@pytest.mark.parametrize(
    "options",
    [
        *({"arch": arch} for arch in ("qwen3", "llama", "gpt2", "neural_ngram", "rnn", "lstm", "gru", "elmo")),
        *({"arch": "transformer", "block": block} for block in ({}, {"causal": False}, {"num_encoder_layers": 1})),
    ],
    ids=str,
)
def test_a_fresh_model_starts_from_them_at_the_scale_of_its_own(vectors, tokenizer, options):
    config = validate(ModelConfig, {"preset": "nano"} | options)
    torch.manual_seed(0)
    own = build_model(config, tokenizer).get_input_embeddings().weight
    model = build_model(config, tokenizer, vectors)
    weight, given = model.get_input_embeddings().weight, load_vectors(vectors)[0]
    np.testing.assert_allclose((weight / weight.norm()).detach(), given / given.norm(), atol=1e-6)
    assert weight.std().item() == pytest.approx(own.std().item(), rel=0.05)
    assert model.get_output_embeddings().weight is weight


def test_the_stage_trains_on_from_them(nano, vectors, tmp_path):
    mapping = {
        "output_dir": str(tmp_path / "run"),
        "tokenizer": str(nano / "model"),
        "shards": str(nano / "shards"),
        "embeddings": str(vectors),
        "model": {"preset": "nano", "context_length": 64, "arch": "neural_ngram", "window": 4},
        "packing": "stream",
        "train": {"max_steps": 2, "warmup_steps": 0, "per_device_train_batch_size": 4, "learning_rate": 1e-9},
        "validation_tokens": 300,
    }
    pretrain.main(validate(pretrain.PretrainConfig, mapping))
    trained = load_file(tmp_path / "run" / "model" / "model.safetensors")["model.embed_tokens.weight"]
    given = load_vectors(vectors)[0]
    np.testing.assert_allclose(trained / trained.norm(), given / given.norm(), atol=1e-6)
    record = json.loads((tmp_path / "run" / "stage.json").read_text())
    assert record["inputs"]["embeddings"]["id"] == verify(vectors)


def test_a_model_they_do_not_fit_names_both_sizes(vectors, tokenizer):
    with pytest.raises(BadInput, match=r"512 word vectors of width 64.*512 tokens of width 128.*--hidden_size 128"):
        build_model(ModelConfig(preset="tiny"), tokenizer, vectors)


def test_vectors_of_another_tokenizer_are_refused(vectors, tokenizer, tmp_path):
    model = build_model(ModelConfig(preset="nano"), tokenizer)
    words = ["a zebra quietly ate the yellow grass of january", "yes", "zigzag"]
    shutil.copytree(vectors, tmp_path / "other")
    train_tokenizer(lambda: words * 9, vocab_size=384, allow_smaller_vocab=True).save_pretrained(tmp_path / "other")
    with pytest.raises(BadInput, match=r"The tokenizer of .*other has .* with other ids than the one the shards"):
        start_from(model, tmp_path / "other", tokenizer)
    with pytest.raises(BadInput, match=r"holds no word vectors .*recipes/embeddings.py"):
        start_from(model, tmp_path, tokenizer)


def test_the_command_shows_neighbours_cosines_and_one_hot_codes(vectors, tokenizer):
    code, said = ask("embeddings", vectors, "the", "and", "--analogy", "the,and,a", "--num", "3")
    assert code == 0
    assert said.startswith("skipgram vectors of 512 tokens, width 64 nearest to 'the': '")
    assert "one-hot the and the 1.000 0.000 and 0.000 1.000" in said
    table = load_vectors(vectors)[0][[token_of(tokenizer, word) for word in ("the", "and")]]
    cosine = torch.nn.functional.cosine_similarity(table[0], table[1], dim=0).item()
    assert f"cosines the and the 1.000 {cosine:.3f} and {cosine:.3f} 1.000" in said
    assert "'the' is to 'and' as 'a' is to: " in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["embeddings", "VECTORS", "hippopotamus"], "'hippopotamus' is no token of this vocabulary ("),
        (["embeddings", "VECTORS", "the", "--analogy", "the,and"], "--analogy the,and is not three words"),
        (["embeddings", "nowhere", "the"], "nowhere holds no word vectors"),
        (["embeddings", "STAGE", "the"], "/vectors."),
        (["chat", "VECTORS"], "holds word vectors, which predict no next token"),
        (["chat", "STAGE"], "`python recipes/pretrain.py --model.arch neural_ngram --embeddings"),
    ],
)
def test_what_cannot_be_asked_is_refused_in_a_sentence(vectors, arguments, message):
    places = {"VECTORS": vectors, "STAGE": vectors.parent}
    code, said = ask(*(places.get(argument, argument) for argument in arguments))
    assert code == 2
    assert message in said
