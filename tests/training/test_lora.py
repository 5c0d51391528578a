"""Adapters: what is handed over has their weights in its own, and 4 bits are refused where they cannot work."""

import importlib.util

import pytest
import torch
from peft import get_peft_model
from transformers import Qwen3Config, Qwen3ForCausalLM

from lmkit.errors import BadInput
from lmkit.training.lora import LoraOptions, merged, peft_config, quantization

SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 8}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 1}


def load():
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(**SIZES)).eval()


@torch.no_grad()
def test_the_merged_model_gives_the_adapted_models_logits():
    adapted = get_peft_model(load(), peft_config(LoraOptions(r=3, lora_alpha=12), "CAUSAL_LM")).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:  # zero at first, so that training starts from the base's own outputs
            parameter.normal_(std=0.1)
    plain, ids = merged(adapted, load), torch.randint(40, (2, 9))
    assert type(plain) is Qwen3ForCausalLM
    assert not [name for name in plain.state_dict() if "lora" in name]
    assert torch.allclose(plain(ids).logits, adapted(ids).logits, atol=1e-5)
    assert not torch.allclose(plain(ids).logits, load()(ids).logits, atol=1e-2)


def test_without_a_rank_there_are_no_adapters():
    model = load()
    assert peft_config(LoraOptions(), "SEQ_CLS") is None
    assert merged(model, lambda: pytest.fail("loaded again")) is model
    assert quantization(LoraOptions()) == quantization(LoraOptions(r=8)) == {}


def test_a_reward_models_head_is_trained_whole():
    assert peft_config(LoraOptions(r=8), "SEQ_CLS").modules_to_save == ["score"]
    assert peft_config(LoraOptions(r=8), "CAUSAL_LM").modules_to_save is None


def test_4_bits_need_a_gpu_and_bitsandbytes(monkeypatch):
    options = LoraOptions(r=8, load_in_4bit=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BadInput, match=r"needs a GPU, and found none. Leave it out"):
        quantization(options)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match=r"needs bitsandbytes. Install it: pip install -e '\.\[qlora\]'"):
        quantization(options)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    asked = quantization(options)
    assert asked["quantization_config"].bnb_4bit_quant_type == "nf4"
    assert asked["device_map"] == {"": 1}
