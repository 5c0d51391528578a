import pytest
import torch
from transformers import AutoModelForCausalLM

from lmkit.models.attention import packed_attention
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


def test_attention_runs_in_float32_under_autocast_on_a_cpu(monkeypatch):
    model, seen = make_model(), []
    plain = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        "lmkit.models.attention.F.scaled_dot_product_attention",
        lambda *states, **options: seen.append(plain(*states, **options)) or seen[-1],
    )
    with packed_attention(model), torch.autocast("cpu", torch.bfloat16):
        output = model(input_ids=torch.randint(0, 512, (2, 12)), use_cache=False).logits
    assert [attended.dtype for attended in seen] == [torch.float32] * 2
    assert output.dtype == torch.bfloat16


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
