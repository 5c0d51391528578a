"""Rows of text to ready token ids for TRL's trainers, and the counts a person sees before training.

Ids come from `lmkit.tokenization.chat.render`, so no text becomes a special token; a row that does not fit is counted.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from lmkit.data.formats import inspect_rows
from lmkit.errors import BadInput
from lmkit.tokenization.chat import render, render_all, stop_token_ids

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
    assistant's earlier answers where `assistant_only_loss` counts those too. A row longer than `max_length` is dropped;
    with "error" more than 1 % of them is BadInput, with "cut" such a row keeps its first `max_length` ids, and is
    dropped only when no completion token is among them. BadInput when no row is left that teaches the model to stop.
    """
    stops, examples, num_long = set(stop_token_ids(tokenizer)), [], 0
    lengths, prompts, completions = [], rows["prompt"][:], rows["completion"][:]
    rendered = render_all(tokenizer, prompts, completions)
    for number, (prompt_ids, completion_ids) in enumerate(rendered):
        if len(completion_ids) < 2 or completion_ids[-1] not in stops:
            raise BadInput(
                f"row {number} has an empty completion for {str(prompts[number])[:100]!r}. Remove the row or give it "
                "an answer."
            )
        lengths.append(len(prompt_ids) + len(completion_ids))
        num_long += lengths[-1] > max_length
        if lengths[-1] <= max_length or (on_truncation == "cut" and len(prompt_ids) < max_length):
            before = _assistant_labels(tokenizer, prompts[number], prompt_ids) if assistant_only_loss else None
            labels = (before or [-100] * len(prompt_ids)) + completion_ids
            examples.append({"input_ids": (prompt_ids + completion_ids)[:max_length], "labels": labels[:max_length]})
    _check_kept(len(examples), lengths, num_long, max_length, on_truncation)
    num_stopped = sum(example["labels"][-1] in stops for example in examples)
    if num_stopped == 0:
        raise BadInput(
            f"all {len(examples):,} rows are cut off at max_length {max_length}, so the model would never learn to "
            "stop. Raise --max_length."
        )
    counts = {"kept": len(examples), "taught_to_stop": num_stopped}
    return Dataset.from_list(examples), count_lengths(lengths, max_length) | counts


def _assistant_labels(tokenizer: PreTrainedTokenizerBase, prompt: Any, prompt_ids: list[int]) -> list[int]:
    """Labels of a prompt's ids: the assistant's answers in it, each with its stop token, and -100 elsewhere.

    A turn that opens the conversation or follows another one of the assistant answers nothing: `render` has no prompt
    that asks for it, so no stage ever would.
    """
    labels = [-100] * len(prompt_ids)
    for number, message in enumerate([] if isinstance(prompt, str) else prompt):
        if message["role"] != "assistant" or number == 0 or prompt[number - 1]["role"] == "assistant":
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

    row: the number of the row a pair came from. A completion that is in its row's list `cut_off`, where there is such a
    column, has no stop token. margin: a column with how much better the chosen completion is; it
    becomes the column `margin`, by which TRL's loss wants the scores to differ. BadInput names a row that has none.
    A pair with a sequence longer than `max_length` is dropped ("cut" is not offered: a reward model scores the stop
    token); with "error" more than 1 % of them is BadInput. Pairs of one same completion are dropped and counted.
    """
    examples, lengths, num_long, num_equal = [], [], 0, 0
    if margin is not None and margin not in rows.column_names:
        raise BadInput(f"the pairs have no column {margin!r}; found {', '.join(rows.column_names)}. Change --margin.")
    prompts, chosen, rejected = (rows[name][:] for name in ("prompt", "chosen", "rejected"))
    margins = None if margin is None else [_number(value, margin, n) for n, value in enumerate(rows[margin])]
    rendered = zip(render_all(tokenizer, prompts, chosen), render_all(tokenizer, prompts, rejected))
    open_ended = rows["cut_off"][:] if "cut_off" in rows.column_names else [()] * len(rows)
    for number, ((prompt_ids, chosen_ids), (_, rejected_ids)) in enumerate(rendered):
        chosen_ids = chosen_ids[:-1] if chosen[number] in open_ended[number] else chosen_ids
        rejected_ids = rejected_ids[:-1] if rejected[number] in open_ended[number] else rejected_ids
        lengths.append(len(prompt_ids) + max(len(chosen_ids), len(rejected_ids)))
        num_long += lengths[-1] > max_length
        num_equal += chosen_ids == rejected_ids
        if lengths[-1] <= max_length and chosen_ids != rejected_ids:
            example = {"chosen_ids": prompt_ids + chosen_ids, "rejected_ids": prompt_ids + rejected_ids, "row": number}
            examples.append(example if margins is None else example | {"margin": margins[number]})
    _check_kept(len(examples), lengths, num_long, max_length, on_truncation)
    counts = {"kept": len(examples), "equal": num_equal}
    return Dataset.from_list(examples), count_lengths(lengths, max_length) | counts


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


def inspect_prompts(rows: Dataset, held_out: Dataset | None, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Counts of prompts to sample for: `lmkit.data.formats.inspect_rows`, and their lengths as the model sees them."""
    lengths = [len(ids) for ids, _ in render_all(tokenizer, rows["prompt"][:], [None] * len(rows))]
    return inspect_rows(rows, held_out) | count_lengths(lengths)


def count_lengths(lengths: Sequence[int], max_length: int | None = None) -> dict[str, Any]:
    """Counts about the lengths of rows in tokens: how many are over the maximum, quantiles, and a histogram.

    length_histogram: upper end in tokens -> rows of at most so many and more than the end before it.

    >>> count_lengths([5, 30, 40, 300], max_length=256)["length_histogram"]
    {'16': 1, '32': 1, '64': 1, '128': 0, '256': 0, '512': 1}
    """
    median, most = (int(np.quantile(lengths, q)) for q in (0.5, 0.99))
    bins = [max(math.ceil(math.log2(max(length, 1))), 4) for length in lengths]
    histogram = {str(2**power): bins.count(power) for power in range(min(bins), max(bins) + 1)}
    over = {} if max_length is None else {"over_max_length": sum(length > max_length for length in lengths)}
    return {
        "rows": len(lengths),
        **over,
        "median_tokens": median,
        "p99_tokens": most,
        "longest_tokens": max(lengths),
        "length_histogram": histogram,
    }


def show_counts(name: str, counts: dict[str, Any]) -> str:
    """One line for a person; shares stand beside counts of rows that are lost, and a histogram by its upper ends.

    >>> show_counts("train", {"rows": 1200, "over_max_length": 30, "length_histogram": {"16": 9, "32": 1191}})
    'train: 1,200 rows, 30 over max length (2.5 %), lengths up to 16: 9, 32: 1,191'
    """
    shown = []
    for key, value in counts.items():
        if isinstance(value, dict):
            shown.append("lengths up to " + ", ".join(f"{end}: {number:,}" for end, number in value.items()))
        else:
            share = f" ({value / counts['rows']:.1%})".replace("%", " %") if key == "over_max_length" else ""
            shown.append(f"{value:,} {key.replace('_', ' ')}{share}")
    return f"{name}: {', '.join(shown)}"


def short_prompts(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, num: int = 4
) -> tuple[list[Any], int]:
    """The prompts with the fewest tokens among the first rows, and how many `max_length` leaves for an answer."""
    prompts = list({str(prompt): prompt for prompt in rows["prompt"][:64]}.values())
    lengths = [len(render(tokenizer, prompt)[0]) for prompt in prompts]
    shortest = np.argsort(lengths, kind="stable")[:num]
    return [prompts[i] for i in shortest], max(max_length - lengths[shortest[-1]], 1)
