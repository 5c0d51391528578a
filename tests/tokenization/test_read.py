"""Tokenizers made elsewhere are found on this machine alone, and checked."""

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lmkit.errors import BadInput
from lmkit.tokenization import read
from lmkit.tokenization.chat import encode_text
from lmkit.tokenization.read import find_tokenizer, load_tokenizer


def test_taking_a_tokenizer_checks_it(tokenizer, tmp_path):
    with pytest.raises(BadInput, match=r"no tokenizer_config\.json"):
        load_tokenizer(tmp_path)
    tokenizer.save_pretrained(tmp_path / "good")
    assert encode_text(load_tokenizer(tmp_path / "good"), "a b") == encode_text(tokenizer, "a b")
    for name, marks in (("pad", {"eos_token": "<|pad|>", "pad_token": "<|pad|>"}), ("end", {"pad_token": "<|pad|>"})):
        PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, **marks).save_pretrained(tmp_path / name)
        with pytest.raises(BadInput, match="would not learn to stop"):
            load_tokenizer(tmp_path / name)
    assert AutoTokenizer.from_pretrained(tmp_path / "pad").pad_token == "<|pad|>"


def test_a_name_is_looked_up_in_the_cache_alone(tokenizer, tmp_path, monkeypatch):
    tokenizer.save_pretrained(tmp_path / "cached")

    def snapshot_download(name, local_files_only):
        assert local_files_only
        if name != "org/name":
            raise LocalEntryNotFoundError(name)
        return str(tmp_path / "cached")

    monkeypatch.setattr(read, "snapshot_download", snapshot_download)
    assert encode_text(find_tokenizer("org/name"), "a b") == encode_text(tokenizer, "a b")
    with pytest.raises(BadInput, match=r"org/other is neither .*hf download org/other"):
        find_tokenizer("org/other")
