import math
import subprocess
import sys

import pytest
import torch

from lmkit.config import validate
from lmkit.errors import BadInput
from lmkit.models.presets import BlockConfig, ModelConfig, build_model, transformers_config
from lmkit.tokenization.chat import stop_token_ids
from lmkit.tokenization.train import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    words = ["the owl had a drum", "a fox saw the moon and the owl", "the moon was a drum"]
    return train_tokenizer(lambda: words * 20, vocab_size=384, allow_smaller_vocab=True)


@pytest.mark.parametrize("arch", ["qwen3", "llama", "gpt2", "transformer", "rnn", "lstm", "gru"])
@pytest.mark.parametrize("preset", ["nano", "tiny"])
def test_the_first_loss_is_that_of_guessing(tokenizer, preset, arch):
    torch.manual_seed(0)
    model = build_model(ModelConfig(preset=preset, arch=arch), tokenizer)
    tokens = torch.randint(0, len(tokenizer), (16, 64))
    loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    assert loss.item() == pytest.approx(math.log(len(tokenizer)), abs=0.05)


@pytest.mark.parametrize(
    ("preset", "vocab_size", "low", "high"),
    [("nano", 512, 0.1, 0.13), ("tiny", 1024, 0.9, 1.1), ("small", 32768, 105, 115), ("base", 32768, 500, 540)],
)
def test_presets_have_the_sizes_they_promise(preset, vocab_size, low, high):
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(transformers_config(ModelConfig(preset=preset), vocab_size))
    assert low < model.num_parameters() / 1e6 < high


def test_initial_weights_by_width_and_depth(tokenizer):
    torch.manual_seed(0)
    model = build_model(ModelConfig(preset="tiny"), tokenizer)
    layer = model.model.layers[1]
    assert layer.self_attn.q_proj.weight.std().item() == pytest.approx(128**-0.5, rel=0.03)
    assert layer.mlp.down_proj.weight.std().item() == pytest.approx((128 * 2 * 4) ** -0.5, rel=0.03)
    assert layer.self_attn.o_proj.weight.std().item() == pytest.approx((128 * 2 * 4) ** -0.5, rel=0.03)
    assert model.model.embed_tokens.weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert transformers_config(ModelConfig(preset="small"), 32768).initializer_range == 0.02
    assert transformers_config(ModelConfig(preset="small", init_std=0.01), 32768).initializer_range == 0.01


def test_learned_positions_start_at_the_scale_of_the_tokens(tokenizer):
    block = BlockConfig(positions="learned")
    for config in (ModelConfig(arch="gpt2"), ModelConfig(arch="transformer", block=block)):
        torch.manual_seed(0)
        named = dict(build_model(config, tokenizer).named_parameters())
        (positions,) = [weight for name, weight in named.items() if name.endswith(("wpe.weight", "positions.weight"))]
        assert positions.std().item() == pytest.approx(0.02, rel=0.03)


def test_arch_transformer_is_by_default_a_qwen3(tokenizer):
    shapes = []
    for arch in ("qwen3", "transformer"):
        torch.manual_seed(0)
        model = build_model(ModelConfig(preset="nano", arch=arch), tokenizer)
        shapes.append(sorted((tuple(p.shape), round(p.std().item(), 2)) for p in model.parameters()))
    assert shapes[0] == shapes[1]


def test_given_sizes_replace_the_presets(tokenizer):
    model = build_model(ModelConfig(preset="nano", hidden_size=128, num_hidden_layers=3, context_length=40), tokenizer)
    config = model.config
    assert (config.hidden_size, config.num_hidden_layers, config.max_position_embeddings) == (128, 3, 40)
    assert (config.num_attention_heads, config.head_dim, config.intermediate_size) == (4, 32, 128)


def test_a_width_that_heads_do_not_fill_is_refused():
    with pytest.raises(BadInput, match="hidden_size 100 is not a multiple of head_dim 32"):
        validate(ModelConfig, {"hidden_size": 100})


def test_token_ids_are_the_tokenizers(tokenizer):
    model = build_model(ModelConfig(preset="nano"), tokenizer)
    assert model.config.vocab_size == len(tokenizer)
    assert model.generation_config.eos_token_id == stop_token_ids(tokenizer) == [2, 0]
    assert (model.config.eos_token_id, model.config.pad_token_id) == (0, 3)


@pytest.mark.parametrize("arch", ["qwen3", "llama", "gpt2"])
def test_the_saved_folder_loads_without_lmkit_and_gives_equal_logits(tokenizer, arch, tmp_path):
    torch.manual_seed(0)
    model = build_model(ModelConfig(preset="nano", arch=arch), tokenizer).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    tokens = torch.arange(20)[None]
    torch.save(model(tokens).logits, tmp_path / "logits.pt")
    script = f"""
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}).eval()
assert "lmkit" not in sys.modules
assert torch.equal(model(torch.arange(20)[None]).logits, torch.load({str(tmp_path / "logits.pt")!r}))
assert AutoTokenizer.from_pretrained({str(tmp_path)!r}).chat_template
assert model.generation_config.eos_token_id == [2, 0]
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)
