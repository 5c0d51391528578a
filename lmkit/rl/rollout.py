"""The batch that PPO learns from, and its collection: sampling, then scoring by policy, reference, critic and reward.

Shapes: B rows, P prompt tokens, C completion tokens, T tokens of prompt and completion together, N counted completion
tokens of some rows, in row order.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from lmkit.generation.sampler import Completions

Forward = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Rollout:
    """Sampled and scored completions. Prompts and completions are each right-padded; every mask comes from lengths.

    prompt_ids: int64 [B, P]; prompt_lengths: int64 [B].
    completion_ids: int64 [B, C]; completion_lengths: int64 [B], the stop token included.
    sampled_logprobs: [B, C], as the sampler saw them. logprobs: [B, C], recomputed by the function that trains.
    ref_logprobs: [B, C], of the reference. values: [B, C], V before each token. entropies: [B, C], of the policy there.
    final_values: [B], V after the last token where the critic is asked for it, else 0.
    scores: [B], by the reward, nothing added. finish_reasons: "stop" or "length" of each row.
    Floats are float32 and 0 at padding.
    """

    prompt_ids: Tensor
    prompt_lengths: Tensor
    completion_ids: Tensor
    completion_lengths: Tensor
    sampled_logprobs: Tensor
    logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    entropies: Tensor
    final_values: Tensor
    scores: Tensor
    finish_reasons: list[str]

    @property
    def mask(self) -> Tensor:
        """bool [B, C]: True at completion tokens, the stop token included."""
        return torch.arange(self.completion_ids.shape[1]) < self.completion_lengths[:, None]

    @property
    def stopped(self) -> Tensor:
        """bool [B]: True where the completion ended with a stop token."""
        return torch.tensor([reason == "stop" for reason in self.finish_reasons])

    def rows(self, index: Tensor) -> "Rollout":
        """The rows of `index`, cut to the longest completion among them."""
        longest = int(self.completion_lengths[index].max())
        part = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list):
                part[field.name] = [value[i] for i in index.tolist()]
            else:
                per_token = value.ndim == 2 and field.name != "prompt_ids"
                part[field.name] = value[index, :longest] if per_token else value[index]
        return Rollout(**part)

    def model_inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """What `ActorCritic` reads: input_ids [B, T], before [B, T] and targets [N]. The last token is not an input."""
        lengths = self.prompt_lengths + self.completion_lengths
        columns = torch.arange(int(lengths.max()))
        after_prompt = columns - self.prompt_lengths[:, None]
        from_completion = after_prompt.clamp(min=0) + self.prompt_ids.shape[1]
        source = torch.where(after_prompt < 0, columns, from_completion)
        joined = torch.cat([self.prompt_ids, self.completion_ids], dim=1)
        input_ids = joined.gather(1, source.clamp(max=joined.shape[1] - 1))
        before = (after_prompt >= -1) & (after_prompt < self.completion_lengths[:, None] - 1)
        return input_ids[:, :-1], before[:, :-1], self.completion_ids[self.mask]

    def per_token(self, counted: Tensor) -> Tensor:
        """Numbers at the counted tokens, [N] in row order, laid out as [B, C] with 0 at padding."""
        mask = self.mask.to(counted.device)
        return torch.zeros(mask.shape, device=counted.device).masked_scatter(mask, counted.float())


def completion_ids(rollout: Rollout) -> list[list[int]]:
    """The tokens of each completion, its stop token included, without padding."""
    return [ids[:n] for ids, n in zip(rollout.completion_ids.tolist(), rollout.completion_lengths.tolist())]


def by_length(rollout: Rollout, batch_size: int) -> list[Tensor]:
    """Row numbers in groups of at most `batch_size`, rows of like length together so that little is padded."""
    order = (rollout.prompt_lengths + rollout.completion_lengths).argsort(stable=True, descending=True)
    return list(order.split(batch_size))


def unscored(prompts: list[list[int]], completions: Completions) -> Rollout:
    """A rollout of sampled completions with zeros where the models' numbers will stand."""
    width = max(len(prompt) for prompt in prompts)
    nothing = torch.zeros_like(completions.logprobs)
    return Rollout(
        prompt_ids=torch.tensor([prompt + [0] * (width - len(prompt)) for prompt in prompts]),
        prompt_lengths=torch.tensor([len(prompt) for prompt in prompts]),
        completion_ids=completions.tokens,
        completion_lengths=completions.lengths,
        sampled_logprobs=completions.logprobs,
        logprobs=nothing,
        ref_logprobs=nothing,
        values=nothing,
        entropies=nothing,
        final_values=torch.zeros(len(prompts)),
        scores=torch.zeros(len(prompts)),
        finish_reasons=completions.finish_reasons,
    )


@torch.no_grad()
def values_after(rollout: Rollout, forward: Forward, batch_size: int) -> Tensor:
    """V after the last token of rows that were cut off, 0 for those that ended: float32 [B]; `forward` of `collect`."""
    # With one more token, whatever it is, that value is the one before it.
    longer = replace(
        rollout, completion_ids=pad(rollout.completion_ids, (0, 1)), completion_lengths=rollout.completion_lengths + 1
    )
    found = torch.zeros(len(rollout.scores))
    cut = (~rollout.stopped).nonzero().squeeze(1)
    for index in cut.split(batch_size) if len(cut) else ():
        part = longer.rows(index)
        values = part.per_token(forward(*part.model_inputs())[1].cpu())
        found[index] = values.gather(1, part.completion_lengths[:, None] - 1).squeeze(1)
    return found


@torch.no_grad()
def collect(
    prompts: list[list[int]],
    draw: Callable[[list[list[int]]], Completions],
    forward: Forward,
    ref_forward: Forward,
    reward: Callable[[list[list[int]]], Callable[[], Tensor]],
    batch_size: int,
) -> tuple[Rollout, dict[str, float]]:
    """A rollout, and the seconds spent in sampling ("rollout"), the models ("score") and the reward ("reward").

    draw: prompts -> completions. reward: completion ids of all rows, stop tokens included -> a function that gives the
    scores [B]; what it set to work goes on while the models run, and "reward" is the time it is waited for.
    forward: inputs of at most `batch_size` rows -> logprobs, values, entropies, each [N]; ref_forward: -> logprobs.
    """
    clock = [time.perf_counter()]
    rollout = unscored(prompts, draw(prompts))
    clock.append(time.perf_counter())
    scores = reward(completion_ids(rollout))
    names = ("logprobs", "values", "entropies", "ref_logprobs")
    tables = {name: torch.zeros_like(rollout.logprobs) for name in names}
    for index in by_length(rollout, batch_size):
        part = rollout.rows(index)
        inputs = part.model_inputs()
        for name, counted in zip(names, (*forward(*inputs), *ref_forward(*inputs))):
            table = part.per_token(counted.cpu())
            tables[name][index, : table.shape[1]] = table
    clock.append(time.perf_counter())
    rollout = replace(rollout, scores=scores(), **tables)
    clock.append(time.perf_counter())
    return rollout, {name: clock[i + 1] - clock[i] for i, name in enumerate(("rollout", "score", "reward"))}
