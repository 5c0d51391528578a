import json

import pytest
from safetensors.numpy import save_file

from lmkit.errors import BadInput
from lmkit.model_files import check_model_files


@pytest.fixture
def model(tmp_path):
    import numpy as np

    save_file({"w": np.zeros(3, np.float32)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "qwen3", "attn_implementation": "sdpa"}')
    (tmp_path / "tokenizer_config.json").write_text('{"added_tokens_decoder": {"0": {"content": "auto_map"}}}')
    return tmp_path


def test_a_plain_model_passes(model):
    check_model_files(model)


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        (
            "config.json",
            {"auto_map": {"AutoConfig": "evil.Config"}},
            r"config.json asks to run code of its own \(auto_map",
        ),
        ("config.json", {"vision_config": {"_attn_implementation": "evil/kernel"}}, "names a kernel to fetch"),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.T", None]}}, "tokenizer_config.json asks"),
        ("generation_config.json", {"custom_generate": "evil/way"}, "custom_generate"),
        ("model.safetensors.index.json", {"weight_map": {"w": "../w.safetensors"}}, r"outside its folder \('../w"),
    ],
)
def test_what_would_run_or_lead_elsewhere_is_refused(model, file, content, said):
    (model / file).write_text(json.dumps(content))
    with pytest.raises(BadInput, match=said):
        check_model_files(model)


def test_a_pickle_is_refused_where_it_would_be_read(model):
    (model / "pytorch_model.bin").write_bytes(b"x")
    check_model_files(model)  # safetensors are there, and are what is read
    (model / "model.safetensors").unlink()
    with pytest.raises(BadInput, match=r"pytorch_model.bin, a pickle"):
        check_model_files(model)


def test_damaged_files_are_named(model):
    (model / "model.safetensors").write_bytes(b"ab")
    with pytest.raises(BadInput, match=r"model.safetensors is damaged"):
        check_model_files(model)
    (model / "config.json").write_text("{")
    with pytest.raises(BadInput, match=r"config.json is not readable JSON"):
        check_model_files(model)


def test_a_missing_folder_is_not_looked_for_elsewhere(tmp_path):
    with pytest.raises(BadInput, match="nothing is looked up on the Hub"):
        check_model_files(tmp_path / "gpt2")
