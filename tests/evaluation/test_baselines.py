"""The lines a model is held against: by hand, on the targets that the model's own score counts, and bounded."""

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lmkit.evaluation import baselines as module
from lmkit.evaluation.baselines import baselines, beaten_by, xz_bits_per_byte
from lmkit.evaluation.bits_per_byte import bits_per_byte
from lmkit.models import ngram
from lmkit.tokenization.chat import encode_text
from lmkit.tokenization.train import train_tokenizer

SHAKESPEARE = Path(__file__).parents[3] / "shared" / "data" / "text" / "tinyshakespeare.txt"
STORY = "The owl had a drum. The fox had a bell, and the owl had none. "


class Uniform(torch.nn.Module):
    def __init__(self, vocab_size):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.zeros(vocab_size))

    def forward(self, input_ids, use_cache):
        return SimpleNamespace(logits=self.logits.expand(*input_ids.shape, -1))


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(lambda: [STORY] * 3, vocab_size=384, allow_smaller_vocab=True)


def encode(tokenizer, text):
    """The text as one document of a shard."""
    return np.array([*encode_text(tokenizer, text), tokenizer.eos_token_id], dtype=np.uint16)


def test_lines_by_hand(tokenizer):
    train, text = encode(tokenizer, "aab"), encode(tokenizer, "ab")
    lines = baselines(train, text, tokenizer, orders=[1])
    # The one target that counts is "b", one byte, of 384 ids; add-one: it occurs once among 4 tokens.
    assert lines["uniform"] == pytest.approx(math.log2(384))
    assert lines["unigram"] == pytest.approx(-math.log2(2 / (4 + 384)))


def test_the_lines_count_the_targets_that_bits_per_byte_counts(tokenizer):
    tokens = np.concatenate([encode(tokenizer, STORY), encode(tokenizer, STORY[20:])])
    lines = baselines(tokens, tokens, tokenizer, orders=[2, 3])
    score = bits_per_byte(Uniform(384), tokens, tokenizer, context_length=9)
    assert score["bits_per_byte"] == pytest.approx(lines["uniform"])
    assert lines["kneser_ney_3"] < lines["kneser_ney_2"] < lines["unigram"] < lines["uniform"]


def test_xz_is_what_the_text_adds_to_the_training_text(tokenizer):
    seen, other = encode(tokenizer, STORY * 20), encode(tokenizer, "Quartz jigs vex BMW lynx; 0123456789 waltz " * 4)
    assert baselines(seen, seen, tokenizer)["xz"] < 0.2 < baselines(seen, other, tokenizer)["xz"]
    assert xz_bits_per_byte(b"", STORY.encode()) > 8 * 0.5


def test_a_large_corpus_costs_no_more(tokenizer, monkeypatch):
    monkeypatch.setattr(module, "NGRAM_TOKENS", 40)
    monkeypatch.setattr(module, "XZ_TOKENS", 20)
    fitted, fit = [], ngram.fit
    monkeypatch.setattr(ngram, "fit", lambda tokens, *rest: fitted.append(len(tokens)) or fit(tokens, *rest))
    train = encode(tokenizer, STORY * 9)
    baselines(train, encode(tokenizer, STORY), tokenizer)
    assert fitted == [40, 40, 40]


def test_a_model_without_a_finite_score_is_worse_than_all(tokenizer):
    assert beaten_by(float("nan"), {"uniform": 8.0, "xz": 2.0}) == ["xz", "uniform"]
    assert beaten_by(1.9, {"uniform": 8.0, "xz": 2.0}) == []


@pytest.mark.realdata
@pytest.mark.skipif(not SHAKESPEARE.exists(), reason="tiny-shakespeare is not on this machine")
def test_tiny_shakespeare_under_xz():
    text = SHAKESPEARE.read_bytes()
    cut = int(0.9 * len(text))
    # A 7-gram of its characters, fitted on all of the training text, takes 2.188 bits.
    assert 2.188 < xz_bits_per_byte(text[cut - 200_000 : cut], text[cut:]) < xz_bits_per_byte(b"", text[cut:])
