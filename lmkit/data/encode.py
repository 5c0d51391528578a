"""Rows of text to ready token ids for TRL's trainers, and the counts a person sees before training.

Ids come from `lmkit.tokenization.chat.render`, so no text becomes a special token; a row that does not fit is counted.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from lmkit.errors import BadInput
from lmkit.tokenization.chat import render, stop_token_ids

OnTruncation = Literal["error", "drop", "cut"]
MAX_LOST = 0.01


def encode_demonstrations(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    on_truncation: OnTruncation = "error",
    assistant_only_loss: bool = False,
) -> tuple[Dataset, dict[str, int]]:
    """Columns `input_ids` and `labels` from `prompt` and `completion` (texts or messages), and counts.

    Labels are the ids themselves on the completion, its stop token included, and -100 on the prompt, but for the
    assistant's earlier turns where `assistant_only_loss` counts those too. A row longer than `max_length` is dropped;
    with "error" more than 1 % of them is BadInput, with "cut" such a row keeps its first `max_length` ids, and is
    dropped only when no completion token is among them. BadInput when no row is left that teaches the model to stop.
    """
    stops, examples, num_long = set(stop_token_ids(tokenizer)), [], 0
    lengths = []
    for number, row in enumerate(rows):
        prompt_ids, completion_ids = render(tokenizer, row["prompt"], row["completion"])
        if len(completion_ids) < 2 or completion_ids[-1] not in stops:
            raise BadInput(
                f"row {number} has an empty completion: {str(row)[:120]}. Remove the row or give it an answer."
            )
        lengths.append(len(prompt_ids) + len(completion_ids))
        num_long += lengths[-1] > max_length
        if lengths[-1] <= max_length or (on_truncation == "cut" and len(prompt_ids) < max_length):
            before = _assistant_labels(tokenizer, row["prompt"], prompt_ids) if assistant_only_loss else None
            labels = (before or [-100] * len(prompt_ids)) + completion_ids
            examples.append({"input_ids": (prompt_ids + completion_ids)[:max_length], "labels": labels[:max_length]})
    _check_kept(len(examples), lengths, num_long, max_length, on_truncation)
    num_stopped = sum(example["labels"][-1] in stops for example in examples)
    if num_stopped == 0:
        raise BadInput(
            f"all {len(examples):,} rows are cut off at max_length {max_length}, so the model would never learn to "
            "stop. Raise --max_length."
        )
    return Dataset.from_list(examples), _counts(len(examples), lengths, num_long) | {"taught_to_stop": num_stopped}


def _assistant_labels(tokenizer: PreTrainedTokenizerBase, prompt: Any, prompt_ids: list[int]) -> list[int]:
    """Labels of a prompt's ids: the assistant's turns in it, each with its stop token, and -100 elsewhere."""
    labels = [-100] * len(prompt_ids)
    for number, message in enumerate([] if isinstance(prompt, str) else prompt):
        if message["role"] != "assistant":
            continue
        before, answer = render(tokenizer, prompt[:number], message["content"])
        if prompt_ids[: len(before) + len(answer)] != before + answer:
            raise BadInput(
                f"The chat template of {tokenizer.name_or_path} writes an assistant's earlier turns otherwise than its "
                "last one, so they cannot be learnt from. Leave out --assistant_only_loss."
            )
        labels[len(before) : len(before) + len(answer)] = answer
    return labels


def encode_pairs(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    on_truncation: OnTruncation = "error",
    margin: str | None = None,
) -> tuple[Dataset, dict[str, int]]:
    """Columns `chosen_ids`, `rejected_ids` and `row` from `prompt`, `chosen` and `rejected`, and counts.

    row: the number of the row a pair came from. margin: a column with how much better the chosen completion is; it
    becomes the column `margin`, by which TRL's loss wants the scores to differ. BadInput names a row that has none.
    A pair with a sequence longer than `max_length` is dropped ("cut" is not offered: a reward model scores the stop
    token); with "error" more than 1 % of them is BadInput. Pairs of one same completion are dropped and counted.
    """
    examples, lengths, num_long, num_equal = [], [], 0, 0
    if margin is not None and margin not in rows.column_names:
        raise BadInput(f"the pairs have no column {margin!r}; found {', '.join(rows.column_names)}. Change --margin.")
    for number, row in enumerate(rows):
        prompt_ids, chosen_ids = render(tokenizer, row["prompt"], row["chosen"])
        _, rejected_ids = render(tokenizer, row["prompt"], row["rejected"])
        lengths.append(len(prompt_ids) + max(len(chosen_ids), len(rejected_ids)))
        num_long += lengths[-1] > max_length
        num_equal += chosen_ids == rejected_ids
        if lengths[-1] <= max_length and chosen_ids != rejected_ids:
            example = {"chosen_ids": prompt_ids + chosen_ids, "rejected_ids": prompt_ids + rejected_ids, "row": number}
            examples.append(example if margin is None else example | {"margin": _number(row[margin], margin, number)})
    _check_kept(len(examples), lengths, num_long, max_length, on_truncation)
    return Dataset.from_list(examples), _counts(len(examples), lengths, num_long) | {"equal": num_equal}


def _number(value: Any, name: str, row: int) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise BadInput(f"row {row} of the pairs has {value!r} in the column {name}; wanted a finite number.")
    return float(value)


def _check_kept(num_kept: int, lengths: Sequence[int], num_long: int, max_length: int, on_truncation: str) -> None:
    if lengths and on_truncation == "error" and num_long > MAX_LOST * len(lengths):
        raise BadInput(
            f"{num_long:,} of {len(lengths):,} rows ({num_long / len(lengths):.1%}) are longer than max_length "
            f"{max_length} and would be lost. 99 % fit in {int(np.quantile(lengths, 0.99))}, all in {max(lengths)}: "
            "raise --max_length, or accept the loss with --on_truncation drop."
        )
    if num_kept == 0:
        raise BadInput(
            f"none of the {len(lengths):,} rows is usable at max_length {max_length}; there is nothing to learn."
        )


def _counts(num_kept: int, lengths: Sequence[int], num_long: int) -> dict[str, int]:
    median, most = (int(np.quantile(lengths, q)) for q in (0.5, 0.99))
    return {
        "rows": len(lengths),
        "kept": num_kept,
        "over_max_length": num_long,
        "median_tokens": median,
        "p99_tokens": most,
        "longest_tokens": max(lengths),
    }


def show_counts(name: str, counts: dict[str, int]) -> str:
    """One line for a person.

    >>> show_counts("train", {"rows": 1200, "kept": 1190})
    'train: 1,200 rows, 1,190 kept'
    """
    rest = [f"{value:,} {key.replace('_', ' ')}" for key, value in counts.items()]
    return f"{name}: {', '.join(rest)}"


def short_prompts(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, num: int = 4
) -> tuple[list[Any], int]:
    """The prompts with the fewest tokens among the first rows, and how many `max_length` leaves for an answer."""
    prompts = list({str(prompt): prompt for prompt in rows["prompt"][:64]}.values())
    lengths = [len(render(tokenizer, prompt)[0]) for prompt in prompts]
    shortest = np.argsort(lengths, kind="stable")[:num]
    return [prompts[i] for i in shortest], max(max_length - lengths[shortest[-1]], 1)
