"""Loading a model directory with its tokenizer: from the disk only, in float32, after checking that the two fit."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lmkit.errors import BadInput
from lmkit.tokenization.read import load_tokenizer

Device = str | torch.device


def load_language_model(
    path: Path, device: str | torch.device = "cpu", **options: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer. Raises BadInput when the directory lacks or mismatches either.

    options: those of `from_pretrained` that place the weights themselves, as in `lmkit.training.lora.quantization`.
    """
    tokenizer = _tokenizer(path)
    with loading(path, "language model"):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, local_files_only=True, **options)
    return _placed(_matched(model, tokenizer, path), device, options), tokenizer


def load_reward_model(
    path: Path, device: str | torch.device = "cpu", **options: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A sequence-classification model with one label and its tokenizer; options as in `load_language_model`.

    From the directory of a language model the head is new: zero, so that every score starts at 0.
    """
    tokenizer = _tokenizer(path)
    with loading(path, "model that can score"):
        model, report = AutoModelForSequenceClassification.from_pretrained(
            path, num_labels=1, dtype=torch.float32, local_files_only=True, output_loading_info=True, **options
        )
        if not hasattr(model, "score"):
            raise ValueError(f"{type(model).__name__} has no layer `score`, which causal models have.")
    if "score.weight" in report["missing_keys"]:
        torch.nn.init.zeros_(model.score.weight)
    # The stock forward finds the last token of a padded row by this id.
    model.config.pad_token_id = tokenizer.pad_token_id
    return _placed(_matched(model, tokenizer, path), device, options), tokenizer


@contextlib.contextmanager
def loading(path: str | Path, what: str) -> Iterator[None]:
    """What transformers finds wrong with a directory, as BadInput."""
    try:
        yield
    except BadInput:
        raise
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        hint = "Give what a stage of lmkit or save_pretrained wrote."
        raise BadInput(f"{path} is no {what} that can be loaded: {reason} {hint}") from None


def _placed(model: PreTrainedModel, device: str | torch.device, options: dict[str, Any]) -> PreTrainedModel:
    return model if "device_map" in options else model.to(device)


def _tokenizer(path: Path) -> PreTrainedTokenizerBase:
    if not (Path(path) / "config.json").is_file():
        raise BadInput(
            f"{path} is not a model directory: it has no config.json. Pass the folder save_pretrained wrote."
        )
    return load_tokenizer(path)


def _matched(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path) -> PreTrainedModel:
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise BadInput(
            f"{path} holds a model with {rows:,} token embeddings and a tokenizer with {len(tokenizer):,} tokens; they "
            "do not belong together. Put the tokenizer the model was trained with there."
        )
    return model


def check_positions(model: PreTrainedModel, max_length: int) -> None:
    """Raises BadInput when sequences of `max_length` are longer than those the model has positions for."""
    positions = getattr(model.config, "max_position_embeddings", max_length)
    if max_length > positions:
        raise BadInput(f"max_length is {max_length}, but the model has {positions} positions. Lower --max_length.")
