"""The neural n-gram model of Bengio, Ducharme, Vincent and Jauvin (JMLR 3, 2003): a fixed window and one tanh layer.

    hidden[t] = tanh(H [e(w[t-window+1]), ..., e(w[t])] + d)        p(w[t+1] | window) = softmax(U hidden[t])

An n-gram model of order `window` + 1 in which tokens are vectors e, so that what is learnt of one token serves its
likes. Before the start of a sequence, and of a document where `document_ids` are given, the vectors are zero. U is the
table of the vectors, or another with tie_word_embeddings=False as in the paper; of the paper's optional parts neither
direct connections nor output biases are here.

Shapes: B batch, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Cache,
    DynamicCache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.modeling_outputs import BaseModelOutputWithPast

from lmkit.models.language_model import WithOutputLayer

if TYPE_CHECKING:
    from lmkit.models.presets import ModelConfig


class NeuralNGramConfig(PreTrainedConfig):
    """window: tokens that a prediction sees. hidden_size: width D of the vectors and of the tanh layer."""

    model_type = "neural_ngram"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    vocab_size: int = 1024
    hidden_size: int = 128
    window: int = 8
    num_hidden_layers: int = 1
    max_position_embeddings: int = 256
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None


def configuration(config: ModelConfig, shared: dict[str, Any]) -> NeuralNGramConfig:
    """The configuration that a `ModelConfig` describes."""
    sizes = config.sizes()
    own = {"hidden_size": sizes["hidden_size"], "max_position_embeddings": sizes["context_length"]}
    return NeuralNGramConfig(**own, **({"window": config.window} if config.window else {}), **shared)


class NeuralNGramPreTrainedModel(PreTrainedModel):
    config_class = NeuralNGramConfig
    base_model_prefix = "model"
    _supports_sdpa = True  # there is no attention to choose; stages choose one for every model


class NeuralNGramModel(NeuralNGramPreTrainedModel):
    """Tokens to hidden states [B, T, D]."""

    def __init__(self, config: NeuralNGramConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        # Of a window's vectors [D, window], the oldest token first, as one row.
        self.window_layer = nn.Linear(config.hidden_size * config.window, config.hidden_size)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        document_ids: Tensor | None = None,
        **kwargs: object,
    ) -> BaseModelOutputWithPast:
        """input_ids: [B, T]. attention_mask: [B, seen + T], 0 at left padding, which counts as before the start.

        document_ids: [B, T] integers, equal where two tokens of a row belong to the same document. With a cache the
        vectors seen before are its keys; there are no values.
        """
        vectors = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        num_new, window = vectors.shape[1], self.config.window
        if attention_mask is not None:
            vectors = vectors * attention_mask[:, -num_new:, None].to(vectors.dtype)
        if self.config.use_cache if use_cache is None else use_cache:
            past_key_values = DynamicCache(config=self.config) if past_key_values is None else past_key_values
            vectors = past_key_values.update(vectors[:, None], vectors[:, None, :, :0], 0)[0][:, 0]
        vectors = vectors[:, -(num_new + window - 1) :]
        vectors = F.pad(vectors, (0, 0, num_new + window - 1 - vectors.shape[1], 0))
        windows = vectors.unfold(1, window, 1)  # [B, T, D, window]
        if document_ids is not None:
            documents = F.pad(document_ids, (window - 1, 0)).unfold(1, window, 1)
            windows = windows * (documents == document_ids[..., None])[:, :, None]
        hidden = torch.tanh(self.window_layer(windows.flatten(2)))
        return BaseModelOutputWithPast(last_hidden_state=hidden, past_key_values=past_key_values)


class NeuralNGramForCausalLM(WithOutputLayer, NeuralNGramPreTrainedModel, GenerationMixin):
    """The language model."""


class NeuralNGramForSequenceClassification(GenericForSequenceClassification, NeuralNGramPreTrainedModel):
    """Reward and value models."""


AutoConfig.register(NeuralNGramConfig.model_type, NeuralNGramConfig)
AutoModel.register(NeuralNGramConfig, NeuralNGramModel)
AutoModelForCausalLM.register(NeuralNGramConfig, NeuralNGramForCausalLM)
AutoModelForSequenceClassification.register(NeuralNGramConfig, NeuralNGramForSequenceClassification)
