from contextlib import nullcontext
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, MambaConfig, StableLmConfig, XGLMConfig

from lmkit.data.blocks import Blocks
from lmkit.errors import BadInput
from lmkit.models.attention import causal_attention, check_documents_apart, faster_attention, packed_attention
from lmkit.models.presets import ModelConfig, transformers_config
from lmkit.training.losses import CausalLMLoss


def make_model(arch="qwen3", **changes):
    torch.manual_seed(0)
    config = transformers_config(ModelConfig(preset="nano", arch=arch), 512)
    for key, value in changes.items():
        setattr(config, key, value)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("arch", ["qwen3", "llama"])
@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 1}])
def test_packed_logits_are_those_of_each_document_alone(arch, changes):
    model = make_model(arch, **changes)
    documents = [torch.randint(0, 512, (1, length)) for length in (5, 1, 9)]
    ids = torch.tensor([[0] * 5 + [1] + [2] * 9])
    alone = torch.cat([model(input_ids=d, use_cache=False).logits for d in documents], dim=1)
    with packed_attention(model):
        packed = model(input_ids=torch.cat(documents, dim=1), document_ids=ids, use_cache=False).logits
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("arch", ["qwen3", "llama", "gpt2"])
def test_without_documents_it_is_plain_causal_attention(arch):
    model = make_model(arch)
    tokens = torch.randint(0, 512, (2, 12))
    expected = model(input_ids=tokens, use_cache=False).logits
    with packed_attention(model):
        torch.testing.assert_close(model(input_ids=tokens, use_cache=False).logits, expected)


@pytest.mark.parametrize(("length", "key_heads", "scaling"), [(7, 4, None), (128, 4, 0.3), (300, 2, None)])
def test_bfloat16_on_a_cpu_is_float32_attention_within_its_rounding(length, key_heads, scaling):
    torch.manual_seed(0)
    shapes = [(2, 4, length, 16), (2, key_heads, length, 16), (2, key_heads, length, 16)]
    exact = [torch.randn(shape).bfloat16().float().requires_grad_() for shape in shapes]
    rounded = [state.detach().clone().requires_grad_() for state in exact]
    weights = torch.randn(2, length, 4, 16)
    expected, _ = causal_attention(None, *exact, None, scaling=scaling)
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = causal_attention(None, *rounded, None, scaling=scaling)
    assert (expected.dtype, found.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(found.float(), expected, rtol=0.02, atol=0.03)
    (expected * weights).sum().backward()
    (found.float() * weights).sum().backward()
    for one, other in zip(rounded, exact):
        error = (one.grad - other.grad).norm() / other.grad.norm()
        assert error < 0.02


def test_rows_too_long_for_products_are_left_to_the_fused_kernel():
    state = torch.randn(1, 1, 1025, 4)
    with torch.autocast("cpu", torch.bfloat16):
        dtypes = [causal_attention(None, *[state[:, :, :n]] * 3, None)[0].dtype for n in (1024, 1025)]
    assert dtypes == [torch.bfloat16, torch.float32]


def test_documents_are_kept_apart_in_float32_under_autocast():
    query = torch.randn(1, 2, 6, 8)
    documents = torch.tensor([[0, 0, 0, 1, 1, 1]])
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = causal_attention(None, query, query, query, None, document_ids=documents)
        alone, _ = causal_attention(None, *[query[:, :, 3:].float()] * 3, None)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found[:, 3:], alone.float(), rtol=0.02, atol=0.03)


def test_a_compiled_forward_is_one_graph_with_causal_attention_and_no_mask(monkeypatch):
    model = make_model()
    loss = CausalLMLoss(model)
    tokens = torch.randint(0, 512, (2, 13))
    expected, _ = loss(tokens[:, :-1], tokens[:, 1:])
    calls = []

    def backend(graph, inputs):
        targets = [node for node in graph.graph.nodes if "scaled_dot_product_attention" in str(node.target)]
        calls.extend(node.kwargs for node in targets)
        return graph.forward

    with packed_attention(model):
        found, _ = torch.compile(loss, backend=backend, fullgraph=True, dynamic=False)(tokens[:, :-1], tokens[:, 1:])
    torch.testing.assert_close(found, expected)
    assert [(call["is_causal"], call["attn_mask"]) for call in calls] == [(True, None)] * 2


def test_a_cache_is_refused():
    model = make_model()
    tokens = torch.randint(0, 512, (1, 6))
    past = model(input_ids=tokens[:, :4], use_cache=True).past_key_values
    with packed_attention(model), pytest.raises(ValueError, match="use_cache=False"):
        model(input_ids=tokens[:, 4:], past_key_values=past, use_cache=True)


def test_the_name_is_put_back_and_never_saved(tmp_path):
    model = make_model()
    before = model.config._attn_implementation
    with packed_attention(model):
        model.save_pretrained(tmp_path)
    assert model.config._attn_implementation == before
    assert "lmkit" not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("packing", ["stream", "bos_bestfit"])
@pytest.mark.parametrize("arch", ["qwen3", "gpt2"])
def test_blocks_of_packed_documents_teach_what_each_document_alone_does(packing, arch):
    """Loss and gradient, on a CPU too, where flex and variable-length attention have no backward."""
    rng = np.random.default_rng(0)
    lengths = np.array([5, 3, 9, 2, 6, 7])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = rng.integers(1, 512, offsets[-1]).astype(np.uint16)
    tokens[offsets[1:] - 1] = 0
    # A stream begins with the end of text before its first document, and is one block here.
    stream = np.concatenate([[0], tokens]).astype(np.uint16)
    shards = SimpleNamespace(tokens=stream if packing == "stream" else tokens, document_offsets=offsets)
    blocks = Blocks(shards, 32 if packing == "stream" else 12, packing, document_mask=True)
    alone = [torch.from_numpy(np.concatenate([[0], tokens[a:b]]).astype(np.int64))[None] for a, b in pairwise(offsets)]
    found = {}
    for name, batches in {
        "packed": [blocks.fetch(np.arange(len(blocks)))],
        "alone": [{"input_ids": t[:, :-1], "labels": t[:, 1:]} for t in alone],
    }.items():
        model = make_model(arch)
        scale_up(model)
        with packed_attention(model):
            total, count = (sum(parts) for parts in zip(*(CausalLMLoss(model)(**batch) for batch in batches)))
        total.backward()
        found[name] = (total.item(), count.item(), model.get_input_embeddings().weight.grad)
    assert found["packed"][1] == found["alone"][1] == 32
    assert found["packed"][0] == pytest.approx(found["alone"][0], rel=1e-5)
    torch.testing.assert_close(found["packed"][2], found["alone"][2], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def scale_up(model):
    """Weights that have learnt something: tokens and learned positions are heard."""
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            weight.normal_(std=1.0 if "wpe" in name or "wte" in name or "embed" in name else 0.2)


def other_model(config, **sizes):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config(vocab_size=512, hidden_size=32, **sizes))


OTHERS = {
    "bloom": lambda: other_model(BloomConfig, n_layer=2, n_head=4),
    "mamba": lambda: other_model(MambaConfig, num_hidden_layers=2),
    "stablelm": lambda: other_model(
        StableLmConfig, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, intermediate_size=64
    ),
    "xglm": lambda: other_model(
        XGLMConfig, d_model=32, num_layers=2, attention_heads=4, ffn_dim=64, max_position_embeddings=64
    ),
}
SEES = "a document sees the one before it"


@pytest.mark.parametrize("learnt", [False, True], ids=["fresh", "learnt"])
@pytest.mark.parametrize(
    ("arch", "by", "refusal"),
    [
        *((arch, "document_ids", None) for arch in ("qwen3", "llama", "gpt2", "transformer", "neural_ngram")),
        *((arch, "document_ids", rf"{SEES}.*Use --packing pad") for arch in OTHERS),
        ("lstm", "document_ids", "Use packing pad"),
        *((arch, "position_ids", None) for arch in ("qwen3", "llama", "gpt2")),
        *(
            (arch, "position_ids", rf"{SEES}.*train\.packing")
            for arch in ("transformer", "lstm", "gru", "neural_ngram")
        ),
    ],
)
def test_a_model_is_asked_whether_it_keeps_documents_apart(arch, by, refusal, learnt):
    model = OTHERS[arch]() if arch in OTHERS else make_model(arch)
    model.train()
    if learnt:
        scale_up(model)
    state, kept = torch.get_rng_state(), {name: weight.clone() for name, weight in model.named_parameters()}
    before = model.config._attn_implementation
    with nullcontext() if refusal is None else pytest.raises(BadInput, match=refusal):
        check_documents_apart(model, by)
    assert (model.training, model.config._attn_implementation) == (True, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(weight, kept[name]) for name, weight in model.named_parameters())


def test_what_is_seen_of_another_document_may_be_faint():
    model = OTHERS["stablelm"]()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.mul_(0.01 if "v_proj" in name or "o_proj" in name else 1)
    with pytest.raises(BadInput, match=rf"{SEES} \([1-9]e-05 of what other tokens would change\)"):
        check_documents_apart(model, "document_ids")


def test_positions_that_go_on_over_documents_are_refused(monkeypatch):
    model = make_model("gpt2")
    forward = model.base_model.forward
    going_on = lambda position_ids, **inputs: forward(**inputs)  # noqa: E731
    monkeypatch.setattr(model.base_model, "forward", going_on)
    with pytest.raises(BadInput, match=r"has other positions than alone .*--packing pad"):
        check_documents_apart(model, "document_ids")


def test_attention_of_another_kind_is_refused():
    model = make_model(layer_types=["sliding_attention"] * 2, sliding_window=8, use_sliding_window=True)
    tokens = torch.randint(0, 512, (1, 8))
    with packed_attention(model):
        model(input_ids=tokens, use_cache=False)
        with pytest.raises(BadInput, match=r"a sliding window of 8 tokens, .* lower model.context_length"):
            model(input_ids=torch.cat([tokens, tokens], 1), use_cache=False)
    query = torch.zeros(1, 2, 4, 8)
    with pytest.raises(BadInput, match="asks for softcap, which training on packed rows does not have"):
        causal_attention(model, query, query, query, None, softcap=50.0)


def test_the_faster_attention_is_for_plain_models_in_bfloat16_on_a_cpu():
    plain, sliding = make_model(), make_model(layer_types=["sliding_attention"] * 2, sliding_window=8)
    tokens = torch.randint(0, 512, (2, 9))
    expected = plain(input_ids=tokens, use_cache=False).logits
    for precision, name in (("bf16", "lmkit"), ("no", "sdpa")):
        accelerator = SimpleNamespace(device=torch.device("cpu"), mixed_precision=precision)
        with faster_attention(accelerator, plain, sliding):
            assert [m.config._attn_implementation for m in (plain, sliding)] == [name, "sdpa"]
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                found = plain(input_ids=tokens, use_cache=False).logits.float()
        tolerance = 0.02 if precision == "bf16" else 0
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * expected.abs().max().item())
    assert plain.config._attn_implementation == "sdpa"
