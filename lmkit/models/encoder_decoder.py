"""An encoder that sees a whole text and a decoder that reads it while it writes another (Vaswani et al. 2017).

Shapes: B batch, S tokens of the encoder, T tokens of the decoder, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForSeq2SeqLM, DynamicCache, EncoderDecoderCache, GenerationMixin
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput, Seq2SeqModelOutput
from transformers.modeling_utils import slice_logits_to_keep

from lmkit.models.positions import positions_of
from lmkit.models.transformer import Embedded, Mask, Stack, TransformerConfig, TransformerPreTrainedModel


class Encoder(nn.Module):
    """Ids [B, S] to hidden states [B, S, D], as `generate` calls it; embed: of the model that it is a part of."""

    def __init__(self, config: TransformerConfig, embed: Callable[[Tensor, Tensor], Tensor]):
        super().__init__()
        self.stack, self.embed = Stack(config, encoder=True), embed

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool = True,
    ) -> BaseModelOutput:
        positions = positions_of(input_ids, 0, attention_mask, None)
        x = self.embed(input_ids, positions)
        mask = self.stack.mask(x, 0, attention_mask)
        return self.stack(x, positions, mask, ask=(output_attentions, output_hidden_states))


class EncoderDecoderModel(Embedded):
    """Both stacks over shared embeddings."""

    def __init__(self, config: TransformerConfig):
        super().__init__(config)
        self.encoder = Encoder(config, self.embed)
        self.decoder = Stack(config)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: BaseModelOutput | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **_: Any,
    ) -> Seq2SeqModelOutput:
        """input_ids: [B, S] and decoder_input_ids: [B, T]; their masks are 0 at padding. `last_hidden_state` is the
        decoder's, [B, T, D]."""
        ask = (
            output_attentions or self.config.output_attentions,
            output_hidden_states or self.config.output_hidden_states,
        )
        if encoder_outputs is None:
            encoder_outputs = self.encoder(input_ids, attention_mask, *ask)
        if use_cache and past_key_values is None:
            past_key_values = EncoderDecoderCache(*(DynamicCache(config=self.config) for _ in range(2)))
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        positions = positions_of(decoder_input_ids, past, decoder_attention_mask, None)
        x = self.embed(decoder_input_ids, positions)
        mask = self.decoder.mask(x, past, decoder_attention_mask)
        read = Mask(None if attention_mask is None else attention_mask[:, None, None].bool())
        source = encoder_outputs.last_hidden_state
        outputs = self.decoder(x, positions, mask, past_key_values, source, read, ask=ask)
        return Seq2SeqModelOutput(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=past_key_values,
            decoder_hidden_states=outputs.hidden_states,
            decoder_attentions=outputs.attentions,
            cross_attentions=outputs.cross_attentions,
            encoder_last_hidden_state=source,
            encoder_hidden_states=encoder_outputs.hidden_states,
            encoder_attentions=encoder_outputs.attentions,
        )


class TransformerForSeq2SeqLM(TransformerPreTrainedModel, GenerationMixin):
    """Both stacks and an output layer, which names the decoder's next token."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: TransformerConfig):
        super().__init__(config)
        self.model = EncoderDecoderModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_encoder(self, *_: Any) -> Encoder:
        return self.model.encoder

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: BaseModelOutput | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> Seq2SeqLMOutput:
        """Logits [B, T, V] of the token after each of decoder_input_ids [B, T]; labels are these tokens, [B, T], -100
        where none counts."""
        ids = {"input_ids": input_ids, "decoder_input_ids": decoder_input_ids}
        masks = {"attention_mask": attention_mask, "decoder_attention_mask": decoder_attention_mask}
        seen = {"encoder_outputs": encoder_outputs, "past_key_values": past_key_values, "use_cache": use_cache}
        outputs = self.model(**ids, **masks, **seen, **kwargs)
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten()) if labels is not None else None
        states = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        return Seq2SeqLMOutput(loss=loss, logits=logits, **states)


AutoModelForSeq2SeqLM.register(TransformerConfig, TransformerForSeq2SeqLM)
