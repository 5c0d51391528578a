"""The model that pretraining starts from when it is not a fresh one: a directory, or a name on the Hub."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path

import torch
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from lmkit.errors import BadInput
from lmkit.models.language_model import auto_class
from lmkit.models.load import loading
from lmkit.tokenization.chat import stop_token_ids
from lmkit.tokenization.read import read_tokenizer

_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
_ROWS = 128  # embeddings grow to a multiple of this


def local_folder(source: str) -> Path:
    """The folder of a model: a path as it is; `hub:org/name[@revision]` asked of the Hub, or found in its cache."""
    if not source.startswith("hub:"):
        return Path(source)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    match = re.fullmatch(r"hub:(\w[\w.-]*(?:/\w[\w.-]*)?)(?:@([\w.-]+))?", source)
    if match is None:
        raise BadInput(f"{source} is not a model's hub name. Write hub:org/name or hub:org/name@revision.")
    try:
        return Path(snapshot_download(match[1], revision=match[2], allow_patterns=_FILES))
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = str(error).strip().split("\n")[0]
        raise BadInput(f"{source} could not be fetched from the Hub: {reason} Check name and network.") from None


def load_to_continue(source: str, tokenizer: PreTrainedTokenizerBase, context_length: int) -> PreTrainedModel:
    """The language model to go on training on blocks of ids of `tokenizer`, in float32 on the CPU.

    The model's own tokenizer must give text the same ids. `tokenizer` may have more special tokens (a pad token, chat
    turns): where the model has no embedding for them, it grows. Raises BadInput with the reason where the two differ.
    """
    path = local_folder(source)
    if not (path / "config.json").is_file():
        raise BadInput(f"{source} is not a model directory: it has no config.json. Give what save_pretrained wrote.")
    with loading(source, "language model"):
        own = read_tokenizer(path)
        kind = auto_class(AutoConfig.from_pretrained(path, local_files_only=True))
        model = kind.from_pretrained(path, dtype=torch.float32, local_files_only=True)
    if why := difference(own, tokenizer):
        raise BadInput(
            f"The tokenizer of {source} {why} the one the shards were made with. Encode the corpus with the model's: "
            f"`python recipes/tokenizer.py --tokenizer {path} --corpus ...`."
        )
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        raise BadInput(
            f"{source} holds a {type(model).__name__}, which takes no past_key_values: lmkit could not sample from it, "
            "in this stage or a later one. Start from another model."
        )
    positions = getattr(model.config, "max_position_embeddings", context_length)
    if context_length > positions:
        raise BadInput(
            f"model.context_length {context_length} is more than the {positions} positions of {source}. Lower it."
        )
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=_ROWS)
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    model.config.update(ids)
    if model.can_generate():
        model.generation_config.update(**(ids | {"eos_token_id": stop_token_ids(tokenizer)}))
    return model


def difference(own: PreTrainedTokenizerBase, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Why text gets other ids from `tokenizer` than from a model's `own`; None when it does not."""
    ours, theirs = own.get_vocab(), tokenizer.get_vocab()
    moved = sorted((token for token, i in ours.items() if theirs.get(token) != i), key=ours.__getitem__)
    if moved:
        return f"has {len(moved):,} tokens (such as {moved[0]!r}, id {ours[moved[0]]}) with other ids than"
    specs = [json.loads(one.backend_tokenizer.to_str()) for one in (own, tokenizer)]
    parts = [part for part in ("model", "normalizer", "pre_tokenizer") if specs[0][part] != specs[1][part]]
    return f"differs in its {' and '.join(parts)} from" if parts else None
