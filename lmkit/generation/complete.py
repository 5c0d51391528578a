"""Prompts as text or messages to completions as text: rendering, sampling and decoding in one call."""

import json
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lmkit.artifact import write_json
from lmkit.generation.sampler import sample
from lmkit.tokenization.chat import render, stop_token_ids


@dataclass(frozen=True)
class Completion:
    """One sampled answer. `ids` end with what stopped it when `finished`; `text` shows no stop token or string."""

    prompt_ids: list[int]
    ids: list[int]
    text: str
    finished: bool


def completion_texts(
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[list[int]],
    stop_token_ids: Sequence[int],
    stop_strings: Sequence[str] = (),
) -> list[str]:
    """Completions as texts: without the stop token, and cut before the first stop string in them."""
    ends = [row[:-1] if row and row[-1] in stop_token_ids else row for row in ids]
    texts = tokenizer.batch_decode(ends, skip_special_tokens=True)
    return [text[: min((text.find(s) for s in stop_strings if s in text), default=None)] for text in texts]


def complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Any],
    *,
    max_new_tokens: int,
    seed: int,
    temperature: float = 1.0,
    stop_strings: Sequence[str] = (),
    batch_size: int = 256,
) -> list[Completion]:
    """One completion for each prompt, a text or a list of messages. The same seed draws the same completions."""
    stop_ids = stop_token_ids(tokenizer)
    prompt_ids = [render(tokenizer, prompt)[0] for prompt in prompts]
    drawn = sample(
        model,
        prompt_ids,
        max_new_tokens=max_new_tokens,
        stop_token_ids=stop_ids,
        stop_strings=stop_strings,
        tokenizer=tokenizer,
        temperature=temperature,
        generator=torch.Generator().manual_seed(seed),
        batch_size=batch_size,
    )
    finished = [reason == "stop" for reason in drawn.finish_reasons]
    ids = [drawn.ids(row) for row in range(len(prompt_ids))]
    texts = completion_texts(tokenizer, ids, stop_ids, stop_strings)
    return [Completion(*row) for row in zip(prompt_ids, ids, texts, finished)]


def complete_shared(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Any],
    *,
    seed: int,
    state: PartialState,
    progress: Callable[[int, int], None],
    chunk_size: int = 1024,
    keep: Path | None = None,
    **options: Any,
) -> list[Completion]:
    """`complete` over many prompts, the chunks divided among the processes; every process gets all completions.

    Each chunk has a seed of its own, so the result depends neither on the number of processes nor on a stop. `progress`
    is called after each chunk with the prompts done so far and the tokens sampled since. `keep` is a folder for
    finished chunks: those that lie there, of the same call, are taken and not sampled again.
    """
    mine, starts = {}, range(0, len(prompts), chunk_size)
    for number in range(state.process_index, len(starts), state.num_processes):
        file = keep and keep / f"chunk-{number:06}.json"
        if file and file.exists():
            mine[number] = [Completion(*row) for row in json.loads(file.read_text(encoding="utf-8"))]
            continue
        chunk = prompts[starts[number] : starts[number] + chunk_size]
        mine[number] = complete(model, tokenizer, chunk, seed=seed * 1_000_003 + number, **options)
        if file:
            keep.mkdir(parents=True, exist_ok=True)
            write_json(file, [astuple(completion) for completion in mine[number]])
        progress(starts[number] + len(chunk), sum(len(completion.ids) for completion in mine[number]))
    parts = gather_object([mine]) if state.num_processes > 1 else [mine]
    chunks = {number: chunk for part in parts for number, chunk in part.items()}
    return [completion for number in range(len(starts)) for completion in chunks[number]]
