"""The configurable Transformer computes what GPT-2, Llama, Qwen3, Marian and T5 do, from their weights; what a token
gets depends neither on padding nor on the cache; every combination either trains or is refused with a reason."""

import copy
import itertools

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MarianConfig,
    MarianMTModel,
    MptConfig,
    MptForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from lmkit.errors import BadInput
from lmkit.models.encoder_decoder import TransformerForSeq2SeqLM
from lmkit.models.layer import Mask, attend, deepnorm
from lmkit.models.transformer import TransformerConfig, TransformerForCausalLM

SIZES = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}
SIZES |= {"num_key_value_heads": 4, "intermediate_size": 48, "max_position_embeddings": 64, "initializer_range": 0.2}
POSITIONS = ("none", "learned", "sinusoidal", "rotary", "alibi", "relative")
PLACEMENTS = ("pre", "post", "deep", "sandwich")


def make(cls=TransformerForCausalLM, **options):
    torch.manual_seed(0)
    return cls(TransformerConfig(**{**SIZES, **options})).eval()


def ids(*shape):
    return torch.randint(1, 40, shape, generator=torch.Generator().manual_seed(1))


def shaken(model):
    """Norms and biases away from 1 and 0, so that one left out or put elsewhere is seen."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def take(model, names, state):
    """Loads `state` by (pattern of ours, pattern of theirs, function) with "{}" for a layer's number; all are used."""
    own, given = model.state_dict(), {}
    for ours, theirs, change in names:
        for layer in range(2) if "{}" in ours else (None,):
            given[ours.format(layer)] = change(state[theirs.format(layer)])
    missing = set(own) - set(given) - {"lm_head.weight"}
    assert not missing
    model.load_state_dict(given | {"lm_head.weight": given.get("lm_head.weight", given["model.embed_tokens.weight"])})
    return model


def same(tensor):
    return tensor


def turned(tensor):
    return tensor.T if tensor.ndim == 2 else tensor


def linear(ours, theirs, bias=True, change=same):
    return [(f"{ours}.{part}", f"{theirs}.{part}", change) for part in (("weight", "bias") if bias else ("weight",))]


@torch.no_grad()
def test_gpt2():
    shape = {"vocab_size": 40, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 48}
    theirs = shaken(GPT2LMHeadModel(GPT2Config(**shape, activation_function="gelu")))
    own = {"norm": "layernorm", "norm_eps": 1e-5, "qk_norm": False, "positions": "learned"}
    ours = make(**own, activation="gelu", bias=True)
    names = [("model.embed_tokens.weight", "transformer.wte.weight", same)]
    names += [("model.embed_positions.weight", "transformer.wpe.weight", same)]
    names += linear("model.decoder.norm", "transformer.ln_f")
    at = "model.decoder.layers.{}.", "transformer.h.{}."
    names += linear(f"{at[0]}norms.self_attn", f"{at[1]}ln_1") + linear(f"{at[0]}norms.mlp", f"{at[1]}ln_2")
    for number, part in enumerate("qkv"):
        third = lambda t, n=number: turned(t.chunk(3, -1)[n])  # noqa: E731
        names += linear(f"{at[0]}self_attn.{part}_proj", f"{at[1]}attn.c_attn", change=third)
    names += linear(f"{at[0]}self_attn.o_proj", f"{at[1]}attn.c_proj", change=turned)
    names += linear(f"{at[0]}mlp.up_proj", f"{at[1]}mlp.c_fc", change=turned)
    names += linear(f"{at[0]}mlp.down_proj", f"{at[1]}mlp.c_proj", change=turned)
    take(ours, names, theirs.state_dict())
    assert torch.allclose(ours(ids(2, 9)).logits, theirs(ids(2, 9)).logits, atol=1e-5)


def gated(own, theirs, qk_norm):
    names = [
        ("model.embed_tokens.weight", "model.embed_tokens.weight", same),
        ("lm_head.weight", "lm_head.weight", same),
    ]
    names += linear("model.decoder.norm", "model.norm", False)
    at = "model.decoder.layers.{}.", "model.layers.{}."
    names += linear(f"{at[0]}norms.self_attn", f"{at[1]}input_layernorm", False)
    names += linear(f"{at[0]}norms.mlp", f"{at[1]}post_attention_layernorm", False)
    for part in ("q_proj", "k_proj", "v_proj", "o_proj", *(["q_norm", "k_norm"] if qk_norm else [])):
        names += linear(f"{at[0]}self_attn.{part}", f"{at[1]}self_attn.{part}", False)
    for part in ("gate_proj", "up_proj", "down_proj"):
        names += linear(f"{at[0]}mlp.{part}", f"{at[1]}mlp.{part}", False)
    return take(own, names, theirs.state_dict())


@torch.no_grad()
@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_llama_and_qwen3_with_shared_keys_and_values(arch):
    config, cls = (LlamaConfig, LlamaForCausalLM) if arch == "llama" else (Qwen3Config, Qwen3ForCausalLM)
    theirs = shaken(cls(config(**{**SIZES, "num_key_value_heads": 2}, tie_word_embeddings=False, rms_norm_eps=1e-6)))
    options = {"qk_norm": arch == "qwen3", "num_key_value_heads": 2, "tie_word_embeddings": False}
    ours = gated(make(**options), theirs, arch == "qwen3")
    assert torch.allclose(ours(ids(2, 9)).logits, theirs(ids(2, 9)).logits, atol=1e-5)


@torch.no_grad()
def test_mpt_has_alibi():
    theirs = shaken(MptForCausalLM(MptConfig(vocab_size=40, d_model=32, n_layers=2, n_heads=4, max_seq_len=64)))
    own = {"norm": "layernorm", "norm_eps": 1e-5, "qk_norm": False, "positions": "alibi", "activation": "gelu"}
    ours = make(**own, intermediate_size=128)
    nothing = lambda t: torch.zeros(len(t))  # noqa: E731 - its norms have no bias
    names = [("model.embed_tokens.weight", "transformer.wte.weight", same)]
    at = "model.decoder.layers.{}.", "transformer.blocks.{}."
    norms = {"model.decoder.norm": "transformer.norm_f"}
    norms |= {f"{at[0]}norms.self_attn": f"{at[1]}norm_1", f"{at[0]}norms.mlp": f"{at[1]}norm_2"}
    for ours_at, theirs_at in norms.items():
        names += [*linear(ours_at, theirs_at, False), (f"{ours_at}.bias", f"{theirs_at}.weight", nothing)]
    for number, part in enumerate("qkv"):
        third = lambda t, n=number: t.chunk(3)[n]  # noqa: E731
        names += linear(f"{at[0]}self_attn.{part}_proj", f"{at[1]}attn.Wqkv", False, third)
    names += linear(f"{at[0]}self_attn.o_proj", f"{at[1]}attn.out_proj", False)
    for part in ("up_proj", "down_proj"):
        names += linear(f"{at[0]}mlp.{part}", f"{at[1]}ffn.{part}", False)
    take(ours, names, theirs.state_dict())
    assert torch.allclose(ours(ids(2, 30)).logits, theirs(ids(2, 30)).logits, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_branch_is_joined_as_its_placement_says(placement):
    model = shaken(make(norm_placement=placement, activation="relu2"))
    layer, x = model.model.decoder.layers[1], torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(0))
    inner, norm = layer.mlp, layer.norms["mlp"]
    branch = lambda y: torch.relu(y @ inner.up_proj.weight.T) ** 2 @ inner.down_proj.weight.T  # noqa: E731
    expected = {
        "pre": lambda: x + branch(norm(x)),
        "post": lambda: norm(x + branch(x)),
        "deep": lambda: norm(4**0.25 * x + branch(x)),
        "sandwich": lambda: x + layer.norms_after["mlp"](branch(norm(x))),
    }
    assert torch.allclose(layer._join("mlp", x), expected[placement](), atol=1e-5)
    assert (type(model.model.decoder.norm) is torch.nn.Identity) == (placement in ("post", "deep"))


@torch.no_grad()
def test_marian_is_the_first_transformer():
    """Post-norm, sines, an encoder and a decoder: Vaswani et al. 2017."""
    shape = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    shape |= {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "d_model": 32, "vocab_size": 40, "pad_token_id": 0}
    shape |= {"max_position_embeddings": 64, "activation_function": "relu", "scale_embedding": True}
    theirs = MarianMTModel(MarianConfig(**shape, decoder_start_token_id=0, eos_token_id=1, forced_eos_token_id=None))
    kept = [part.embed_positions.weight.clone() for part in (theirs.model.encoder, theirs.model.decoder)]
    shaken(theirs)
    for part, table in zip((theirs.model.encoder, theirs.model.decoder), kept):
        part.embed_positions.weight.copy_(table)
    own = {"norm": "layernorm", "norm_eps": 1e-5, "norm_placement": "post", "positions": "sinusoidal", "bias": True}
    own |= {"activation": "relu", "qk_norm": False, "scale_embedding": True, "num_encoder_layers": 2}
    ours = make(TransformerForSeq2SeqLM, **own, is_encoder_decoder=True)
    names = [("model.embed_tokens.weight", "model.shared.weight", same)]
    attention = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "o_proj": "out_proj"}
    for side, stack in (("encoder", "encoder.stack"), ("decoder", "decoder")):
        at = f"model.{stack}.layers.{{}}.", f"model.{side}.layers.{{}}."
        kinds = {"self_attn": "self_attn"} | ({"cross_attn": "encoder_attn"} if side == "decoder" else {})
        for kind, name in kinds.items():
            names += linear(f"{at[0]}norms.{kind}", f"{at[1]}{name}_layer_norm")
            for part, of in attention.items():
                names += linear(f"{at[0]}{kind}.{part}", f"{at[1]}{name}.{of}")
        names += linear(f"{at[0]}norms.mlp", f"{at[1]}final_layer_norm")
        names += linear(f"{at[0]}mlp.up_proj", f"{at[1]}fc1") + linear(f"{at[0]}mlp.down_proj", f"{at[1]}fc2")
    state = theirs.state_dict()
    take(ours, names, state)
    read = {"input_ids": ids(2, 9), "decoder_input_ids": ids(2, 6)}
    found = ours(**read).logits + state["final_logits_bias"]
    assert torch.allclose(found, theirs(**read).logits, atol=1e-5)


@torch.no_grad()
def test_t5():
    shape = {"num_layers": 2, "num_heads": 4, "d_kv": 8, "d_model": 32, "d_ff": 48, "vocab_size": 40}
    shape |= {"feed_forward_proj": "relu", "tie_word_embeddings": False, "scale_decoder_outputs": False}
    theirs = shaken(T5ForConditionalGeneration(T5Config(**shape, pad_token_id=0, decoder_start_token_id=0)))
    own = {"positions": "relative", "activation": "relu", "qk_norm": False, "num_encoder_layers": 2}
    ours = make(TransformerForSeq2SeqLM, **own, is_encoder_decoder=True, tie_word_embeddings=False)
    names = [("model.embed_tokens.weight", "shared.weight", same), ("lm_head.weight", "lm_head.weight", same)]
    unscaled = lambda t: t * 8**0.5  # noqa: E731 - T5 does not divide its scores
    for side, stack in (("encoder", "encoder.stack"), ("decoder", "decoder")):
        at = f"model.{stack}.layers.{{}}.", f"{side}.block.{{}}.layer."
        kinds = {"self_attn": "0.SelfAttention"} | ({"cross_attn": "1.EncDecAttention"} if side == "decoder" else {})
        for kind, name in kinds.items():
            names += linear(f"{at[0]}norms.{kind}", f"{at[1]}{name[0]}.layer_norm", False)
            names += linear(f"{at[0]}{kind}.q_proj", f"{at[1]}{name}.q", False, unscaled)
            for part in "kvo":
                names += linear(f"{at[0]}{kind}.{part}_proj", f"{at[1]}{name}.{part}", False)
        last = len(kinds)
        names += linear(f"{at[0]}norms.mlp", f"{at[1]}{last}.layer_norm", False)
        names += linear(f"{at[0]}mlp.up_proj", f"{at[1]}{last}.DenseReluDense.wi", False)
        names += linear(f"{at[0]}mlp.down_proj", f"{at[1]}{last}.DenseReluDense.wo", False)
        names += linear(f"model.{stack}.norm", f"{side}.final_layer_norm", False)
        bias = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        names += [(f"model.{stack}.relative.weight", bias, same)]
    take(ours, names, theirs.state_dict())
    long = {"input_ids": ids(2, 50), "decoder_input_ids": ids(2, 40)}  # far enough for the grown buckets
    assert torch.allclose(ours(**long).logits, theirs(**long).logits, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("positions", POSITIONS)
def test_padding_on_either_side_changes_nothing(positions):
    model, row = make(positions=positions, num_key_value_heads=2), ids(1, 7)
    alone = model(row).logits
    for left, right in ((3, 0), (0, 3), (2, 4)):
        padded = torch.nn.functional.pad(row, (left, right), value=39)
        mask = torch.nn.functional.pad(torch.ones_like(row), (left, right))
        for asked in (False, True):  # the fused kernel gives 0 where nothing is seen, a softmax no number
            found = model(padded, attention_mask=mask, output_attentions=asked).logits[:, left : left + 7]
            assert torch.allclose(found, alone, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("left", [0, 3])
def test_the_cache_gives_what_the_whole_row_gives(positions, left):
    model, row = make(positions=positions), ids(2, 10)
    padded = torch.nn.functional.pad(row, (left, 0))
    mask = torch.nn.functional.pad(torch.ones_like(row), (left, 0))
    cache, parts = None, []
    for start, end in ((0, left + 4), (left + 4, left + 7), (left + 7, left + 8), (left + 8, left + 10)):
        seen = {"attention_mask": mask[:, :end]} if left else {}
        out = model(padded[:, start:end], past_key_values=cache, use_cache=True, **seen)
        cache = out.past_key_values
        parts.append(out.logits)
    assert torch.allclose(torch.cat(parts, 1)[:, left:], model(row).logits, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("positions", POSITIONS)
def test_documents_of_a_row_are_as_if_each_were_alone(positions):
    model, first, second = make(positions=positions), ids(1, 5), ids(1, 8) - 1
    documents = torch.tensor([[0] * 5 + [1] * 8])
    packed = model(torch.cat([first, second], 1), document_ids=documents).logits
    alone = torch.cat([model(first).logits, model(second).logits], 1)
    assert torch.allclose(packed, alone, atol=1e-5)


@torch.no_grad()
def test_a_prefix_is_seen_by_all_and_nothing_else_ahead_is():
    model, row = make(), ids(1, 8)
    base = model(row, prefix_lengths=torch.tensor([3])).logits
    changed = row.clone()
    changed[0, 2] = 39
    moved = (model(changed, prefix_lengths=torch.tensor([3])).logits != base).any(-1)[0]
    assert moved.all()
    changed = row.clone()
    changed[0, 3] = 39
    moved = (model(changed, prefix_lengths=torch.tensor([3])).logits != base).any(-1)[0]
    assert moved.tolist() == [False] * 3 + [True] * 5
    assert torch.allclose(model(row, prefix_lengths=torch.tensor([0])).logits, model(row).logits, atol=1e-6)


@torch.no_grad()
def test_weights_on_request_are_those_of_the_fused_kernel():
    model = make(positions="alibi", num_key_value_heads=2)
    plain, asked = model(ids(2, 6)), model(ids(2, 6), output_attentions=True, output_hidden_states=True)
    assert plain.attentions is None
    assert torch.allclose(plain.logits, asked.logits, atol=1e-6)
    assert [tuple(w.shape) for w in asked.attentions] == [(2, 4, 6, 6)] * 2
    assert torch.allclose(asked.attentions[1].sum(-1), torch.ones(2, 4, 6))
    assert (asked.attentions[0].triu(1) == 0).all()
    assert len(asked.hidden_states) == 3


def test_attention_by_hand():
    """One query, two keys: scores 1 and 0 over sqrt(1); weights e / (1 + e) and 1 / (1 + e)."""
    query, keys, values = torch.ones(1, 1, 1, 1), torch.tensor([1.0, 0.0]).view(1, 1, 2, 1), torch.tensor([2.0, 4.0])
    weights = []
    out = attend(query, keys, values.view(1, 1, 2, 1), Mask(), weights)
    assert weights[0].flatten().tolist() == pytest.approx([0.731059, 0.268941], abs=1e-6)
    assert out.item() == pytest.approx(2 * 0.731059 + 4 * 0.268941, abs=1e-5)


@torch.no_grad()
def test_an_encoder_decoder_ignores_padding_on_both_sides_and_has_a_cache():
    options = {"num_encoder_layers": 3, "positions": "relative", "is_encoder_decoder": True}
    model = make(TransformerForSeq2SeqLM, **options)
    read, written = ids(1, 6), ids(1, 7)
    alone = model(input_ids=read, decoder_input_ids=written).logits
    padded, mask = torch.nn.functional.pad(read, (2, 3)), torch.nn.functional.pad(torch.ones_like(read), (2, 3))
    found = model(input_ids=padded, attention_mask=mask, decoder_input_ids=written).logits
    assert torch.allclose(found, alone, atol=1e-6)
    cache, parts = None, []
    for start, end in ((0, 3), (3, 4), (4, 7)):
        inputs = {"input_ids": padded, "attention_mask": mask, "decoder_input_ids": written[:, start:end]}
        out = model(**inputs, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits)
    assert torch.allclose(torch.cat(parts, 1), alone, atol=1e-5)
    own = copy.deepcopy(model)
    own.model.embed_tokens.weight.data.zero_()
    assert torch.equal(model(input_ids=read, decoder_input_ids=written).logits, alone)
    assert own.model.encoder(read).last_hidden_state.abs().max() < 1e-6, "a copy reads its own embeddings"
    weights = model(input_ids=read, decoder_input_ids=written, output_attentions=True)
    assert [tuple(w.shape) for w in weights.cross_attentions] == [(1, 4, 7, 6)] * 2
    assert [tuple(w.shape) for w in weights.encoder_attentions] == [(1, 4, 6, 6)] * 3


def test_an_encoder_decoder_generates_what_it_finds_most_likely():
    options = {"num_encoder_layers": 1, "is_encoder_decoder": True, "decoder_start_token_id": 0, "pad_token_id": 0}
    model = make(TransformerForSeq2SeqLM, **options)
    read = ids(2, 6)
    drawn = model.generate(read, max_new_tokens=5, do_sample=False, eos_token_id=None)
    with torch.no_grad():
        logits = model(input_ids=read, decoder_input_ids=drawn[:, :-1]).logits
    assert drawn.shape == (2, 6)
    assert torch.equal(logits.argmax(-1), drawn[:, 1:])


@pytest.mark.parametrize(("placement", "norm"), itertools.product(PLACEMENTS, ("rmsnorm", "layernorm")))
def test_every_part_gets_a_gradient_and_survives_saving(placement, norm, tmp_path):
    number = PLACEMENTS.index(placement)
    options = {"positions": POSITIONS[number + 2], "activation": ("gelu", "relu", "relu2", "swiglu")[number]}
    model = make(norm_placement=placement, norm=norm, bias=number % 2 == 0, **options)
    out = model(ids(2, 9), labels=ids(2, 9))
    out.loss.backward()
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0 for n, p in model.named_parameters() if "k_proj.bias" not in n
    )
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(ids(2, 9)).logits, out.logits)
    assert not any("auto_map" in file.read_text() for file in tmp_path.glob("*.json"))


def test_deepnorm_starts_as_the_paper_says():
    model = make(
        norm_placement="deep", num_hidden_layers=8, hidden_size=64, num_attention_heads=8, num_key_value_heads=8
    )
    layer, (alpha, beta) = model.model.decoder.layers[3], deepnorm(8)
    assert layer.alpha == alpha == 2.0
    xavier = (2 / 128) ** 0.5
    assert layer.self_attn.q_proj.weight.std().item() == pytest.approx(xavier, rel=0.1)
    assert layer.self_attn.v_proj.weight.std().item() == pytest.approx(beta * xavier, rel=0.1)
    assert layer.mlp.down_proj.weight.std().item() == pytest.approx(beta * (2 / 112) ** 0.5, rel=0.1)
    assert deepnorm(12, 6) == pytest.approx((36**0.25, 144**-0.25))
    assert deepnorm(12, 6, encoder=True) == pytest.approx((0.81 * 15552**0.0625, 0.87 * 15552**-0.0625))


def test_generate_and_gradient_checkpointing_work():
    model = make(positions="alibi", pad_token_id=0)
    drawn = model.generate(ids(2, 4), max_new_tokens=6, do_sample=False)
    with torch.no_grad():
        assert torch.equal(model(drawn[:, :-1]).logits.argmax(-1)[:, 3:], drawn[:, 4:])
    model.train()
    plain = model(ids(2, 5)).logits
    model.gradient_checkpointing_enable({"use_reentrant": False})
    again = model(ids(2, 5), use_cache=False).logits
    assert torch.equal(plain, again)
    again.sum().backward()
    assert model.model.decoder.layers[0].mlp.up_proj.weight.grad is not None


def test_an_encoder_sees_all_and_neither_writes_nor_scores_beginnings(tmp_path):
    config = TransformerConfig(**SIZES, causal=False)
    encoder = AutoModelForMaskedLM.from_config(config).eval()
    row = ids(1, 6)
    changed = row.clone()
    changed[0, -1] = 0
    assert (encoder(row).logits != encoder(changed).logits).any(-1).all()
    encoder.save_pretrained(tmp_path)
    assert type(AutoModelForMaskedLM.from_pretrained(tmp_path)).__name__ == "TransformerForMaskedLM"
    for auto, what in ((AutoModelForCausalLM, "go on with a text"), (AutoModelForSequenceClassification, "score each")):
        with pytest.raises(BadInput, match=f"an encoder, whose tokens see later ones: it cannot {what}.*causal true"):
            auto.from_pretrained(tmp_path)
    both = TransformerConfig(**SIZES, num_encoder_layers=1, is_encoder_decoder=True)
    assert AutoModelForSeq2SeqLM.from_config(both).num_parameters() > 0
    with pytest.raises(BadInput, match=r"an encoder and a decoder.*num_encoder_layers 0"):
        AutoModelForCausalLM.from_config(both)
