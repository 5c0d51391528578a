import pytest
import torch
import torch.nn.functional as F

from lmkit.errors import BadInput
from lmkit.models.presets import ModelConfig, transformers_config
from lmkit.training.losses import CausalLMLoss, linear_cross_entropy


def inputs(num_tokens=300, width=64, vocab_size=512):
    torch.manual_seed(0)
    hidden = torch.randn(num_tokens, width, requires_grad=True)
    weight = torch.randn(vocab_size, width, requires_grad=True)
    labels = torch.randint(0, vocab_size, (num_tokens,))
    labels[:40] = -100
    return hidden, weight, labels


@pytest.mark.parametrize("rows", [1, 77, 128, 299])
def test_chunks_give_the_loss_and_gradients_of_cross_entropy(rows):
    hidden, weight, labels = inputs()
    expected = F.cross_entropy(hidden @ weight.T, labels, reduction="sum")
    total, count = linear_cross_entropy(hidden, weight, labels, chunk_logits=512 * rows)
    assert count == 260
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=0)
    wanted = torch.autograd.grad(expected / 260, (hidden, weight))
    found = torch.autograd.grad(total / count, (hidden, weight))
    for ours, theirs in zip(found, wanted):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_chunks_under_autocast_stay_close_to_float32():
    hidden, weight, labels = inputs()
    expected, _ = linear_cross_entropy(hidden, weight, labels)
    with torch.autocast("cpu", torch.bfloat16):
        total, _ = linear_cross_entropy(hidden, weight, labels, chunk_logits=512 * 64)
    torch.testing.assert_close(total, expected, rtol=2e-3, atol=0)
    wanted = torch.autograd.grad(expected, (hidden, weight))
    found = torch.autograd.grad(total, (hidden, weight))
    for ours, theirs in zip(found, wanted):
        assert ours.dtype == torch.float32
        assert (ours - theirs).norm() < 0.02 * theirs.norm()


def test_no_counted_token_is_zero():
    hidden, weight, labels = inputs()
    for chunk_logits in (2**30, 512):
        total, count = linear_cross_entropy(hidden, weight, labels.fill_(-100), chunk_logits)
        assert (total, count) == (0, 0)


@pytest.mark.parametrize("arch", ["qwen3", "llama", "gpt2"])
def test_the_module_gives_the_models_own_loss_and_makes_no_cache(arch, monkeypatch):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(transformers_config(ModelConfig(preset="nano", arch=arch), 512))
    tokens = torch.randint(0, 512, (3, 17))
    expected = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    seen = {}
    forward = model.base_model.forward
    monkeypatch.setattr(model.base_model, "forward", lambda **kwargs: seen.update(kwargs) or forward(**kwargs))
    total, count = CausalLMLoss(model)(tokens[:, :-1], tokens[:, 1:])
    assert count == 48
    torch.testing.assert_close(total / count, expected)
    assert seen["use_cache"] is False


@pytest.mark.parametrize("rows", [10**9, 77, 1])
@pytest.mark.parametrize(("z_loss", "softcap"), [(1e-3, None), (0.0, 5.0), (1e-2, 8.0)])
def test_z_loss_and_cap_have_their_loss_and_exact_gradients(rows, z_loss, softcap):
    hidden, weight, labels = inputs()
    hidden, weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    logits = hidden @ weight.T
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    squares = logits.logsumexp(1).square() * (labels != -100)
    expected = F.cross_entropy(logits, labels, reduction="sum") + z_loss * squares.sum()
    parameters = [x.detach().float().requires_grad_() for x in (hidden, weight)]
    total, _ = linear_cross_entropy(*parameters, labels, 512 * rows, z_loss=z_loss, softcap=softcap)
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=0)
    wanted = torch.autograd.grad(expected / 260, (hidden, weight))
    for ours, theirs in zip(torch.autograd.grad(total / 260, parameters), wanted):
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=1e-5)


def gemma(**changes):
    from transformers import AutoModelForCausalLM, Gemma2Config

    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = Gemma2Config(**sizes, num_attention_heads=2, num_key_value_heads=2, head_dim=8, **changes)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager")


def test_the_cap_is_the_models_own():
    torch.manual_seed(0)
    model = gemma(final_logit_softcapping=0.5)
    with torch.no_grad():
        model.lm_head.weight.mul_(50)  # so that the cap is felt
    tokens = torch.randint(0, 64, (3, 17))
    expected = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    total, count = CausalLMLoss(model)(tokens[:, :-1], tokens[:, 1:])
    torch.testing.assert_close(total / count, expected)


def test_a_model_that_changes_its_logits_otherwise_is_refused():
    model = gemma()
    model.config.logits_scaling = 8.0
    with pytest.raises(BadInput, match=r"Gemma2ForCausalLM changes its logits .*logits_scaling.*another model"):
        CausalLMLoss(model)
