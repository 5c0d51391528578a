"""Code outside lmkit that scores completions: Python functions and HTTP servers.

What they give back is checked, and named with its row when it is wrong, before it can reach the policy.
"""

import asyncio
import http.client
import importlib
import inspect
import json
import math
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lmkit.errors import BadInput

FIRST_WAIT_SECONDS = 1.0  # before a server is asked again; each further wait is twice as long


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


def call_function(name: str, function: Callable[..., Any], batch: Batch) -> Tensor:
    """What a user's function gives for a batch, as float32 [B]; BadInput names the function and the first bad row."""
    try:
        scores = function(prompts=batch.prompts, completions=batch.completions, **batch.columns)
        if inspect.isawaitable(scores):
            scores = asyncio.run(_awaited(scores))
    except Exception as error:
        raise BadInput(f"the reward function {name} raised {type(error).__name__}: {error}.") from error
    return checked_scores(f"the reward function {name}", scores, batch)


async def _awaited(scores: Any) -> Any:
    return await scores


def ask_server(url: str, batch: Batch, *, timeout: float, max_retries: int) -> Tensor:
    """Scores of a server: float32 [B].

    It gets one POST of JSON, {"prompts": [...], "completions": [...], COLUMN: [...], ...}, and answers with
    {"scores": [...]}. Connections that fail, time out after `timeout` seconds, or end with 429 or 5xx are tried again
    at most `max_retries` times, after 1, 2, 4, ... seconds. Raises BadInput when it stays so, or the answer is wrong.
    """
    try:
        body = json.dumps({"prompts": batch.prompts, "completions": batch.completions, **batch.columns}).encode()
    except TypeError as error:
        raise BadInput(
            f"a column of the dataset cannot be sent to {url} as JSON: {error}. Drop or convert it."
        ) from None
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    for attempt in range(max_retries + 1):
        if attempt:
            time.sleep(FIRST_WAIT_SECONDS * 2 ** (attempt - 1))
        try:
            with urllib.request.urlopen(request, timeout=timeout) as reply:
                answer = json.loads(reply.read())
        except urllib.error.HTTPError as error:
            problem = f"it answered {error.code} {error.reason}"
            if error.code != 429 and error.code < 500:
                break
        except (OSError, http.client.HTTPException) as error:
            problem = str(getattr(error, "reason", error)) or type(error).__name__
        except ValueError as error:
            raise BadInput(f"the reward server {url} gave no JSON: {error}. Wanted {{'scores': [...]}}.") from None
        else:
            scores = answer.get("scores") if isinstance(answer, dict) else answer
            return checked_scores(f"the reward server {url}", scores, batch)
    raise BadInput(f"the reward server {url} did not score the batch in {attempt + 1} attempts: {problem}. Is it up?")


def checked_scores(who: str, scores: Any, batch: Batch) -> Tensor:
    """Numbers from outside as float32 [B]; BadInput says who gave what for which row."""
    if isinstance(scores, Tensor):
        scores = scores.tolist()
    if isinstance(scores, str | Mapping) or not hasattr(scores, "__len__") or len(scores) != len(batch.ids):
        listed = hasattr(scores, "__len__") and not isinstance(scores, str | Mapping)
        found = f"{len(scores)} values" if listed else repr(scores)
        raise BadInput(f"{who} returned {found} for {len(batch.ids)} completions; wanted one each.")
    for row, score in enumerate(scores):
        try:
            finite = not isinstance(score, str) and math.isfinite(score)
        except (TypeError, ValueError):
            finite = False
        if not finite:
            raise BadInput(
                f"{who} returned {score!r} for row {row}; wanted a finite number. Its completion is "
                f"{str(batch.completions[row])[:200]!r}."
            )
    return torch.tensor([float(score) for score in scores])
