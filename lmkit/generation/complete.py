"""Prompts as text or messages to completions as text: rendering, sampling and decoding in one call."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lmkit.generation.sampler import sample
from lmkit.tokenization.chat import render, stop_token_ids


@dataclass(frozen=True)
class Completion:
    """One sampled answer. `ids` end with the stop token when `finished`; `text` never shows it."""

    prompt_ids: list[int]
    ids: list[int]
    text: str
    finished: bool


def complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Any],
    *,
    max_new_tokens: int,
    seed: int,
    temperature: float = 1.0,
    batch_size: int = 256,
) -> list[Completion]:
    """One completion for each prompt, a text or a list of messages. The same seed draws the same completions."""
    prompt_ids = [render(tokenizer, prompt)[0] for prompt in prompts]
    drawn = sample(
        model,
        prompt_ids,
        max_new_tokens=max_new_tokens,
        stop_token_ids=stop_token_ids(tokenizer),
        temperature=temperature,
        generator=torch.Generator().manual_seed(seed),
        batch_size=batch_size,
    )
    finished = [reason == "stop" for reason in drawn.finish_reasons]
    ids = [drawn.ids(row) for row in range(len(prompt_ids))]
    texts = tokenizer.batch_decode([i[:-1] if done else i for i, done in zip(ids, finished)], skip_special_tokens=True)
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
    **options: Any,
) -> list[Completion]:
    """`complete` over many prompts, the chunks divided among the processes; every process gets all completions.

    Each chunk has a seed of its own, so the result does not depend on the number of processes. `progress` is called
    after each chunk with the prompts done so far and the tokens sampled since.
    """
    mine, starts = {}, range(0, len(prompts), chunk_size)
    for number in range(state.process_index, len(starts), state.num_processes):
        chunk = prompts[starts[number] : starts[number] + chunk_size]
        mine[number] = complete(model, tokenizer, chunk, seed=seed * 1_000_003 + number, **options)
        progress(starts[number] + len(chunk), sum(len(completion.ids) for completion in mine[number]))
    parts = gather_object([mine]) if state.num_processes > 1 else [mine]
    chunks = {number: chunk for part in parts for number, chunk in part.items()}
    return [completion for number in range(len(starts)) for completion in chunks[number]]
