"""Recurrent language models: RNN, LSTM and GRU, and the two directions of ELMo.

    h[t], c[t] = cell(x[t], h[t-1], c[t-1])        p(w[t+1] | w[..t]) = softmax(U h[t])

What is carried from token to token is a state of fixed size: it is the cache of generation, and there is no longest
sequence. Padding is skipped: the state after it is the state before it. Gradients go back `bptt_tokens` tokens while
the state goes on (truncated backpropagation through time, Williams and Peng 1990). U is the table of embeddings.

Shapes: B batch, T tokens, D width, L layers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Cache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.cache_utils import DynamicLayer
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.modeling_outputs import BaseModelOutputWithPast

from lmkit.errors import BadInput
from lmkit.models.language_model import WithOutputLayer

if TYPE_CHECKING:
    from lmkit.models.presets import ModelConfig

CELLS = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}


class RecurrentConfig(PreTrainedConfig):
    """cell: rnn (tanh), gru or lstm. bidirectional: a second stack of LSTMs that reads from the end, ELMo's."""

    model_type = "lmkit_recurrent"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    vocab_size: int = 1024
    hidden_size: int = 128
    num_hidden_layers: int = 2
    cell: str = "lstm"
    bidirectional: bool = False
    bptt_tokens: int | None = None
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None


def configuration(config: ModelConfig, shared: dict[str, Any]) -> RecurrentConfig:
    """The configuration of arch rnn, lstm, gru and elmo; shared: vocabulary and token ids."""
    sizes = {name: config.sizes()[name] for name in ("hidden_size", "num_hidden_layers")}
    kind = {"cell": "lstm", "bidirectional": True} if config.arch == "elmo" else {"cell": config.arch}
    return RecurrentConfig(**shared, **sizes, **kind, bptt_tokens=config.bptt_tokens)


class State(DynamicLayer):
    """A recurrent layer's state in the place of keys and values: hidden [B, D], and the cell [B, D] of an LSTM."""

    is_croppable = False
    cumulative_length = 0

    def set(self, state: list[Tensor], num_tokens: int) -> None:
        self.keys, self.values = state
        self.is_initialized = True
        self.cumulative_length += num_tokens

    def get_seq_length(self) -> int:
        """Tokens read, padding included."""
        return self.cumulative_length


class RecurrentPreTrainedModel(PreTrainedModel):
    config_class = RecurrentConfig
    base_model_prefix = "model"
    _supports_sdpa = True  # there is no attention to choose; stages choose one for every model
    _is_stateful = True

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def _init_weights(self, module: nn.Module) -> None:
        if not isinstance(module, nn.RNNBase):
            return super()._init_weights(module)
        bound = self.config.hidden_size**-0.5
        for name, parameter in module.named_parameters():
            if "weight" in name:
                init.uniform_(parameter, -bound, bound)
            else:
                init.zeros_(parameter)
        if isinstance(module, nn.LSTM) and not getattr(module.bias_hh_l0, "_is_hf_initialized", False):
            # A gate that starts open lets gradients through time (Jozefowicz et al. 2015).
            with torch.no_grad():
                module.bias_hh_l0.chunk(4)[1].fill_(1.0)


class RecurrentModel(RecurrentPreTrainedModel):
    """Tokens to hidden states [B, T, D]."""

    def __init__(self, config: RecurrentConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        stack = lambda: nn.ModuleList(  # noqa: E731
            CELLS[config.cell](config.hidden_size, config.hidden_size, batch_first=True)
            for _ in range(config.num_hidden_layers)
        )
        self.layers, self.backward_layers = stack(), stack() if config.bidirectional else None
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        backward_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        **_: Any,
    ) -> BaseModelOutputWithPast:
        """input_ids: [B, T]. attention_mask: [B, T] or [B, seen + T], 0 at padding, which may stand anywhere.

        backward_ids: [B, T'], tokens as the second stack of a bidirectional model reads them, the last one of the text
        first; its hidden states follow the others along T. Raises BadInput for document_ids.
        """
        if document_ids is not None:
            raise BadInput("document_mask: a state goes on from one document to the next. Use packing pad.")
        x = self._embed(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = Cache(layers=[State() for _ in self.layers])
        mask = None if attention_mask is None else attention_mask[:, -x.shape[1] :].bool()
        states = self._read(self.layers, x, mask, past_key_values)
        last = states[-1]
        if backward_ids is not None:
            last = torch.cat([last, self._read(self.backward_layers, self._embed(backward_ids))[-1]], dim=1)
        return BaseModelOutputWithPast(
            last_hidden_state=last,
            past_key_values=past_key_values,
            hidden_states=tuple(states) if output_hidden_states else None,
        )

    @torch.no_grad()
    def contextual(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """All layers of a bidirectional model at each token, both directions side by side: [L + 1, B, T, 2 D].

        The first are the token's own embeddings, twice (Peters et al. 2018, arXiv:1802.05365, 3.2). 0 at padding.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        x, back = self._embed(input_ids), reversed_order(mask.bool())
        ahead = self._read(self.layers, x, mask.bool())
        behind = self._read(self.backward_layers, _take(x, back))
        both = [torch.cat([a, _take(b, back.argsort(1))], dim=-1) for a, b in zip(ahead, behind)]
        return torch.stack(both) * mask[None, :, :, None]

    def _embed(self, ids: Tensor) -> Tensor:
        # Embeddings that are also the output layer are small (see `build_model`), and cells want inputs near 1.
        return self.embed_tokens(ids) * self.config.hidden_size**0.5

    def _read(
        self, layers: nn.ModuleList, x: Tensor, mask: Tensor | None = None, cache: Cache | None = None
    ) -> list[Tensor]:
        """x [B, T, D] and what each layer makes of it, from the state in the cache, which is set to the last one."""
        order = lengths = None
        if mask is not None and not mask.all():
            order, lengths = (~mask).long().argsort(dim=1, stable=True), mask.sum(1)  # tokens first, in order
            x = _take(x, order)
        states = [x]
        for index, layer in enumerate(layers):
            held = None if cache is None else cache.layers[index]
            out = self._run(layer, states[-1], held, lengths)
            # ELMo's layers are added to what they read, but for the first.
            states.append(out + states[-1] if index and self.config.bidirectional else out)
        return states if order is None else [_take(state, order.argsort(1)) for state in states]

    def _run(self, layer: nn.RNNBase, x: Tensor, held: State | None, lengths: Tensor | None) -> Tensor:
        """One layer over x [B, T, D] whose rows begin with `lengths` tokens, all of them where it is None."""
        state = (held.keys[None], held.values[None]) if held is not None and held.is_initialized else None
        if held is not None and lengths is not None:
            # A packed row ends with its last token, so the state after it is not that after its padding.
            packed = pack_padded_sequence(x, lengths.clamp(min=1).cpu(), batch_first=True, enforce_sorted=False)
            out, after = _call(layer, packed, state)
            before = state or tuple(torch.zeros_like(part) for part in after)
            moved = (lengths > 0)[:, None]
            held.set([torch.where(moved, new, old)[0] for new, old in zip(after, before)], x.shape[1])
            return pad_packed_sequence(out, batch_first=True, total_length=x.shape[1])[0]
        outputs = []
        for part in x.split(self.config.bptt_tokens or x.shape[1], dim=1):
            out, state = _call(layer, part, state and [part.detach() for part in state])
            outputs.append(out)
        if held is not None:
            held.set([part[0] for part in state], x.shape[1])
        return torch.cat(outputs, dim=1)


class LayerMix(nn.Module):
    """gamma sum_j s_j h_j, s = softmax(weights): how a task sees the layers of ELMo, learnt with it (equation 1)."""

    def __init__(self, num_layers: int):
        super().__init__()
        self.weights, self.gamma = nn.Parameter(torch.zeros(num_layers + 1)), nn.Parameter(torch.ones(()))

    def forward(self, layers: Tensor) -> Tensor:
        """[L + 1, ...], as `RecurrentModel.contextual` gives them, to [...]."""
        return self.gamma * torch.tensordot(self.weights.softmax(0), layers, dims=1)


class RecurrentForCausalLM(WithOutputLayer, RecurrentPreTrainedModel, GenerationMixin):
    """The language model; of a bidirectional one the direction that writes."""


class RecurrentForSequenceClassification(GenericForSequenceClassification, RecurrentPreTrainedModel):
    """Reward and value models."""


def reversed_order(mask: Tensor) -> Tensor:
    """Places [B, T] at which a row's tokens are read backwards, those of its padding after them; mask: bool [B, T].

    >>> reversed_order(torch.tensor([[False, True, True, True], [True, True, False, False]])).tolist()
    [[3, 2, 1, 0], [1, 0, 2, 3]]
    """
    places = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    return torch.where(mask, -places, places + 1).argsort(dim=1, stable=True)


def _call(layer: nn.RNNBase, x: Any, state: Any) -> tuple[Any, tuple[Tensor, Tensor]]:
    """A layer's outputs and its state, as a pair also where it is one tensor."""
    if isinstance(layer, nn.LSTM):
        return layer(x, state and tuple(state))
    out, after = layer(x, state and state[0])
    return out, (after, after)


def _take(x: Tensor, places: Tensor) -> Tensor:
    """Rows of x [B, T, D] in the order of places [B, T]."""
    return x.gather(1, places[..., None].expand_as(x))


AutoConfig.register(RecurrentConfig.model_type, RecurrentConfig)
AutoModel.register(RecurrentConfig, RecurrentModel)
AutoModelForCausalLM.register(RecurrentConfig, RecurrentForCausalLM)
AutoModelForSequenceClassification.register(RecurrentConfig, RecurrentForSequenceClassification)
