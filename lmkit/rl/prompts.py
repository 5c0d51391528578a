"""Prompts of a dataset as token ids, checked against the room that the model leaves for a completion."""

from collections.abc import Callable
from dataclasses import dataclass

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from lmkit.errors import BadInput
from lmkit.rl.config import PPOConfig
from lmkit.tokenization.chat import render


@dataclass(frozen=True)
class Prompts:
    """Rows of a dataset, and the ids of the prompt of each."""

    rows: Dataset
    ids: list[list[int]]


def encode_prompts(
    dataset: Dataset,
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    positions: int | None,
    config: PPOConfig,
    say: Callable[[str], None],
) -> Prompts:
    """The prompts of a dataset with a column `prompt`, texts or conversations.

    positions: tokens that the model has room for; None: any number. A prompt that leaves no room for max_new_tokens is
    BadInput, loses its first tokens, or goes with its row, as `long_prompts` says; `say` tells how many.
    """
    if "prompt" not in dataset.column_names or not len(dataset):
        raise BadInput(f"{name} has {len(dataset)} rows of {dataset.column_names}; wanted rows with a column prompt.")
    ids = [render(tokenizer, prompt)[0] for prompt in dataset["prompt"]]
    room = (positions or float("inf")) - config.max_new_tokens
    long = [row for row, prompt in enumerate(ids) if len(prompt) > room]
    if not long:
        return Prompts(dataset, ids)
    found = (
        f"{name}: {len(long)} of {len(ids)} prompts leave no room for max_new_tokens {config.max_new_tokens} in the "
        f"model's {positions} positions; the first is row {long[0]} with {len(ids[long[0]])} tokens"
    )
    if config.long_prompts == "refuse" or room < 1 or (config.long_prompts == "drop" and len(long) == len(ids)):
        raise BadInput(
            f"{found}. Remove or shorten them, lower max_new_tokens, or set long_prompts to truncate or drop."
        )
    if config.long_prompts == "truncate":
        say(f"{found}. Only their last {room} tokens are used.")
        return Prompts(dataset, [prompt[-room:] for prompt in ids])
    say(f"{found}. They are left out.")
    kept = sorted(set(range(len(ids))) - set(long))
    return Prompts(dataset.select(kept), [ids[row] for row in kept])
