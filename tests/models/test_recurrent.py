"""Recurrent models: cells by hand, padding that leaves the state alone, a state that is the cache, ELMo's layers."""

import numpy as np
import pytest
import torch
from torch.nn.functional import pad
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from lmkit.generation.chat import stream
from lmkit.generation.sampler import sample
from lmkit.models.heads import last_token_scores
from lmkit.models.presets import ModelConfig, transformers_config
from lmkit.models.recurrent import LayerMix, RecurrentConfig, RecurrentForCausalLM, reversed_order

SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "initializer_range": 0.3}
CELLS = ["rnn", "gru", "lstm"]


def make(cell="lstm", **options):
    torch.manual_seed(0)
    model = RecurrentForCausalLM(RecurrentConfig(**{**SIZES, "cell": cell, **options})).eval()
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.uniform_(-0.6, 0.6)
    return model


def ids(*shape):
    return torch.randint(1, 40, shape, generator=torch.Generator().manual_seed(1))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def by_hand(cell, layer, x):
    """Outputs [T, D] of one layer for inputs x [T, D], one token at a time."""
    w_in, w_state, b_in, b_state = (p.detach().double().numpy() for p in layer.parameters())
    h = c = np.zeros(x.shape[1])
    outputs = []
    for step in x:
        a, b = w_in @ step + b_in, w_state @ h + b_state
        if cell == "rnn":
            h = np.tanh(a + b)
        elif cell == "gru":
            (ra, za, na), (rb, zb, nb) = np.split(a, 3), np.split(b, 3)
            z = sigmoid(za + zb)
            h = (1 - z) * np.tanh(na + sigmoid(ra + rb) * nb) + z * h
        else:
            i, f, g, o = np.split(a + b, 4)
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
            h = sigmoid(o) * np.tanh(c)
        outputs.append(h)
    return np.array(outputs)


@torch.no_grad()
@pytest.mark.parametrize("cell", CELLS)
def test_logits_are_those_of_the_cell_by_hand(cell):
    model, row = make(cell), ids(1, 7)
    table = model.model.embed_tokens.weight.double().numpy()
    x = table[row[0]] * 4.0  # the root of the width
    for layer in model.model.layers:
        x = by_hand(cell, layer, x)
    assert np.allclose(model(row).logits[0].numpy(), x @ table.T, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("cell", CELLS)
def test_padding_anywhere_leaves_logits_and_state_alone(cell):
    model, row = make(cell), ids(1, 6)
    alone, then = model(row, use_cache=True), ids(1, 3)
    after = model(then, past_key_values=alone.past_key_values, use_cache=True).logits
    for left, right in ((3, 0), (0, 2), (2, 4)):
        mask = pad(torch.ones_like(row), (left, right))
        for use_cache in (False, True):
            out = model(pad(row, (left, right), value=39), attention_mask=mask, use_cache=use_cache)
            assert torch.allclose(out.logits[:, left : left + 6], alone.logits, atol=1e-6)
        found = model(then, past_key_values=out.past_key_values, use_cache=True).logits
        assert torch.allclose(found, after, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("cell", CELLS)
def test_a_row_without_new_tokens_keeps_its_state(cell):
    model, row = make(cell), ids(2, 5)
    cache = model(row, use_cache=True).past_key_values
    mask = torch.tensor([[0, 0], [1, 0]])
    model(ids(2, 2), attention_mask=mask, past_key_values=cache, use_cache=True)
    then = ids(2, 1)
    found = model(then, past_key_values=cache, use_cache=True).logits
    longer = torch.cat([row[1], ids(2, 2)[1, :1], then[1]])[None]
    assert torch.allclose(found[0, -1], model(torch.cat([row[0], then[0]])[None]).logits[0, -1], atol=1e-6)
    assert torch.allclose(found[1, -1], model(longer).logits[0, -1], atol=1e-6)
    assert cache.get_seq_length() == 8


@pytest.mark.parametrize("cell", CELLS)
def test_sampler_and_generate_draw_what_the_whole_row_says(cell):
    model = make(cell, pad_token_id=0)
    prompts = [ids(1, n)[0].tolist() for n in (2, 7, 4)]
    drawn = sample(model, prompts, max_new_tokens=6, stop_token_ids=[11, 30], temperature=0)
    for row, prompt in enumerate(prompts):
        new = drawn.ids(row)
        with torch.no_grad():
            logits = model(torch.tensor([prompt + new])).logits[0, len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == new
        assert torch.allclose(logits.log_softmax(-1).max(-1).values, drawn.logprobs[row, : len(new)], atol=1e-5)
    streamed = stream(
        model, prompts[1], max_new_tokens=6, stop_token_ids=[11, 30], temperature=0, generator=torch.Generator()
    )
    assert list(streamed) == [i for i in drawn.ids(1) if i not in (11, 30)]
    left = torch.tensor([[0] * (7 - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (7 - len(p)) + [1] * len(p) for p in prompts])
    text = model.generate(left, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=[11, 30])
    for row in range(3):
        assert text[row, 7:].tolist()[: len(drawn.ids(row))] == drawn.ids(row)
    beams = model.generate(left, attention_mask=mask, max_new_tokens=3, num_beams=2, do_sample=False)
    assert beams.shape == (3, 10)


@pytest.mark.parametrize("cell", CELLS)
def test_truncation_cuts_the_gradient_and_not_the_state(cell):
    whole, cut = make(cell), make(cell, bptt_tokens=4)
    assert torch.allclose(whole(ids(2, 10)).logits, cut(ids(2, 10)).logits, atol=1e-6)
    reached = []
    for model in (whole, cut):
        x = torch.randn(1, 10, 16, generator=torch.Generator().manual_seed(3), requires_grad=True)
        model.model(inputs_embeds=x).last_hidden_state[0, 5].sum().backward()
        reached.append((x.grad[0] != 0).any(-1).tolist())
    assert reached[0] == [True] * 6 + [False] * 4
    assert reached[1] == [False] * 4 + [True] * 2 + [False] * 4


def test_a_saved_model_is_loaded_and_a_reward_model_starts_from_it(tmp_path):
    model = make("gru")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.allclose(loaded(ids(2, 5)).logits, model(ids(2, 5)).logits, atol=1e-6)
    reward = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1).eval()
    assert torch.equal(reward.model.layers[1].weight_hh_l0, model.model.layers[1].weight_hh_l0)
    rows = [ids(1, n)[0].tolist() for n in (3, 8, 5)]
    together = last_token_scores(reward, rows)
    assert torch.allclose(together, torch.cat([last_token_scores(reward, [row]) for row in rows]), atol=1e-6)


def test_a_fresh_lstm_has_its_forget_gate_open():
    model = RecurrentForCausalLM(transformers_config(ModelConfig(preset="nano", arch="lstm"), 40))
    bias = model.model.layers[0].bias_hh_l0
    assert (bias.unflatten(0, (4, 64)).unique(dim=1) == torch.tensor([[0.0], [1.0], [0.0], [0.0]])).all()
    assert model.model.layers[0].weight_ih_l0.abs().max().item() == pytest.approx(1 / 8, rel=0.01)


@torch.no_grad()
def test_elmo_reads_both_ways_and_ignores_padding():
    model, row = make(bidirectional=True, num_hidden_layers=2), ids(1, 6)
    layers = model.model.contextual(row)
    assert layers.shape == (3, 1, 6, 32)
    assert torch.equal(layers[0, :, :, :16], layers[0, :, :, 16:])
    for place, ahead, behind in ((0, True, False), (5, False, True)):
        changed = row.clone()
        changed[0, place] = 39
        moved = (model.model.contextual(changed)[2, 0, 3] != layers[2, 0, 3]).view(2, 16).any(1)
        assert moved.tolist() == [ahead, behind]
    padded, mask = pad(row, (2, 3), value=39), pad(torch.ones_like(row), (2, 3))
    found = model.model.contextual(padded, mask)
    assert torch.allclose(found[:, :, 2:8], layers, atol=1e-6)
    assert (found[:, :, :2] == 0).all()
    # The direction from the end is what the loss trains: the second stack over the reversed row.
    backward = model.model(row, backward_ids=row.flip(1)).last_hidden_state[:, 6:]
    assert torch.allclose(backward.flip(1), layers[2, :, :, 16:], atol=1e-6)
    assert torch.allclose(model(row).logits, model.lm_head(layers[2, :, :, :16]), atol=1e-5)


def test_the_mix_of_layers_learns_which_layer_a_task_needs():
    layers = torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    mix = LayerMix(2)
    assert torch.allclose(mix(layers), layers.mean(0), atol=1e-6)
    optimizer = torch.optim.Adam(mix.parameters(), lr=0.3)
    for _ in range(60):
        optimizer.zero_grad()
        (mix(layers) - 2 * layers[1]).square().mean().backward()
        optimizer.step()
    assert mix.weights.softmax(0)[1] > 0.95
    assert mix.gamma.item() == pytest.approx(2, abs=0.1)


def test_reversed_order_puts_padding_last():
    mask = torch.tensor([[True, True, True, False], [False, True, False, True]])
    assert reversed_order(mask).tolist() == [[2, 1, 0, 3], [3, 1, 0, 2]]
