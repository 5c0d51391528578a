"""What the models of this package share: an output layer on a backbone that AutoModel knows, and its loss."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM, PreTrainedConfig
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep


def auto_class(config: PreTrainedConfig) -> type:
    """The Auto class of a language model: causal, but for a configurable Transformer with an encoder."""
    if config.model_type != "lmkit_transformer":
        return AutoModelForCausalLM
    alone = AutoModelForCausalLM if config.causal else AutoModelForMaskedLM
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else alone


class WithOutputLayer:
    """Mixed in before a family's base class: `model`, the backbone, and `lm_head`, a linear layer without bias.

    The weights are the embedding's where `config.tie_word_embeddings`.
    """

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: Any):
        super().__init__(config)
        self.model = AutoModel.from_config(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, T, V] of `input_ids` [B, T], of the last `logits_to_keep` alone if that is not 0."""
        inputs = {"attention_mask": attention_mask, "position_ids": position_ids, "inputs_embeds": inputs_embeds}
        outputs = self.model(input_ids, past_key_values=past_key_values, use_cache=use_cache, **inputs, **kwargs)
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
