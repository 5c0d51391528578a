"""A vocabulary of words and small models for PPO, made anew for each test."""

import pytest
import torch
from accelerate.state import AcceleratorState
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, Qwen3ForSequenceClassification

from lmkit.tokenization.chat import CHAT_TEMPLATE, SPECIAL_TOKENS

WORDS = [f"w{i}" for i in range(20)] + ["user", "assistant", "\n"]
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "pad_token_id": 3,
    "initializer_range": 0.2,
}


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Accelerate remembers its first precision for the whole process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def word_tokenizer():
    vocabulary = {token: i for i, token in enumerate([*SPECIAL_TOKENS, "<unk>", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(SPECIAL_TOKENS)
    specials = {"eos_token": "<|endoftext|>", "pad_token": "<|pad|>", "unk_token": "<unk>"}
    made = PreTrainedTokenizerFast(tokenizer_object=backend, **specials)
    made.chat_template = CHAT_TEMPLATE
    return made


@pytest.fixture
def tokenizer():
    return word_tokenizer()


@pytest.fixture
def make_policy():
    """A function that builds the small policy, with other configuration values where given."""

    def make(**options):
        torch.manual_seed(0)
        return Qwen3ForCausalLM(Qwen3Config(**{**SIZES, "tie_word_embeddings": True, **options}))

    return make


@pytest.fixture
def policy(make_policy):
    return make_policy()


@pytest.fixture
def reward_model():
    torch.manual_seed(1)
    return Qwen3ForSequenceClassification(Qwen3Config(**SIZES, num_labels=1))
