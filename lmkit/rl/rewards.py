"""What a completion is worth: a reward model, or any Python function.

A reward becomes one function of a `Batch` of finished completions that returns a float32 [B] on the CPU. Whatever a
user's function gives back is checked before it can reach the policy.
"""

import importlib
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lmkit.errors import BadInput
from lmkit.models.heads import last_token_scores
from lmkit.models.load import load_reward_model


@dataclass(frozen=True)
class Batch:
    """Completions to score, B of each field.

    prompts: as they stand in the dataset, texts or conversations.
    completions: texts, or for conversations a list of one assistant message.
    ids: prompt and completion as token ids, the stop token included.
    columns: the dataset's other columns.
    """

    prompts: Sequence[Any]
    completions: Sequence[Any]
    ids: list[list[int]]
    columns: Mapping[str, Sequence[Any]]


Reward = Callable[[Batch], Tensor]


def make_reward(reward: Any, tokenizer: PreTrainedTokenizerBase, *, batch_size: int, device: Any = "cpu") -> Reward:
    """A reward as a function of a batch.

    reward: a sequence-classification model that reads the policy's ids; the directory of one, with its tokenizer;
    "module:function"; or a function(prompts, completions, **columns) -> numbers. Raises BadInput when it is none of
    these, or when the directory's tokenizer gives other ids than `tokenizer`.
    """
    if isinstance(reward, str | Path) and Path(reward).is_dir():
        reward, own = load_reward_model(Path(reward), device)
        if own.get_vocab() != tokenizer.get_vocab():
            raise BadInput(
                f"{reward.name_or_path} is a reward model with another vocabulary ({len(own):,} tokens) than the "
                f"policy ({len(tokenizer):,}); it cannot read those ids. Use one trained from the same tokenizer."
            )
    elif isinstance(reward, str):
        reward = import_function(reward)
    if isinstance(reward, PreTrainedModel):
        model = reward.requires_grad_(False).to(device)
        return lambda batch: last_token_scores(model, batch.ids, batch_size)
    if not callable(reward):
        raise BadInput(
            f"reward is {reward!r}; wanted a reward model, its directory, 'module:function' or a function "
            "(prompts, completions, **columns) -> list of numbers."
        )
    return lambda batch: checked_scores(reward, batch)


def import_function(name: str) -> Callable[..., Any]:
    """The function that "module:function" names, the working directory searched first."""
    module, colon, attribute = name.partition(":")
    if not colon:
        raise BadInput(f"reward {name!r} is not a directory; wanted a reward model's directory or 'module:function'.")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise BadInput(f"reward {name!r} cannot be imported: {error}. Is its folder on PYTHONPATH?") from error


def checked_scores(function: Callable[..., Any], batch: Batch) -> Tensor:
    """What a user's function gives for a batch, as float32 [B]; BadInput names the function and the first bad row."""
    name = getattr(function, "__qualname__", repr(function))
    try:
        scores = function(prompts=batch.prompts, completions=batch.completions, **batch.columns)
    except Exception as error:
        raise BadInput(f"the reward function {name} raised {type(error).__name__}: {error}.") from error
    if isinstance(scores, Tensor):
        scores = scores.tolist()
    if isinstance(scores, str) or not hasattr(scores, "__len__") or len(scores) != len(batch.ids):
        found = f"{len(scores)} values" if hasattr(scores, "__len__") and not isinstance(scores, str) else repr(scores)
        raise BadInput(
            f"the reward function {name} returned {found} for {len(batch.ids)} completions; wanted one each."
        )
    for row, score in enumerate(scores):
        try:
            finite = not isinstance(score, str) and math.isfinite(score)
        except (TypeError, ValueError):
            finite = False
        if not finite:
            raise BadInput(
                f"the reward function {name} returned {score!r} for row {row}; wanted a finite number. Its completion "
                f"is {str(batch.completions[row])[:200]!r}."
            )
    return torch.tensor([float(score) for score in scores])
