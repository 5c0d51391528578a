"""Going on from a model: its own ids or a reason, room for new special tokens, positions enough."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, MambaConfig

from lmkit.errors import BadInput
from lmkit.models.presets import ModelConfig, build_model
from lmkit.models.start import load_to_continue, local_folder
from lmkit.tokenization.train import train_tokenizer


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start") / "model"
    tokenizer = train_tokenizer(lambda: ["a fox and a hen"] * 9, vocab_size=384, allow_smaller_vocab=True)
    torch.manual_seed(0)
    build_model(ModelConfig(preset="nano"), tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_the_weights_are_those_of_the_folder(saved):
    tokenizer = AutoTokenizer.from_pretrained(saved)
    model = load_to_continue(str(saved), tokenizer, 128)
    assert model.dtype == torch.float32
    assert model.get_input_embeddings().num_embeddings == 384


def test_more_special_tokens_get_embeddings_and_the_others_keep_theirs(saved):
    before = load_to_continue(str(saved), AutoTokenizer.from_pretrained(saved), 128)
    tokenizer = AutoTokenizer.from_pretrained(saved)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})
    model = load_to_continue(str(saved), tokenizer, 128)
    rows = model.get_input_embeddings().weight
    assert rows.shape[0] == 512
    assert torch.equal(rows[:384], before.get_input_embeddings().weight)
    assert model.get_output_embeddings().weight is rows


def test_another_vocabulary_is_refused_with_the_reason(saved):
    other = train_tokenizer(lambda: ["the moon was a drum"] * 9, vocab_size=384, allow_smaller_vocab=True)
    with pytest.raises(BadInput, match=r"tokens \(such as .* with other ids than the one the shards were made with"):
        load_to_continue(str(saved), other, 128)


def test_the_same_vocabulary_read_otherwise_is_refused(saved, tmp_path):
    copy = shutil.copytree(saved, tmp_path / "copy")
    spec = json.loads((copy / "tokenizer.json").read_text())
    spec["normalizer"] = {"type": "Lowercase"}
    (copy / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(BadInput, match="differs in its normalizer from"):
        load_to_continue(str(copy), AutoTokenizer.from_pretrained(saved), 128)


def test_a_model_that_cannot_be_sampled_from_is_refused(saved, tmp_path):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    sizes = {"vocab_size": 384, "hidden_size": 16, "num_hidden_layers": 1}
    AutoModelForCausalLM.from_config(MambaConfig(**sizes)).save_pretrained(tmp_path)
    with pytest.raises(BadInput, match=r"MambaForCausalLM, which takes no past_key_values.*Start from another model"):
        load_to_continue(str(tmp_path), AutoTokenizer.from_pretrained(saved), 128)


def test_a_longer_context_than_the_models_is_refused(saved):
    with pytest.raises(BadInput, match=r"model.context_length 129 is more than the 128 positions"):
        load_to_continue(str(saved), AutoTokenizer.from_pretrained(saved), 129)


def test_folders_and_names_that_hold_no_model_are_refused(saved, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(saved)
    with pytest.raises(BadInput, match=r"no config.json"):
        load_to_continue(str(tmp_path), tokenizer, 128)
    (tmp_path / "config.json").write_text("{}")
    shutil.copy(saved / "tokenizer.json", tmp_path)
    shutil.copy(saved / "tokenizer_config.json", tmp_path)
    with pytest.raises(BadInput, match=r"no language model that can be loaded: .* Give what a stage of lmkit"):
        load_to_continue(str(tmp_path), tokenizer, 128)
    with pytest.raises(BadInput, match="not a model's hub name"):
        local_folder("hub:a/b/c")


def test_a_hub_name_that_is_not_in_the_cache_is_one_sentence():
    with pytest.raises(BadInput, match="hub:nobody/nothing could not be fetched from the Hub"):
        local_folder("hub:nobody/nothing")
