"""Work shared out among processes: a rollout that all of them know, and about as many tokens for each to learn from."""

import itertools
from collections.abc import Sequence
from dataclasses import fields
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from torch.nn.functional import pad

from lmkit.generation.sampler import Completions
from lmkit.rl.rollout import Rollout

Rows = TypeVar("Rows", Rollout, Completions)


def gathered(rows: Rows, accelerator: Accelerator) -> Rows:
    """The rows of all processes, in the order of the processes, in each of them."""
    if accelerator.num_processes == 1:
        return rows
    parts = gather_object([rows])
    joined = {}
    for field in fields(rows):
        values = [getattr(part, field.name) for part in parts]
        if isinstance(values[0], list):
            joined[field.name] = list(itertools.chain(*values))
        else:
            width = max(value.shape[-1] for value in values)
            joined[field.name] = torch.cat([pad(v, (0, width - v.shape[-1])) if v.ndim == 2 else v for v in values])
    return type(rows)(**joined)


def shares(costs: Sequence[int], num_shares: int) -> list[list[int]]:
    """Item numbers in groups of like total cost, none of more than its part of the items, rounded up.

    The costliest first, each to the group that has the least so far among those with room (Graham, Bounds on
    multiprocessing timing anomalies, 1969).

    >>> shares([9, 1, 5, 5, 1, 9], 2)
    [[0, 2, 1], [5, 3, 4]]
    """
    room, totals = -(-len(costs) // num_shares), [0] * num_shares
    groups: list[list[int]] = [[] for _ in totals]
    for item in sorted(range(len(costs)), key=lambda item: -costs[item]):
        open_groups = [number for number, group in enumerate(groups) if len(group) < room]
        least = min(open_groups, key=totals.__getitem__)
        groups[least].append(item)
        totals[least] += costs[item]
    return groups


def micro_batches(lengths: Tensor, batch_size: int, process: int, num_processes: int) -> list[tuple[Tensor, bool]]:
    """This process's rows of a mini-batch in groups of at most `batch_size`, rows of like length together.

    lengths: tokens of each row of the mini-batch, over all processes. With each group stands whether its rows count:
    processes with fewer groups than others go through a row once more, for nothing, since all have to take part when
    gradients are exchanged.
    """
    rows = torch.arange(len(lengths))
    if num_processes > 1:
        rows = torch.tensor(sorted(shares(lengths.tolist(), num_processes)[process]), dtype=torch.long)
    ordered = rows[lengths[rows].argsort(stable=True, descending=True)]
    groups = [(group, True) for group in ordered.split(batch_size) if len(group)]
    most = -(-len(lengths) // num_processes)
    idle = -(-most // batch_size) - len(groups)
    return groups + [(torch.tensor([int(lengths.argmin())]), False)] * idle
