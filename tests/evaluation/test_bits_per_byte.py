"""Bits per byte: exact on cases done by hand, the same for any tokenizer, batch size and way of cutting the stream."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from lmkit.evaluation.bits_per_byte import bits_per_byte, token_bytes, windows

TEXT = "the cat sat on the mat, the caf\u00e9 \u2581 was shut \u4e2d\u6587 \U0001f600\n\nand the cat sat again\n" * 3
SPECIALS = ["<|endoftext|>", "<|pad|>"]


def byte_level_tokenizer():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=290, special_tokens=SPECIALS, initial_alphabet=alphabet)
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer


def byte_fallback_tokenizer():
    """Shaped as a converted SentencePiece model: a space mark, byte tokens for what is not in the vocabulary."""
    pieces = [*SPECIALS, *(f"<0x{i:02X}>" for i in range(256)), "\u2581", *"theca", "th", "the", "\u2581the", "ca"]
    merges = [("t", "h"), ("th", "e"), ("\u2581", "the"), ("c", "a")]
    tokenizer = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, merges, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def character_tokenizer():
    characters = {c: i for i, c in enumerate([*SPECIALS, *sorted(set(TEXT))])}
    tokenizer = Tokenizer(models.BPE(characters, []))
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def fast(tokenizer):
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=SPECIALS[0], pad_token=SPECIALS[1])


TOKENIZERS = [byte_level_tokenizer, byte_fallback_tokenizer, character_tokenizer]


class Table(torch.nn.Module):
    """The same log-probabilities at every position."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.as_tensor(logits, dtype=torch.float64))

    def forward(self, input_ids, use_cache):
        assert not self.training
        assert use_cache is False
        return SimpleNamespace(logits=self.logits.expand(*input_ids.shape, -1))


def tiny_transformer(vocab_size=7):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=vocab_size, n_positions=16, n_embd=8, n_layer=2, n_head=2, initializer_range=0.5)
    return GPT2LMHeadModel(config).train()


@pytest.mark.parametrize("make", TOKENIZERS)
def test_token_bytes_add_up_to_the_text(make):
    tokenizer = fast(make())
    text = TEXT if make is not byte_fallback_tokenizer else TEXT.replace("\u2581", "_")  # its one lossy character
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    sizes = token_bytes(tokenizer)
    assert tokenizer.decode(ids) == text
    assert sizes[ids].sum() == len(text.encode())
    assert sizes[:2].tolist() == [0, 0]


def test_added_tokens_count_their_text_and_special_ones_nothing():
    tokenizer = fast(byte_level_tokenizer())
    tokenizer.add_tokens([AddedToken("na\u00efve", special=False), AddedToken("<|reserved|>", special=True)])
    assert token_bytes(tokenizer)[-2:].tolist() == [6, 0]


def test_a_tokenizer_that_loses_bytes_is_refused():
    tokenizer = byte_level_tokenizer()
    tokenizer.decoder = decoders.WordPiece()
    with pytest.raises(ValueError, match="decoded by WordPiece, wanted a byte-level"):
        token_bytes(fast(tokenizer))
    with pytest.raises(ValueError, match="found dict, wanted a fast tokenizer"):
        token_bytes({})


@pytest.mark.parametrize("make", TOKENIZERS)
def test_a_byte_uniform_model_needs_eight_bits_per_byte_under_any_tokenizer(make):
    tokenizer = fast(make())
    text = TEXT.replace("\u2581", "_") if make is byte_fallback_tokenizer else TEXT
    ids = np.array([0, *tokenizer(text, add_special_tokens=False)["input_ids"], 0])
    sizes = token_bytes(tokenizer)
    # 1/256 per byte to the tokens that occur, what is left to a special token, which is never scored.
    logits = np.full(len(sizes), -np.inf)
    occurring = np.setdiff1d(ids, [0])
    logits[occurring] = -sizes[occurring] * math.log(256)
    logits[0] = math.log(1 - np.exp(logits[occurring]).sum())
    scores = bits_per_byte(Table(logits), ids, tokenizer, context_length=16)
    assert scores["bits_per_byte"] == pytest.approx(8, abs=1e-6)
    assert scores["num_bytes"] == len(text.encode())


def test_a_case_done_by_hand():
    # Token 0 is special, 1 stands for one byte, 2 for three; the targets that count are 2, 1, 2: 7 bytes.
    tokens = np.array([1, 2, 0, 1, 2], dtype=np.uint16)
    model = Table(np.log([0.5, 0.25, 0.25])).train()
    scores = bits_per_byte(model, tokens, np.array([0, 1, 3]), context_length=3)
    assert scores == pytest.approx(
        {
            "bits_per_byte": 6 / 7,
            "nats_per_token": math.log(4),
            "perplexity": 4.0,
            "num_tokens": 3,
            "num_bytes": 7,
            "context_length": 3,
            "stride": 3,
        }
    )
    assert model.training


@pytest.mark.parametrize(
    ("num_tokens", "context", "stride"), [(2, 4, 4), (5, 4, 4), (30, 4, 3), (30, 7, 1), (29, 7, 7)]
)
def test_windows_score_every_token_but_the_first_once(num_tokens, context, stride):
    length = min(context, num_tokens - 1)
    scored = [start + i + 1 for start, first in windows(num_tokens, context, stride) for i in range(first, length)]
    assert scored == list(range(1, num_tokens))
    assert all(0 <= start <= num_tokens - 1 - length for start, _ in windows(num_tokens, context, stride))


@pytest.mark.parametrize("stride", [1, 3, None])
def test_each_target_is_scored_with_the_context_its_window_gives_it(stride):
    """Every target alone, after exactly the tokens its window holds before it."""
    model, tokens, context = tiny_transformer(), np.random.default_rng(0).integers(0, 7, 24), 6
    nats = 0.0
    for target in range(1, len(tokens)):
        scored_before = 0 if target <= context else context
        while scored_before and scored_before + (stride or context) < target:
            scored_before += stride or context
        end = min(scored_before + (stride or context), len(tokens) - 1) if scored_before else context
        seen = torch.tensor(tokens[end - context : target])[None]
        with torch.no_grad():
            nats -= model.eval()(input_ids=seen).logits[0, -1].log_softmax(-1)[tokens[target]].item()
    scores = bits_per_byte(model, tokens, np.ones(7, dtype=int), context, stride)
    assert scores["nats_per_token"] == pytest.approx(nats / 23, rel=1e-6)


def test_stride_one_is_the_exact_conditional_likelihood():
    model, tokens = tiny_transformer(), np.random.default_rng(1).integers(0, 7, 20)
    nats = 0.0
    for i in range(1, 20):
        seen = torch.tensor(tokens[max(0, i - 5) : i])[None]
        nats -= model.eval()(input_ids=seen).logits[0, -1].log_softmax(-1)[tokens[i]].item()
    scores = bits_per_byte(model, tokens, np.full(7, 2), context_length=5, stride=1)
    assert scores["bits_per_byte"] == pytest.approx(nats / (math.log(2) * 38), rel=1e-6)


def test_documents_are_read_alone_behind_the_end_of_text_before_them():
    model, tokens = tiny_transformer(), np.random.default_rng(3).integers(1, 7, 24)
    offsets = np.array([0, 3, 15, 24])
    tokens[offsets[1:] - 1] = 0  # each document ends with the end-of-text token
    nats = 0.0
    for begin, end in [(0, 3), (3, 15), (15, 24)]:
        for target in range(begin, end - 1):
            seen = torch.tensor([0, *tokens[begin:target]])[None]
            with torch.no_grad():
                nats -= model.eval()(input_ids=seen).logits[0, -1].log_softmax(-1)[tokens[target]].item()
    sizes = np.array([0, 1, 1, 1, 1, 1, 1])
    scores = [bits_per_byte(model, tokens, sizes, 16, batch_size=b, document_offsets=offsets) for b in (1, 2, 8)]
    assert scores[0]["num_tokens"] == 21
    assert scores[0]["nats_per_token"] == pytest.approx(nats / 21, rel=1e-6)
    assert scores[1] == pytest.approx(scores[0], rel=1e-6)
    assert scores[2] == pytest.approx(scores[0], rel=1e-6)


def test_batch_size_does_not_matter():
    model, tokens = tiny_transformer(), np.random.default_rng(2).integers(0, 7, 61)
    sizes = np.array([0, 1, 2, 1, 1, 3, 1])
    scores = [bits_per_byte(model, tokens, sizes, 8, stride=5, batch_size=size) for size in (1, 3, 100)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-7)
    assert scores[0] == pytest.approx(scores[2], rel=1e-7)


def test_sums_are_exact_over_many_tokens():
    """A float32 sum of a hundred thousand terms of 16.1 nats would be off in the fifth digit."""
    model = Table(np.log([1 - 1e-7, 1e-7]))
    tokens = np.ones(100_001, dtype=np.uint16)
    scores = bits_per_byte(model, tokens, np.array([0, 1]), context_length=100_000)
    assert scores["nats_per_token"] == pytest.approx(-math.log(1e-7), rel=1e-7)


@pytest.mark.parametrize(
    ("tokens", "options", "words"),
    [
        ([1, 1, 1], {"stride": 3}, "stride is 3; wanted 1 to context_length, which is 2"),
        ([1, 1, 1], {"stride": 0}, "stride is 0"),
        ([1, 2, 1], {}, "found token 2, wanted at most 1"),
        ([1, 0, 0], {}, "found 3 tokens, wanted one after the first"),
        ([], {}, "found 0 tokens"),
    ],
)
def test_what_cannot_be_scored_is_refused(tokens, options, words):
    tokens, sizes = np.array(tokens, dtype=np.uint16), np.array([0, 1])
    with pytest.raises(ValueError, match=words):
        bits_per_byte(Table(np.zeros(2)), tokens, sizes, context_length=2, **options)
