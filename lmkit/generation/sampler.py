"""Sampling completions from a causal language model, with the log-probability of every token drawn.

A loop over `model.forward` with a key-value cache: prompts of like length share a batch, rows that have ended leave it,
and no scores over the vocabulary are kept. Tokens are drawn by inverting the cumulative distribution at one uniform
number per row and step, all of which come from `generator` before the first step: what a row draws does not depend on
the batch it sits in.

Shapes: N completions, B batch, P prompt tokens, C completion tokens, V vocabulary.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from lmkit.errors import BadInput
from lmkit.models.attention import NAME


@dataclass(frozen=True)
class Completions:
    """What the sampler drew, in the order of the prompts, on the CPU.

    tokens: int64 [N, C], right-padded with 0; C is the longest completion.
    lengths: int64 [N], counted tokens of each row, its stop token included. Masks come from this, never from ids.
    logprobs: float32 [N, C], log-probability of each token under the tempered distribution over the whole vocabulary;
        0 at padding.
    finish_reasons: per row "stop" (a stop token was drawn, or the token that completes a stop string) or "length"
        (max_new_tokens were drawn without one).
    """

    tokens: Tensor
    lengths: Tensor
    logprobs: Tensor
    finish_reasons: list[str]

    def ids(self, row: int) -> list[int]:
        """The tokens of one completion, its stop token included, without padding."""
        return self.tokens[row, : self.lengths[row]].tolist()

    def rows(self, part: range) -> "Completions":
        """Some rows that follow each other, cut to the longest among them."""
        chosen = slice(part.start, part.stop)
        longest = int(self.lengths[chosen].max())
        tokens, logprobs = self.tokens[chosen, :longest], self.logprobs[chosen, :longest]
        return Completions(tokens, self.lengths[chosen], logprobs, self.finish_reasons[chosen])


def sample(
    model: PreTrainedModel,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    stop_token_ids: list[int],
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    stop_strings: Sequence[str] = (),
    tokenizer: PreTrainedTokenizerBase | None = None,
    generator: torch.Generator | None = None,
    batch_size: int = 128,
) -> Completions:
    """One completion for each prompt of token ids.

    stop_strings: texts that end a completion, in which the token that completes one is the last; they need `tokenizer`.
    temperature 0 takes the most likely token each time; `top_k` 0 and `top_p` 1 leave the distribution whole.
    `generator` (a CPU generator) may be left out only at temperature 0. A prompt is never truncated: prompt and
    completion together must fit the model's positions.

    Raises BadInput for an empty prompt or one that leaves no room for `max_new_tokens`.
    """
    if stop_strings and tokenizer is None:
        raise ValueError("stop_strings are found in decoded text; pass tokenizer=... .")
    _check(model, prompts, max_new_tokens, temperature, generator)
    shape = (len(prompts), max_new_tokens)
    uniforms = None if temperature == 0 else torch.rand(shape, generator=generator).to(model.device)
    tokens, logprobs = torch.zeros(shape, dtype=torch.long), torch.zeros(shape)
    lengths, stopped = torch.full((len(prompts),), max_new_tokens), torch.zeros(len(prompts), dtype=torch.bool)
    stops, choice = Stops(stop_token_ids, stop_strings, tokenizer), (temperature, top_k, top_p)

    training = model.training
    model.eval()
    try:
        order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
        for start in range(0, len(order), batch_size):
            rows = torch.tensor(order[start : start + batch_size])
            batch = [prompts[row] for row in rows.tolist()]
            drawn = _sample_batch(
                model, batch, None if uniforms is None else uniforms[rows], stops, max_new_tokens, choice
            )
            tokens[rows], logprobs[rows], lengths[rows], stopped[rows] = (part.cpu() for part in drawn)
    finally:
        model.train(training)

    longest = int(lengths.max()) if len(prompts) else 0
    reasons = ["stop" if flag else "length" for flag in stopped.tolist()]
    return Completions(tokens[:, :longest].clone(), lengths, logprobs[:, :longest].clone(), reasons)


def _check(model, prompts, max_new_tokens, temperature, generator):
    if temperature < 0 or max_new_tokens < 1:
        raise ValueError(f"temperature {temperature} must be >= 0 and max_new_tokens {max_new_tokens} >= 1.")
    if temperature > 0 and generator is None:
        raise ValueError("sampling at a temperature above 0 needs a torch.Generator; pass generator=... .")
    if empty := [row for row, prompt in enumerate(prompts) if not prompt]:
        raise BadInput(f"prompt {empty[0]} has no tokens; sampling needs at least one. Drop it or give it text.")
    room = getattr(model.config, "max_position_embeddings", None)
    longest = max(range(len(prompts)), key=lambda row: len(prompts[row]), default=None)
    if room and longest is not None and len(prompts[longest]) + max_new_tokens > room:
        raise BadInput(
            f"prompt {longest} has {len(prompts[longest])} tokens and max_new_tokens is {max_new_tokens}, but the "
            f"model has {room} positions; shorten the prompt or lower max_new_tokens."
        )


@torch.inference_mode()
def _sample_batch(model, prompts, uniforms, stops, max_new_tokens, choice):
    """Tokens [B, C], logprobs [B, C], lengths [B] and stopped [B] for one batch. Left padding lives only in here."""
    device = model.device
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
    starts = torch.tensor([width - len(prompt) for prompt in prompts], device=device)
    columns = torch.arange(width + max_new_tokens, device=device)
    visible = columns[None, :] >= starts[:, None]  # [B, P + C]
    positions = (columns[None, :width] - starts[:, None]).clamp(min=0)

    tokens = torch.zeros(len(prompts), max_new_tokens, dtype=torch.long, device=device)
    logprobs = torch.zeros(len(prompts), max_new_tokens, device=device)
    lengths = torch.full((len(prompts),), max_new_tokens, device=device)
    stopped = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    rows = torch.arange(len(prompts), device=device)  # the batch row behind each row still in the cache
    running = torch.ones_like(rows, dtype=torch.bool)
    cache = reserved_cache(model, width + max_new_tokens)
    attention = contextlib.ExitStack()
    with attention:
        if model.config._attn_implementation == NAME:  # it would let padding be seen
            attention.enter_context(attending(model, "sdpa" if model._supports_sdpa else "eager"))
        for step in range(max_new_tokens):
            outputs = model(
                input_ids=ids,
                attention_mask=visible[:, : width + step],
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            logits, cache = outputs.logits[:, -1], outputs.past_key_values
            if step == 0 and device.type == "cpu" and model.config._attn_implementation == "sdpa":
                # By matrix products the one query a row takes half the time of the fused kernel, in bfloat16 a quarter.
                attention.enter_context(attending(model, "eager"))
            ids, chosen = draw(logits, None if uniforms is None else uniforms[rows, step], *choice)
            tokens[rows, step] = torch.where(running, ids, 0)
            logprobs[rows, step] = torch.where(running, chosen, 0.0)
            ended = running & stops.end(tokens[rows, : step + 1])
            lengths[rows[ended]], stopped[rows[ended]] = step + 1, True
            running = running & ~ended
            left = int(running.sum())
            if left == 0:
                break
            if left < 0.75 * len(rows):
                keep = running.nonzero().squeeze(1)
                cache.batch_select_indices(keep)
                rows, running, ids, visible, starts = rows[keep], running[keep], ids[keep], visible[keep], starts[keep]
            ids, positions = ids[:, None], (width + step - starts)[:, None]
    return tokens, logprobs, lengths, stopped


class Stops:
    """What ends a completion: one of some token ids, or a text."""

    def __init__(self, token_ids: Sequence[int], strings: Sequence[str], tokenizer: PreTrainedTokenizerBase | None):
        self.token_ids, self.strings, self.tokenizer = list(token_ids), list(strings), tokenizer
        # A token is a byte at least, so a string is in the text of that many tokens; decoders may trim the one before.
        self.reach = max((len(string.encode()) for string in self.strings), default=0) + 1

    def end(self, tokens: Tensor) -> Tensor:
        """Whether the last token of each row ends it: bool [B] from the tokens so far [B, C], C > 0."""
        ended = torch.isin(tokens[:, -1], torch.tensor(self.token_ids, dtype=tokens.dtype, device=tokens.device))
        if self.strings:
            texts = self.tokenizer.batch_decode(tokens[:, -self.reach :], skip_special_tokens=True)
            found = [any(string in text for string in self.strings) for text in texts]
            ended = ended | torch.tensor(found, device=tokens.device)
        return ended


@contextlib.contextmanager
def attending(model: PreTrainedModel, implementation: str) -> Iterator[None]:
    """Inside the block `model` attends by the named implementation of transformers."""
    before = model.config._attn_implementation
    model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


class _ReservedLayer(DynamicLayer):
    """Keys and values [B, H, T, D] written into memory reserved once.

    transformers' own layer copies the whole cache at every token, most of the time of a small model's step.
    """

    def __init__(self, capacity: int):
        super().__init__()
        self.capacity = capacity

    def update(self, key_states, value_states, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.reserved = [
                new.new_empty(*new.shape[:2], self.capacity, new.shape[3]) for new in (key_states, value_states)
            ]
        seen = self.get_seq_length()
        for memory, new in zip(self.reserved, (key_states, value_states), strict=True):
            memory[:, :, seen : seen + new.shape[2]] = new
        self.keys, self.values = (memory[:, :, : seen + key_states.shape[2]] for memory in self.reserved)
        return self.keys, self.values

    def batch_select_indices(self, indices):
        seen = self.get_seq_length()
        self.reserved = [memory[indices] for memory in self.reserved]
        self.keys, self.values = (memory[:, :, :seen] for memory in self.reserved)


def reserved_cache(model, capacity):
    """The model's own kind of cache, with reserved memory for its full-attention layers.

    None for a model that carries a state: it makes its own, and returns it with its logits.
    """
    if model._is_stateful:
        return None
    cache = DynamicCache(config=model.config)
    cache.layers = [_ReservedLayer(capacity) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def draw(logits, uniforms, temperature, top_k, top_p):
    """A token [B] for each row of logits [B, V] and its log-probability [B] under the tempered distribution.

    The token is the first whose cumulative probability exceeds uniform * total, so one of probability 0 never is.
    """
    scaled = logits.float() if temperature in (0, 1) else logits.float() / temperature
    logprobs = scaled.log_softmax(-1)
    if temperature == 0:
        ids = logprobs.argmax(-1)
    else:
        cumulative = _kept(logprobs.exp(), top_k, top_p).cumsum(-1)
        ids = torch.searchsorted(cumulative, uniforms[:, None] * cumulative[:, -1:], right=True).squeeze(1)
    return ids, logprobs.gather(1, ids[:, None]).squeeze(1)


def _kept(probabilities, top_k, top_p):
    """Probabilities [B, V] with everything outside the `top_k` most likely tokens and the nucleus `top_p` set to 0."""
    if 0 < top_k < probabilities.shape[-1]:
        least = probabilities.topk(top_k, dim=-1).values[:, -1:]
        probabilities = probabilities.masked_fill(probabilities < least, 0)
    if top_p < 1:
        ranked, order = probabilities.sort(dim=-1, descending=True)
        before = ranked.cumsum(-1) - ranked
        ranked = ranked.masked_fill(before >= top_p * ranked.sum(-1, keepdim=True), 0)
        probabilities = torch.zeros_like(probabilities).scatter(1, order, ranked)
    return probabilities
