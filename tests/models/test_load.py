"""A model directory is read from the disk, with the tokenizer that belongs to it, or refused with a reason."""

import json
import shutil

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from lmkit.errors import BadInput
from lmkit.models.heads import last_token_scores
from lmkit.models.load import check_positions, load_language_model, load_reward_model
from lmkit.models.presets import ModelConfig, build_model
from lmkit.tokenization.train import train_tokenizer


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("load") / "model"
    tokenizer = train_tokenizer(lambda: ["a fox and a hen"] * 9, vocab_size=384, allow_smaller_vocab=True)
    build_model(ModelConfig(preset="nano"), tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def test_a_model_comes_with_its_tokenizer_in_float32(saved):
    model, tokenizer = load_language_model(saved)
    assert model.dtype == torch.float32
    assert len(tokenizer) == model.config.vocab_size


def test_a_new_reward_head_scores_zero_and_a_trained_one_is_kept(saved, tmp_path):
    model, tokenizer = load_reward_model(saved)
    assert last_token_scores(model, [[20, 21], [22]]).tolist() == [0.0, 0.0]
    assert model.config.pad_token_id == tokenizer.pad_token_id
    torch.nn.init.ones_(model.score.weight)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, _ = load_reward_model(tmp_path)
    assert torch.equal(again.score.weight, model.score.weight)


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(BadInput, match=r"no config.json"):
        load_language_model(tmp_path)
    with pytest.raises(BadInput, match=r"no config.json"):
        load_language_model(tmp_path / "absent")


@pytest.mark.parametrize("load", [load_language_model, load_reward_model])
def test_what_transformers_cannot_load_is_refused_with_its_reason(load, saved, copy, tmp_path):
    (copy / "model.safetensors").unlink()
    with pytest.raises(
        BadInput, match=r"copy is no .* that can be loaded: .*no file named model.safetensors.* Give what"
    ):
        load(copy)
    sizes = {"vocab_size": 384, "d_model": 16, "d_ff": 16, "d_kv": 8, "num_layers": 1, "num_heads": 2}
    other = tmp_path / "t5"
    T5ForConditionalGeneration(T5Config(**sizes)).save_pretrained(other)
    for path in saved.glob("tokenizer*"):
        shutil.copy(path, other)
    reason = "Unrecognized configuration class" if load is load_language_model else "has no layer `score`"
    with pytest.raises(BadInput, match=rf"t5 is no .* that can be loaded: .*{reason}.* Give what"):
        load(other)


def test_a_model_without_a_tokenizer_is_refused(copy):
    for path in copy.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(BadInput, match="has no tokenizer"):
        load_language_model(copy)


def test_a_tokenizer_of_another_model_is_refused(copy):
    train_tokenizer(lambda: ["x"] * 9, vocab_size=512, allow_smaller_vocab=True)
    config = json.loads((copy / "tokenizer.json").read_text())
    extra = {f"extra{i}": 384 + i for i in range(200)}
    config["model"]["vocab"] |= extra
    (copy / "tokenizer.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, match="do not belong together"):
        load_language_model(copy)


def test_pad_equal_to_eos_is_refused(copy):
    config = json.loads((copy / "tokenizer_config.json").read_text())
    (copy / "tokenizer_config.json").write_text(json.dumps(config | {"pad_token": config["eos_token"]}))
    with pytest.raises(BadInput, match="would not learn to stop"):
        load_language_model(copy)


def test_code_in_a_model_directory_is_not_run(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoConfig": "evil.Config"}}))
    with pytest.raises(BadInput, match="auto_map"):
        load_language_model(copy)


def test_a_length_beyond_the_positions_is_refused(saved):
    model, _ = load_language_model(saved)
    check_positions(model, 128)
    with pytest.raises(BadInput, match="max_length is 129, but the model has 128 positions"):
        check_positions(model, 129)
