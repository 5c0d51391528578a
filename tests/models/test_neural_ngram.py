"""The neural n-gram against its formula, and under padding, caches and packed documents."""

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from lmkit.config import validate
from lmkit.errors import BadInput
from lmkit.generation.sampler import sample
from lmkit.models.heads import ValueHead, classifier_from, token_scores
from lmkit.models.neural_ngram import NeuralNGramConfig, NeuralNGramForCausalLM
from lmkit.models.presets import ModelConfig, transformers_config
from lmkit.training.mfu import flops_per_token


@pytest.fixture
def model():
    torch.manual_seed(0)
    sizes = {"vocab_size": 11, "hidden_size": 6, "window": 3, "initializer_range": 0.5}
    return NeuralNGramForCausalLM(NeuralNGramConfig(**sizes)).eval()


def test_logits_are_the_published_formula(model):
    table, layer = model.model.embed_tokens.weight, model.model.window_layer
    tokens = [4, 9, 1, 1, 7]
    for t, logits in enumerate(model(torch.tensor([tokens])).logits[0]):
        window = [table[w] for w in tokens[max(0, t - 2) : t + 1]]
        window = [torch.zeros(6)] * (3 - len(window)) + window
        hidden = torch.tanh(layer.weight @ torch.stack(window, dim=1).flatten() + layer.bias)
        torch.testing.assert_close(logits, table @ hidden)


def test_a_token_before_the_window_changes_nothing(model):
    one, other = torch.tensor([[4, 9, 1, 1, 7]]), torch.tensor([[5, 9, 1, 1, 7]])
    same = [torch.equal(a, b) for a, b in zip(model(one).logits[0], model(other).logits[0])]
    assert same == [False, False, False, True, True]


def test_left_padding_is_the_same_as_none(model):
    tokens = torch.tensor([[4, 9, 1]])
    padded, mask = torch.tensor([[8, 8, 4, 9, 1]]), torch.tensor([[0, 0, 1, 1, 1]])
    assert torch.equal(model(padded, attention_mask=mask).logits[:, 2:], model(tokens).logits)


@pytest.mark.parametrize("first", [1, 2, 4])
def test_a_cache_gives_the_same_logits(model, first):
    tokens, cache = torch.tensor([[4, 9, 1, 1, 7]]), DynamicCache(config=model.config)
    parts = [model(part, past_key_values=cache, use_cache=True).logits for part in tokens.split([first, 5 - first], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), model(tokens).logits)


def test_no_token_sees_another_document(model):
    packed = model(torch.tensor([[4, 9, 1, 7, 7]]), document_ids=torch.tensor([[0, 0, 1, 1, 1]])).logits
    torch.testing.assert_close(packed[:, :2], model(torch.tensor([[4, 9]])).logits)
    torch.testing.assert_close(packed[:, 2:], model(torch.tensor([[1, 7, 7]])).logits)


def test_greedy_completions_are_those_of_the_forward_alone(model):
    """Prompts of different lengths share a batch; a row that has ended leaves it, and the cache with it."""
    prompts, by_hand = [[4], [9, 1, 3, 3], [2, 10]], []
    for prompt in prompts:
        tokens = list(prompt)
        while len(tokens) < len(prompt) + 6 and tokens[len(prompt) :][-1:] != [5]:
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
        by_hand.append(tokens[len(prompt) :])
    drawn = sample(model, prompts, max_new_tokens=6, stop_token_ids=[5], temperature=0)
    assert [drawn.ids(row) for row in range(3)] == by_hand
    greedy = model.generate(
        torch.tensor([prompts[1]]), max_new_tokens=6, do_sample=False, eos_token_id=5, pad_token_id=0
    )
    assert greedy[0, 4:].tolist() == by_hand[1]


def test_a_saved_model_gives_equal_logits(model, tmp_path):
    model.save_pretrained(tmp_path)
    tokens = torch.tensor([[4, 9, 1, 1, 7]])
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(tokens).logits, model(tokens).logits)


def test_its_body_carries_a_scalar_head(model):
    head = ValueHead(6)
    torch.nn.init.normal_(head.weight)
    tokens = torch.tensor([[4, 9, 1]])
    values = token_scores(classifier_from(model, head), tokens)
    torch.testing.assert_close(values, head(model.base_model(tokens).last_hidden_state))


def configured(**mapping):
    return transformers_config(validate(ModelConfig, {"preset": "nano", "arch": "neural_ngram", **mapping}), 384)


def test_the_stage_builds_it_by_name():
    config = configured(hidden_size=48, window=5)
    assert (type(config), config.hidden_size, config.window) == (NeuralNGramConfig, 48, 5)
    assert configured().window == 8
    model = AutoModelForCausalLM.from_config(config)
    assert flops_per_token(model, 100) == 6 * (48 * 48 * 5 + 384 * 48)


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"num_hidden_layers": 2}, "num_hidden_layers: there is one layer, of hidden_size, in arch neural_ngram"),
        ({"head_dim": 32}, "head_dim: there are no heads"),
        ({"arch": "llama", "window": 4}, "window: arch llama sees the whole context"),
        ({"arch": "lstm", "window": 4}, "window: arch lstm sees the whole context"),
        ({"arch": "cbow"}, "cbow makes word vectors, which predict no next token"),
        ({"arch": "ngram"}, "ngram is counted, not trained"),
    ],
)
def test_what_cannot_work_is_refused_with_what_does(mapping, message):
    with pytest.raises(BadInput, match=rf"{message}.*--model.arch (neural_ngram|transformer)"):
        configured(**mapping)
