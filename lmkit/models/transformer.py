"""One Transformer whose parts can be chosen: where norms stand and which, positions, heads, activation, encoder.

With the settings of GPT-2, Llama, Qwen3, Marian or T5 it computes what these do, from their weights. It makes its own
masks and attends by its own function, so no attention implementation of transformers changes it.

Shapes: B batch, T tokens (queries), S tokens seen (keys), H heads, D width, d width of a head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    DynamicCache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions as StackOutput

from lmkit.errors import BadInput
from lmkit.models.language_model import WithOutputLayer
from lmkit.models.layer import Layer, Mask, make_norm
from lmkit.models.positions import alibi_slopes, positions_of, relative_buckets, rotation, sinusoids

if TYPE_CHECKING:
    from lmkit.models.presets import ModelConfig

NUM_BUCKETS = 32


class TransformerConfig(PreTrainedConfig):
    """The parts are described in `lmkit.models.presets.BlockConfig`; num_hidden_layers are the decoder's."""

    model_type = "lmkit_transformer"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    vocab_size: int = 1024
    hidden_size: int = 128
    num_hidden_layers: int = 4
    num_encoder_layers: int = 0
    num_attention_heads: int = 4
    num_key_value_heads: int = 4
    head_dim: int = 32
    intermediate_size: int = 384
    max_position_embeddings: int = 256
    norm_placement: str = "pre"
    norm: str = "rmsnorm"
    norm_eps: float = 1e-6
    qk_norm: bool = True
    positions: str = "rotary"
    rope_theta: float = 10_000.0
    scale_embedding: bool = False
    activation: str = "swiglu"
    bias: bool = False
    causal: bool = True
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | None = None


def configuration(config: ModelConfig, shared: dict[str, Any]) -> TransformerConfig:
    """The configuration of arch transformer; shared: vocabulary and token ids."""
    sizes, block = config.sizes(), config.block.model_dump()
    heads, encoder = sizes["hidden_size"] // sizes["head_dim"], bool(block["num_encoder_layers"])
    shared = shared | {"is_encoder_decoder": encoder, "max_position_embeddings": sizes.pop("context_length")}
    if encoder:
        shared["decoder_start_token_id"] = shared.get("eos_token_id")
    block["num_key_value_heads"] = block["num_key_value_heads"] or heads
    # Sines are of size 1: embeddings that are also the output layer would be lost in them (Vaswani et al. 2017, 3.4).
    scaled = block["positions"] == "sinusoidal"
    return TransformerConfig(**(shared | sizes | block), num_attention_heads=heads, scale_embedding=scaled)


class Stack(nn.Module):
    """Layers over embeddings. encoder: of an encoder-decoder."""

    def __init__(self, config: TransformerConfig, encoder: bool = False):
        super().__init__()
        self.config, self.causal = config, config.causal and not encoder
        num_layers = config.num_encoder_layers if encoder else config.num_hidden_layers
        self.layers = nn.ModuleList(Layer(config, index, encoder) for index in range(num_layers))
        outside = config.norm_placement in ("pre", "sandwich")  # the sum of the branches is normed nowhere else
        self.norm = make_norm(config, config.hidden_size) if outside else nn.Identity()
        relative = config.positions == "relative"
        self.relative = nn.Embedding(NUM_BUCKETS, config.num_attention_heads) if relative else None

    def forward(
        self, x: Tensor, positions: Tensor, mask: Mask, cache=None, source=None, source_mask=None, *, ask=(False, False)
    ) -> StackOutput:
        """x: [B, T, D], embeddings. positions: [B or 1, T]. source, source_mask: what a decoder reads of its encoder.
        cache: of transformers. ask: whether attention weights and hidden states are to be returned."""
        weights = ([], []) if ask[0] else (None, None)
        states = []
        rotary = self.config.positions == "rotary"
        turn = rotation(positions, self.config.head_dim, self.config.rope_theta) if rotary else None
        for layer in self.layers:
            states += [x] if ask[1] else []
            x = layer(x, mask, turn, source, source_mask, weights, past_key_values=cache)
        x = self.norm(x)
        return StackOutput(
            last_hidden_state=x,
            past_key_values=cache,
            hidden_states=(*states, x) if ask[1] else None,
            attentions=tuple(weights[0]) if ask[0] else None,
            cross_attentions=tuple(weights[1]) if ask[0] and source is not None else None,
        )

    def mask(self, x: Tensor, past: int, attention_mask=None, document_ids=None, prefix_lengths=None) -> Mask:
        """Who sees whom among x [B, T, D] and `past` tokens before it, with the positions' own bias.

        attention_mask: [B, past + T], True at tokens. document_ids: [B, T]; no token sees another document.
        prefix_lengths: [B]; the first so many tokens see each other and are seen by all.
        """
        length = x.shape[1]
        total = past + length
        rows = torch.arange(past, total, device=x.device)[:, None]
        columns = torch.arange(total, device=x.device)
        bias = self._bias(columns - rows)
        if attention_mask is document_ids is prefix_lengths is bias is None and (not past or length == 1):
            return Mask(causal=self.causal and length > 1)
        seen = columns <= rows if self.causal else torch.ones_like(columns <= rows)
        seen = seen[None]
        if prefix_lengths is not None:
            seen = seen | (columns < prefix_lengths[:, None, None])
        if document_ids is not None:
            seen = seen & (document_ids[:, :, None] == document_ids[:, None, :])
        if attention_mask is not None:
            # What padding sees is nobody's business, but of nothing the softmax is not a number.
            seen = (seen & attention_mask[:, None, :].bool()) | (columns == rows)
        if bias is None:
            return Mask(seen[:, None])
        return Mask(bias.float().masked_fill(~seen[:, None], -torch.inf))

    def _bias(self, distances: Tensor) -> Tensor | None:
        """[H, T, S], added to the scores, from the places of keys less those of queries [T, S]."""
        if self.relative is not None:
            return self.relative(relative_buckets(distances, bidirectional=not self.causal)).permute(2, 0, 1)
        if self.config.positions == "alibi":
            slopes = torch.tensor(alibi_slopes(self.config.num_attention_heads), device=distances.device)
            return -slopes[:, None, None] * distances.abs()
        return None


class TransformerPreTrainedModel(PreTrainedModel):
    config_class = TransformerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["Layer"]
    _supports_sdpa = True

    def _init_weights(self, module: nn.Module) -> None:
        if self.config.norm_placement == "deep" and hasattr(module, "gain"):
            init.xavier_normal_(module.weight, gain=module.gain)
            if module.bias is not None:
                init.zeros_(module.bias)
        else:
            super()._init_weights(module)


class Embedded(TransformerPreTrainedModel):
    """A model that begins with embeddings of tokens, and of positions where these are learned."""

    def __init__(self, config: TransformerConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        learned = config.positions == "learned"
        self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size) if learned else None

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Embeddings [B, T, D] of ids [B, T], or of embeddings that are there already, at positions [B or 1, T]."""
        x = tokens if tokens.is_floating_point() else self.embed_tokens(tokens)
        if self.config.scale_embedding:
            x = x * self.config.hidden_size**0.5
        if self.embed_positions is not None:
            return x + self.embed_positions(positions)
        if self.config.positions == "sinusoidal":
            return x + sinusoids(positions, self.config.hidden_size).to(x.dtype)
        return x


class TransformerModel(Embedded):
    """A stack over embeddings: a decoder, or where nothing is causal an encoder. Returns hidden states [B, T, D]."""

    def __init__(self, config: TransformerConfig):
        super().__init__(config)
        self.decoder = Stack(config)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        document_ids: Tensor | None = None,
        prefix_lengths: Tensor | None = None,
        **_: Any,
    ) -> StackOutput:
        """input_ids: [B, T]. attention_mask: [B, past + T], 0 at padding, on either side; what a token gets does not
        depend on it. document_ids, prefix_lengths: see `Stack.mask`; for training, without a cache."""
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        if position_ids is None:
            position_ids = positions_of(tokens, past, attention_mask, document_ids)
        x = self.embed(tokens, position_ids)
        mask = self.decoder.mask(x, past, attention_mask, document_ids, prefix_lengths)
        ask = (
            output_attentions or self.config.output_attentions,
            output_hidden_states or self.config.output_hidden_states,
        )
        return self.decoder(x, position_ids, mask, past_key_values, ask=ask)


class TransformerForMaskedLM(WithOutputLayer, TransformerPreTrainedModel):
    """An encoder and its output layer, which names the token at each place from those around it."""


class TransformerForCausalLM(WithOutputLayer, TransformerPreTrainedModel, GenerationMixin):
    """A decoder and its output layer, which names the next token."""

    def __init__(self, config: TransformerConfig):
        check_causal(config, "go on with a text")
        super().__init__(config)


class TransformerForSequenceClassification(GenericForSequenceClassification, TransformerPreTrainedModel):
    """A decoder and a linear layer `score`."""

    def __init__(self, config: TransformerConfig):
        check_causal(config, "score each beginning of a text")
        super().__init__(config)


def check_causal(config: TransformerConfig, what: str) -> None:
    """BadInput for an encoder, alone or with a decoder."""
    if config.is_encoder_decoder or not config.causal:
        found = "an encoder and a decoder" if config.is_encoder_decoder else "an encoder, whose tokens see later ones"
        raise BadInput(
            f"this model is {found}: it cannot {what}. Pretrain one with --model.block.causal true and "
            "--model.block.num_encoder_layers 0."
        )


AutoConfig.register(TransformerConfig.model_type, TransformerConfig)
AutoModel.register(TransformerConfig, TransformerModel)
AutoModelForMaskedLM.register(TransformerConfig, TransformerForMaskedLM)
AutoModelForCausalLM.register(TransformerConfig, TransformerForCausalLM)
AutoModelForSequenceClassification.register(TransformerConfig, TransformerForSequenceClassification)
