"""What a completion is worth: reward models, Python functions, servers, or several of these together.

A source of reward becomes a function of a `Batch` of finished completions that returns a float32 [B] on the CPU, and
`Reward` makes one number per completion of all sources. Functions and servers work in threads of their own, so that the
caller's models can run meanwhile.
"""

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lmkit.errors import BadInput
from lmkit.models.heads import last_token_scores
from lmkit.models.load import load_reward_model
from lmkit.rl.scorers import Batch, ask_server, call_function, import_function
from lmkit.tokenization.chat import render, stop_token_ids

Aggregation = Literal["sum", "mean", "min", "mean_minus_variance"]
Source = Callable[[Batch], Tensor]

# ------------------------------------------------------------------------------------------------- several as one


@dataclass
class Reward:
    """One number per completion from one source or several.

    models: sources that run in the caller's thread. functions: sources that run in threads of their own.
    weights: of each source, models first, for the aggregation "sum". An ensemble of reward models is taken by "mean",
    "min", or "mean_minus_variance": mean - variance_coef x variance over the members (Coste et al., arXiv:2310.02743).
    parts: what each source gave for the last batch, by its name.
    """

    models: dict[str, Source]
    functions: dict[str, Source]
    weights: Sequence[float] | None = None
    aggregation: Aggregation = "sum"
    variance_coef: float = 1.0
    parts: dict[str, Tensor] = field(default_factory=dict)

    def __call__(self, batch: Batch) -> Tensor:
        """Scores of a batch: float32 [B], on the CPU."""
        return self.start(batch)()

    def start(self, batch: Batch) -> Callable[[], Tensor]:
        """Sets the functions to work. Calling the result runs the models, waits for the functions and gives the scores.

        What a source raises is raised there.
        """
        working = {name: in_thread(function, batch) for name, function in self.functions.items()}

        def finish() -> Tensor:
            parts = {name: model(batch) for name, model in self.models.items()}
            self.parts = parts | {name: future.result() for name, future in working.items()}
            return aggregate(torch.stack(list(self.parts.values())), self.weights, self.aggregation, self.variance_coef)

        return finish


def aggregate(table: Tensor, weights: Sequence[float] | None, aggregation: Aggregation, variance_coef: float) -> Tensor:
    """Scores of R sources [R, B] as one score each [B]; the variance is over the sources, divided by R.

    >>> table = torch.tensor([[1.0, 2.0], [3.0, 2.0]])
    >>> aggregate(table, [1.0, 0.5], "sum", 1.0), aggregate(table, None, "min", 1.0)
    (tensor([2.5000, 3.0000]), tensor([1., 2.]))
    >>> aggregate(table, None, "mean_minus_variance", 0.5)
    tensor([1.5000, 2.0000])
    """
    if aggregation == "min":
        return table.min(0).values
    if aggregation == "mean":
        return table.mean(0)
    if aggregation == "mean_minus_variance":
        return table.mean(0) - variance_coef * table.var(0, correction=0)
    return (table if weights is None else table * torch.tensor(list(weights))[:, None]).sum(0)


def in_thread(function: Callable[..., Any], *arguments: Any) -> Future:
    """The future result of a function in a thread of its own, which does not keep the program from ending."""
    future: Future = Future()

    def work() -> None:
        try:
            future.set_result(function(*arguments))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future


class RunningNorm:
    """Scores less the mean of all scores seen, over their standard deviation; then kept within +/- `clip`.

    The batch at hand, which is that of all processes, is seen first. `state` is what a checkpoint holds.
    """

    def __init__(self, normalize: bool, clip: float | None = None):
        self.normalize, self.clip = normalize, clip
        self.count, self.mean, self.squares = 0.0, 0.0, 0.0

    def __call__(self, scores: Tensor) -> Tensor:
        """Scores [B], normalised and clipped."""
        if self.normalize:
            self._see(scores.double())
            scores = ((scores.double() - self.mean) / max(self.std, 1e-8)).float()
        return scores if self.clip is None else scores.clamp(-self.clip, self.clip)

    @property
    def std(self) -> float:
        return math.sqrt(self.squares / self.count) if self.count else 0.0

    def _see(self, scores: Tensor) -> None:
        """Adds a batch to the moments (Chan et al., 1979), which loses no digits where the mean is large."""
        count, total = float(len(scores)), scores.sum().item()
        squares = ((scores - total / count) ** 2).sum().item()
        gap, whole = total / count - self.mean, self.count + count
        self.squares += squares + gap**2 * self.count * count / whole
        self.mean, self.count = self.mean + gap * count / whole, whole

    def state(self) -> dict[str, float]:
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    def load(self, state: Mapping[str, float]) -> None:
        self.count, self.mean, self.squares = state["count"], state["mean"], state["squares"]


# ------------------------------------------------------------------------------------------------ what users give


def make_reward(
    reward: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int,
    device: Any = "cpu",
    weights: Sequence[float] | None = None,
    aggregation: Aggregation = "sum",
    variance_coef: float = 1.0,
    timeout_seconds: float = 60.0,
    max_retries: int = 3,
) -> Reward:
    """A reward, or a list of them, as one `Reward`.

    reward: a sequence-classification model that reads the policy's ids; the directory of one, with its tokenizer;
    "module:function", or a function(prompts, completions, **columns) -> numbers, which may be async; an http(s) address
    (see `ask_server`). tokenizer: the policy's. The others are as in `Reward` and `ask_server`.

    A directory whose tokenizer has another vocabulary, chat template or stop tokens than the policy's scores the text,
    rendered by its own.
    Raises BadInput for what is none of these, and for weights that do not fit.
    """
    given = list(reward) if isinstance(reward, list | tuple) else [reward]
    check_weights(len(given), weights, aggregation)
    found: dict[str, tuple[bool, Source]] = {}
    for one in given:
        name, is_model, source = _source(one, tokenizer, batch_size, device, timeout_seconds, max_retries)
        found[name if name not in found else f"{name}#{len(found) + 1}"] = is_model, source
    models = {name: source for name, (is_model, source) in found.items() if is_model}
    functions = {name: source for name, (is_model, source) in found.items() if not is_model}
    if weights is not None:
        by_name = dict(zip(found, weights))
        weights = [by_name[name] for name in (*models, *functions)]
    return Reward(models, functions, weights, aggregation, variance_coef)


def check_weights(num_rewards: int, weights: Sequence[float] | None, aggregation: Aggregation) -> None:
    """BadInput for weights that do not fit, and for no reward."""
    if not num_rewards or (weights is not None and (len(weights) != num_rewards or aggregation != "sum")):
        raise BadInput(
            f"{num_rewards} rewards with {'no' if weights is None else len(weights)} reward_weights, taken by "
            f"{aggregation}; wanted at least one reward, and with the aggregation sum a weight for each, or none."
        )


def _source(
    reward: Any, tokenizer: PreTrainedTokenizerBase, batch_size: int, device: Any, timeout: float, max_retries: int
) -> tuple[str, bool, Source]:
    """A source's name, whether it is a model, and the source."""
    if isinstance(reward, str) and reward.startswith(("http://", "https://")):
        return reward, False, lambda batch: ask_server(reward, batch, timeout=timeout, max_retries=max_retries)
    if isinstance(reward, str | Path) and Path(reward).is_dir():
        model, own = load_reward_model(Path(reward), device)
        model.requires_grad_(False)
        alike = [(t.get_vocab(), t.chat_template, stop_token_ids(t)) for t in (own, tokenizer)]
        same, stops = alike[0] == alike[1], set(alike[1][-1])

        def score(batch: Batch) -> Tensor:
            ids = batch.ids if same else rendered(own, batch, stops)
            return model_scores(model, ids, batch_size, str(reward))

        return str(reward), True, score
    if isinstance(reward, PreTrainedModel):
        rows = reward.get_input_embeddings().num_embeddings
        if rows < len(tokenizer):
            raise BadInput(
                f"the reward model given has {rows:,} token embeddings and the policy's tokenizer {len(tokenizer):,} "
                "tokens, so it cannot read the policy's ids. Give its directory instead, with its own tokenizer: it "
                "then scores the text."
            )
        model = reward.requires_grad_(False).to(device)
        return "reward_model", True, lambda batch: model_scores(model, batch.ids, batch_size, "reward_model")
    function = import_function(reward) if isinstance(reward, str) else reward
    if not callable(function):
        raise BadInput(
            f"reward is {reward!r}; wanted a reward model, its directory, 'module:function', an http(s) address or a "
            "function (prompts, completions, **columns) -> list of numbers."
        )
    name = getattr(function, "__qualname__", repr(function))
    return name, False, lambda batch: call_function(name, function, batch)


# --------------------------------------------------------------------------------------------------------- models


def model_scores(model: PreTrainedModel, sequences: list[list[int]], batch_size: int, name: str) -> Tensor:
    """Scores at the last tokens; BadInput names the first sequence that is longer than the model's positions."""
    room = getattr(model.config, "max_position_embeddings", None) or math.inf
    for row, ids in enumerate(sequences):
        if len(ids) > room:
            raise BadInput(
                f"row {row} has {len(ids)} tokens with its prompt, and the reward model {name} has {room} positions. "
                "Lower max_new_tokens, shorten the prompts, or use a reward model with a longer context."
            )
    return last_token_scores(model, sequences, batch_size)


def rendered(tokenizer: PreTrainedTokenizerBase, batch: Batch, stops: set[int]) -> list[list[int]]:
    """Ids of prompt and completion by another tokenizer and its chat template.

    stops: the policy's stop tokens. A completion that did not end with one is left open for the reward model too.
    """
    sequences = []
    for prompt, completion, ids in zip(batch.prompts, batch.completions, batch.ids):
        before, after = render(tokenizer, prompt, completion)
        sequences.append(before + (after if ids[-1] in stops else after[:-1]))
    return sequences
