"""Model sizes, as configurations of stock transformers classes or of lmkit's own.

preset  parameters*  layers  width  heads x size  for
nano         0.1 M        2     64        2 x 32  tests
tiny         1.0 M        4    128        4 x 32  minutes on a CPU
small        110 M       12    768       6 x 128  one GPU
base         0.5 B       24   1280      10 x 128  several
* with qwen3 and vocabularies of 512, 1024, 32768 and 32768; the embedding is shared with the output.

Or one dial: `depth` layers of width 64 x depth with heads of 128, as nanochat scales (github.com/karpathy/nanochat,
scripts/base_train.py); `lmkit.training.dial` sets batch, learning rate and length of the training from it.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import field_validator, model_validator

from lmkit.config import Config, setting

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_SIZES = ("num_hidden_layers", "hidden_size", "head_dim", "intermediate_size", "context_length")
PRESETS = {
    "nano": dict(zip(_SIZES, (2, 64, 32, 128, 128))),
    "tiny": dict(zip(_SIZES, (4, 128, 32, 384, 256))),
    "small": dict(zip(_SIZES, (12, 768, 128, 2048, 1024))),
    "base": dict(zip(_SIZES, (24, 1280, 128, 3456, 2048))),
}
_MULTIPLE = 128  # of every dimension that the dial sets: what matrix units like
# The module of lmkit.models whose `configuration(ModelConfig, shared)` describes an arch that is no stock class.
OWN = {"transformer": "transformer", "neural_ngram": "neural_ngram"}
OWN |= dict.fromkeys(("rnn", "lstm", "gru", "elmo"), "recurrent")
_GATES = {"rnn": 1, "gru": 3, "lstm": 4, "elmo": 8}  # matrices of a recurrent layer, for its input and for its state
# The layers whose output is added to the residual stream.
_RESIDUAL_OUTPUT = re.compile(r"(o_proj|down_proj|c_proj)\.weight$")
_POSITIONS = re.compile(r"(wpe|embed_positions)\.weight$")


class BlockConfig(Config):
    """The parts of arch transformer; the defaults make a qwen3."""

    norm_placement: Literal["pre", "post", "deep", "sandwich"] = setting("pre", "where norms stand in a layer")
    norm: Literal["rmsnorm", "layernorm"] = setting("rmsnorm", "the norm")
    qk_norm: bool = setting(True, "norm queries and keys of each head")
    positions: Literal["none", "learned", "sinusoidal", "rotary", "alibi", "relative"] = setting(
        "rotary", "how a token knows its place: added to embeddings (learned, sinusoidal) or in attention"
    )
    num_key_value_heads: int | None = setting(None, "heads of keys and values, each for several queries", gt=0)
    activation: Literal["swiglu", "gelu", "relu", "relu2"] = setting("swiglu", "inside the feed-forward layers")
    bias: bool = setting(False, "biases in all linear layers but the output")
    tie_word_embeddings: bool = setting(True, "the output layer is the embedding")
    num_encoder_layers: int = setting(0, "layers of an encoder that the num_hidden_layers of the decoder read", ge=0)
    causal: bool = setting(True, "no token sees a later one; false: an encoder alone, for objective masked")

    @model_validator(mode="after")
    def _parts_fit(self) -> BlockConfig:
        if self.num_encoder_layers and self.positions == "alibi":
            raise ValueError(
                "positions: alibi penalises distance, and between an encoder's token and a decoder's there is none. "
                "Use relative, whose cross-attention has no positions, or num_encoder_layers 0"
            )
        if self.num_encoder_layers and not self.causal:
            raise ValueError("causal: the decoder of an encoder is causal. Leave it true, or use num_encoder_layers 0")
        return self


class ModelConfig(Config):
    """A size and an architecture; a size left empty is the preset's."""

    preset: Literal["nano", "tiny", "small", "base"] = setting("tiny", "sizes to start from")
    depth: int | None = setting(None, "instead of a preset: layers, from which all sizes and the training follow", gt=0)
    arch: Literal["qwen3", "llama", "gpt2", "transformer", "rnn", "lstm", "gru", "elmo", "neural_ngram"] = setting(
        "qwen3", "architecture: a stock transformers class (the first three) or one of lmkit's own"
    )
    context_length: int | None = setting(None, "longest sequence in tokens", ge=2)
    num_hidden_layers: int | None = setting(None, "number of layers", gt=0)
    hidden_size: int | None = setting(None, "width", gt=0)
    head_dim: int | None = setting(None, "width of one attention head; the width must be a multiple", gt=0)
    intermediate_size: int | None = setting(None, "width inside the feed-forward layers", gt=0)
    init_std: float | None = setting(None, "standard deviation of the initial weights; empty: by width", gt=0)
    block: BlockConfig = setting(BlockConfig(), "the parts of arch transformer")
    bptt_tokens: int | None = setting(
        None, "tokens a gradient goes back in arch rnn, lstm, gru and elmo, whose state goes on; empty: the block", gt=0
    )
    window: int | None = setting(None, "tokens that arch neural_ngram sees; empty: 8", gt=0)

    @field_validator("arch", mode="before")
    @classmethod
    def _is_trained_to_write(cls, arch: Any) -> Any:
        if arch in ("cbow", "skipgram"):
            raise ValueError(
                f"{arch} makes word vectors, which predict no next token. Train them with "
                f"`python recipes/embeddings.py --objective {arch}`; every arch can start from them by --embeddings, "
                "the nearest is --model.arch neural_ngram"
            )
        if arch == "ngram":
            raise ValueError(
                "ngram is counted, not trained: every pretraining reports the orders in --ngram_orders. The nearest "
                "that is trained is --model.arch neural_ngram"
            )
        return arch

    @model_validator(mode="after")
    def _heads_fill_the_width(self) -> ModelConfig:
        sizes = self.sizes()
        if sizes["hidden_size"] % sizes["head_dim"] and not self._headless:
            raise ValueError(f"hidden_size {sizes['hidden_size']} is not a multiple of head_dim {sizes['head_dim']}")
        heads, shared = sizes["hidden_size"] // sizes["head_dim"], self.block.num_key_value_heads
        if shared and heads % shared:
            raise ValueError(f"block.num_key_value_heads {shared} does not divide the {heads} heads")
        odd = {"rotary": "head_dim", "sinusoidal": "hidden_size"}.get(self.block.positions)
        if self.arch == "transformer" and odd and sizes[odd] % 2:
            raise ValueError(f"{odd} {sizes[odd]}: {self.block.positions} positions go in pairs. Make it even")
        return self

    @model_validator(mode="after")
    def _no_setting_is_idle(self) -> ModelConfig:
        if self.arch != "transformer" and self.block != BlockConfig():
            raise ValueError(f"block: arch {self.arch} has parts of its own. Use --model.arch transformer")
        if self.arch not in _GATES and self.bptt_tokens:
            raise ValueError(f"bptt_tokens: arch {self.arch} carries no state. Use --model.arch lstm")
        if self.arch != "neural_ngram" and self.window:
            raise ValueError(f"window: arch {self.arch} sees the whole context. Use --model.arch neural_ngram")
        if self.init_std is not None and (self.arch in _GATES or self.block.norm_placement == "deep"):
            what = f"arch {self.arch}" if self.arch in _GATES else "block.norm_placement deep"
            raise ValueError(f"init_std: {what} draws its layers by a rule of its own, from their sizes. Leave it out")
        context = self.sizes()["context_length"]
        for name in ("bptt_tokens", "window"):
            if (getattr(self, name) or 0) > context:
                what = f"{name} {getattr(self, name)}: a block has {context} tokens"
                raise ValueError(f"{what}. Use at most as many, or a longer model.context_length")
        unused = {"depth": "layers grow by rules for Transformers", "head_dim": "there are no heads"}
        if self.arch in _GATES:
            unused["intermediate_size"] = "there are no feed-forward layers"
        elif self.arch == "neural_ngram":
            unused |= dict.fromkeys(("num_hidden_layers", "intermediate_size"), "there is one layer, of hidden_size,")
        for name, why in unused.items():
            if self._headless and getattr(self, name) is not None:
                raise ValueError(f"{name}: {why} in arch {self.arch}. Leave it out, or use --model.arch transformer")
        return self

    def sizes(self) -> dict[str, Any]:
        """The preset's sizes, or those of the depth, with the given ones on top."""
        base = PRESETS[self.preset] if self.depth is None else by_depth(self.depth)
        return base | {key: value for key in _SIZES if (value := getattr(self, key)) is not None}

    def chosen(self) -> list[str]:
        """Names of what is set beside the length of a block and the preset that it comes from."""
        own, default = self.model_dump(exclude={"preset", "context_length"}), type(self)().model_dump()
        return [f"model.{name}" for name, value in own.items() if value != default[name]]

    def num_matrix_weights(self, vocab_size: int) -> int:
        """Weights of the layers' matrices and of the output layer: what scaling laws count."""
        sizes = self.sizes()
        width, inner = sizes["hidden_size"], sizes["intermediate_size"]
        a_layer = 4 * width + self._matrices_inside * inner
        if self.arch in _GATES:
            a_layer = 2 * _GATES[self.arch] * width
        elif self.arch == "neural_ngram":
            return width * width * (self.window or 8) + vocab_size * width
        return sizes["num_hidden_layers"] * width * a_layer + vocab_size * width

    @property
    def _matrices_inside(self) -> int:
        """Matrices of a feed-forward layer: one more where it is gated."""
        gated = self.block.activation == "swiglu" if self.arch == "transformer" else self.arch != "gpt2"
        return 3 if gated else 2

    @property
    def _headless(self) -> bool:
        return self.arch in _GATES or self.arch == "neural_ngram"


def by_depth(depth: int) -> dict[str, int]:
    """Sizes of a model of `depth` layers: width 64 a layer, feed-forward 8/3 as wide, both rounded up to 128.

    >>> by_depth(12)["hidden_size"], by_depth(12)["intermediate_size"], by_depth(3)["hidden_size"]
    (768, 2048, 256)
    """
    width = -(-64 * depth // _MULTIPLE) * _MULTIPLE
    inner = -(-8 * width // 3 // _MULTIPLE) * _MULTIPLE
    return dict(zip(_SIZES, (depth, width, 128, inner, 2048)))


def transformers_config(config: ModelConfig, vocab_size: int, **token_ids: Any) -> Any:
    """The transformers configuration of a model; token_ids: pad_token_id, eos_token_id."""
    from transformers import GPT2Config, LlamaConfig, Qwen3Config

    sizes = config.sizes()
    width, depth = sizes["hidden_size"], sizes["num_hidden_layers"]
    heads, context = width // sizes["head_dim"], sizes["context_length"]
    shared = {"vocab_size": vocab_size, "tie_word_embeddings": True, "bos_token_id": None, **token_ids}
    if config.arch in OWN:
        result = importlib.import_module(f"lmkit.models.{OWN[config.arch]}").configuration(config, shared)
    elif config.arch == "gpt2":
        shared |= {"n_embd": width, "n_layer": depth, "n_head": heads, "n_positions": context}
        shared |= {"n_inner": sizes["intermediate_size"], "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
        result = GPT2Config(**shared)
    else:
        shared |= {"hidden_size": width, "num_hidden_layers": depth, "intermediate_size": sizes["intermediate_size"]}
        shared |= {"num_attention_heads": heads, "num_key_value_heads": heads, "head_dim": sizes["head_dim"]}
        result = {"qwen3": Qwen3Config, "llama": LlamaConfig}[config.arch](max_position_embeddings=context, **shared)
    # 0.02 keeps a model of width 128 from ever learning to copy from its context; 1/sqrt(width) does not.
    result.initializer_range = config.init_std or (width**-0.5 if config.num_matrix_weights(0) < 30e6 else 0.02)
    return result


def build_model(
    config: ModelConfig, tokenizer: PreTrainedTokenizerBase, embeddings: Path | None = None
) -> PreTrainedModel:
    """A fresh model, initialised by torch's generator, with the vocabulary, pad and stop tokens of the tokenizer.

    embeddings: a folder of word vectors that its tokens start from (`lmkit.models.embeddings`).

    A causal language model, or what `block` makes of it: AutoModelForSeq2SeqLM or AutoModelForMaskedLM load it then.
    """
    import torch
    from transformers import GenerationConfig

    from lmkit.models.language_model import auto_class
    from lmkit.tokenization.chat import stop_token_ids

    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    described = transformers_config(config, len(tokenizer), **ids)
    model = auto_class(described).from_config(described)
    depth = config.sizes()["num_hidden_layers"]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if _RESIDUAL_OUTPUT.search(name) and config.block.norm_placement == "pre":
                # 2 L branches are summed: the residual stream keeps its scale (Radford et al., GPT-2, 2019).
                parameter.mul_((2 * depth) ** -0.5)
        # The embedding is the output layer too: with a larger one the first predictions are wrong and sure of it.
        # Beside learned positions of a larger scale the tokens would be lost.
        weights = {model.get_input_embeddings().weight, model.get_output_embeddings().weight}
        weights |= {weight for name, weight in model.named_parameters() if _POSITIONS.search(name)}
        for weight in weights:
            weight.mul_(min(1.0, 0.02 / model.config.initializer_range))
    if embeddings is not None:
        from lmkit.models.embeddings import start_from

        start_from(model, embeddings, tokenizer)
    model.generation_config = GenerationConfig(
        pad_token_id=tokenizer.pad_token_id, eos_token_id=stop_token_ids(tokenizer), do_sample=True
    )
    return model
