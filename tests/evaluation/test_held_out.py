"""Scores and continuations of a model in training, on documents of a shard."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config

from lmkit.data.shards import Shards, write_shards
from lmkit.evaluation import held_out
from lmkit.evaluation.bits_per_byte import bits_per_byte
from lmkit.evaluation.held_out import HeldOut
from lmkit.models.attention import packed_attention
from lmkit.models.presets import ModelConfig, build_model
from lmkit.tokenization.train import train_tokenizer

DOCUMENTS = ["The owl had a drum and the fox had none. " * 4, "A bell!", "The fox gave the owl a bell. " * 3]


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    tokenizer = train_tokenizer(lambda: DOCUMENTS, vocab_size=384, allow_smaller_vocab=True)
    torch.manual_seed(0)
    model = build_model(ModelConfig(preset="nano", context_length=32), tokenizer)
    model.get_input_embeddings().weight.data.normal_(std=0.5)
    shards = write_shards(DOCUMENTS, tokenizer, tmp_path_factory.mktemp("shards"))
    return model, HeldOut.start_of(shards, 10_000, tokenizer, context_length=32)


def test_both_strides_are_scored_and_named(held):
    model, text = held
    found = text.scores(model) | text.unstrided_scores(model)
    for stride, prefix in ((16, ""), (32, "unstrided_")):
        options = {"stride": stride, "document_offsets": text.document_offsets}
        wanted = bits_per_byte(model, text.tokens, text.tokenizer, 32, **options)
        assert found[f"eval/{prefix}bits_per_byte"] == pytest.approx(wanted["bits_per_byte"], rel=1e-6)
        assert found[f"eval/{prefix}perplexity"] == pytest.approx(wanted["perplexity"], rel=1e-6)
    assert (found["eval/context_length"], found["eval/stride"]) == (32, 16)


def test_the_documents_within_the_first_tokens_are_taken(held):
    _, text = held
    offsets = text.document_offsets
    shards = Shards(text.tokens, offsets, 0, {})
    for num_tokens, num_documents in ((offsets[1], 1), (offsets[2] - 1, 1), (offsets[2], 2), (10_000, 3)):
        first = HeldOut.start_of(shards, num_tokens, text.tokenizer, 32)
        assert first.document_offsets.tolist() == offsets[: num_documents + 1].tolist()
        assert first.tokens.tolist() == text.tokens[: offsets[num_documents]].tolist()
    assert HeldOut.start_of(shards, 5, text.tokenizer, 32).tokens.tolist() == text.tokens[:5].tolist()


def test_continuations_start_held_out_documents_and_do_not_disturb_training(held):
    model, text = held
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    with packed_attention(model):
        rows = text.continuations(model)
        assert model.config._attn_implementation == "lmkit"
    assert torch.equal(torch.rand(3), expected)
    assert rows[0]["prompt"] == ""
    for row, document in zip(rows[1:], DOCUMENTS):
        assert document.startswith(row["prompt"])
        assert row["prompt"]
    assert rows == text.continuations(model)
    assert rows != text.continuations(model, seed=1)


@pytest.mark.parametrize("context_length", [2, 4])
def test_the_smallest_context_is_scored_and_continued(held, context_length):
    model, text = held
    small = HeldOut(text.tokens, np.array([0, len(text.tokens)]), text.tokenizer, context_length)
    assert math.isfinite((small.scores(model) | small.unstrided_scores(model))["eval/bits_per_byte"])
    assert len(small.continuations(model)) == 2


def test_a_model_without_sdpa_continues_texts_too(held):
    _, text = held
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16, "vocab_size": len(text.tokenizer)}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "attn_logit_softcapping": None}
    model = AutoModelForCausalLM.from_config(Gemma2Config(**sizes, **heads)).eval()
    with packed_attention(model):
        assert len(text.continuations(model)) == 4
        assert model.config._attn_implementation == "lmkit"


class Parrot(torch.nn.Module):
    """Puts all its trust in the tokens it has seen, alike; before that, in all tokens alike."""

    def __init__(self, vocab_size):
        super().__init__()
        self.sizes, self.device = vocab_size, torch.device("cpu")

    def forward(self, input_ids, use_cache):
        seen = torch.nn.functional.one_hot(input_ids, self.sizes).cumsum(1).clamp(max=1)
        return SimpleNamespace(logits=20.0 * seen)


def test_copying_parts_rare_tokens_seen_before_from_new_ones(held):
    tokens = np.array([7, 8, 7, 8, 8, 0] + [9] * 1000 + [0])
    text = HeldOut(tokens, np.array([0, 6, 1007]), held[1].tokenizer, context_length=5)
    found = text.copying(Parrot(384))
    # 7 is new behind one seen token, 8 behind two; then each is one of three seen ones. 9 is not rare.
    first = (20 + math.log(1) + 20 + math.log(2)) / 2
    assert found["eval/rare_first_nats_per_token"] == pytest.approx(first, abs=1e-3)
    assert found["eval/rare_repeated_nats_per_token"] == pytest.approx(math.log(3), abs=1e-3)


def test_scores_name_both_losses_of_rare_tokens_where_there_are_any(held, monkeypatch):
    model, text = held
    assert text.copying(model) == {}  # of a text this short every token is 1 % or more
    monkeypatch.setattr(held_out, "RARE", 0.5)
    assert {"eval/rare_first_nats_per_token", "eval/rare_repeated_nats_per_token"} < set(text.scores(model))
