"""A model directory as one GGUF file, which llama.cpp and what is built on it run.

llama.cpp's own converter knows a tokenizer by a hash of its ids for one text, so it refuses every tokenizer somebody
trained. Here the split expression itself is looked up: it names the same pre-tokenizer in llama.cpp. What llama.cpp
would cut or compute in another way is refused.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lmkit.errors import BadInput
from lmkit.models.load import load_language_model
from lmkit.tokenization.byte_level import SPLITS, capped
from lmkit.tokenization.chat import stop_token_ids

DataType = Literal["f32", "f16", "bf16", "q8_0"]
ARCHITECTURES = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen3": gguf.MODEL_ARCH.QWEN3}
# llama.cpp's name of each split expression it has; it has none that equals "gpt4".
PRE_TOKENIZERS = {"qwen2": "qwen2", "llama3": "llama-bpe", "gpt2": "gpt-2"}
FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}


def write_gguf(model_dir: Path, file: Path, dtype: DataType = "f32") -> list[str]:
    """Writes the model and tokenizer of a directory to `file`; returns what differs in the reader, as sentences.

    dtype: of the matrices; "f32" is exact, "q8_0" has 8 bits and a scale for every 32 weights. Vectors stay float32.

    Raises BadInput for a model other than Llama or Qwen3, for options of these that llama.cpp does not read, and for a
    tokenizer whose ids llama.cpp would not reproduce. The file appears whole or not at all.
    """
    model, tokenizer = load_language_model(model_dir)
    config = model.config
    if config.model_type not in ARCHITECTURES:
        raise BadInput(
            f"{model_dir} is a {config.model_type} model; GGUF export knows {' and '.join(ARCHITECTURES)}. Pretrain "
            "with --model.arch qwen3 or llama."
        )
    writer = gguf.GGUFWriter(None, config.model_type)
    writer.add_name(Path(model_dir).resolve().name)
    writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[dtype]])
    _add_sizes(writer, config, model_dir)
    notes = _add_tokenizer(writer, tokenizer, config.vocab_size, model_dir)
    _add_tensors(writer, model, dtype, model_dir)
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f".{file.name}.unfinished")
    try:
        writer.write_header_to_file(unfinished)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(unfinished, file)
    finally:
        unfinished.unlink(missing_ok=True)
    return notes


def _add_sizes(writer: gguf.GGUFWriter, config: Any, model_dir: Path) -> None:
    unread = {
        "rope_parameters.rope_type": (config.rope_parameters["rope_type"], "default"),
        "hidden_act": (config.hidden_act, "silu"),
        "attention_bias": (config.attention_bias, False),
        "mlp_bias": (getattr(config, "mlp_bias", False), False),
        "use_sliding_window": (getattr(config, "use_sliding_window", False), False),
    }
    if wrong := [f"{key} {found!r} (wanted {wanted!r})" for key, (found, wanted) in unread.items() if found != wanted]:
        raise BadInput(f"{model_dir / 'config.json'} has {', '.join(wrong)}, which GGUF export does not write.")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _add_tensors(writer: gguf.GGUFWriter, model: PreTrainedModel, dtype: DataType, model_dir: Path) -> None:
    config = model.config
    names = gguf.get_tensor_name_map(ARCHITECTURES[config.model_type], config.num_hidden_layers)
    matrix_type = gguf.GGMLQuantizationType[dtype.upper()]
    for name, tensor in model.state_dict().items():
        if config.tie_word_embeddings and name == "lm_head.weight":
            continue
        array = tensor.numpy()
        # llama.cpp's Llama rotates neighbouring pairs of a head, transformers its two halves.
        if config.model_type == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            halves = array.reshape(-1, 2, config.head_dim // 2, array.shape[1])
            array = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(array.shape)
        quantized = matrix_type if array.ndim > 1 else gguf.GGMLQuantizationType.F32
        try:
            data = gguf.quantize(array, quantized)
        except gguf.quants.QuantError:
            raise BadInput(
                f"{name} of {model_dir} has rows of {array.shape[1]} weights, and q8_0 takes blocks of 32. "
                "Export with --dtype f16."
            ) from None
        writer.add_tensor(names.get_name(name, (".weight",)), data, raw_dtype=quantized)


def _add_tokenizer(
    writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase, vocab_size: int, model_dir: Path
) -> list[str]:
    backend = tokenizer.backend_tokenizer
    spec = json.loads(backend.to_str())
    pre = _pre_tokenizer(spec, model_dir)
    added = tokenizer.added_tokens_decoder
    # llama.cpp looks a whole word up before it merges where the split is llama3's, and merges at once elsewhere.
    if spec["model"].get("ignore_merges", False) != (pre == "llama-bpe"):
        words = [token for token, i in spec["model"]["vocab"].items() if i not in added]
        if unreached := [word for word in words if len(backend.model.tokenize(word)) != 1]:
            raise BadInput(
                f"The merges of {model_dir}'s tokenizer do not reach its tokens {', '.join(unreached[:3])}, which "
                f"llama.cpp would find otherwise with the pre-tokenizer {pre}. Train it with another --split."
            )
    # Rows of the embedding without a token get a name nobody types.
    tokens, types = [f"[PAD{i}]" for i in range(vocab_size)], [gguf.TokenType.UNUSED] * vocab_size
    for token, i in tokenizer.get_vocab().items():
        tokens[i], types[i] = token, gguf.TokenType.NORMAL
        if i in added:
            types[i] = gguf.TokenType.CONTROL if added[i].special else gguf.TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(pair) for pair in spec["model"]["merges"]])
    end = tokenizer.eos_token_id
    writer.add_bos_token_id(end if tokenizer.bos_token_id is None else tokenizer.bos_token_id)
    writer.add_eos_token_id(end)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_eot_token_id(stop_token_ids(tokenizer)[0])
    writer.add_add_bos_token(False)
    if tokenizer.chat_template:
        # Marks for training, which readers of GGUF do not know.
        writer.add_chat_template(re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", tokenizer.chat_template))
    if spec["normalizer"] is not None:
        return ["The tokenizer normalises text to Unicode NFC, which readers of GGUF do not: give them text in NFC."]
    return []


def _pre_tokenizer(spec: dict[str, Any], model_dir: Path) -> str:
    """llama.cpp's name of what cuts text into words; BadInput when it has none."""
    parts = spec["pre_tokenizer"] or {}
    parts = parts.get("pretokenizers", [parts])
    byte_level = parts[-1].get("type") == "ByteLevel" and not parts[-1]["add_prefix_space"]
    if byte_level and spec["normalizer"] in (None, {"type": "NFC"}):
        if len(parts) == 1 and parts[0]["use_regex"]:
            return PRE_TOKENIZERS["gpt2"]
        expression = parts[0].get("pattern", {}).get("Regex") if len(parts) == 2 else None
        for name, pre in PRE_TOKENIZERS.items():
            if expression in (SPLITS[name], capped(SPLITS[name])):
                return pre
    raise BadInput(
        f"llama.cpp does not cut text as the tokenizer of {model_dir} does. Wanted a byte-level BPE with the split "
        f"{', '.join(PRE_TOKENIZERS)}: train it with `recipes/tokenizer.py --kind bpe --split qwen2`."
    )
