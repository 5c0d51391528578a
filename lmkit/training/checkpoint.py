"""Checkpoints: every tensor in safetensors, everything else in state.json, visible only when whole. No pickle.

Tensors are gathered to full size, so a checkpoint written by any number of processes is resumed by any other.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from lmkit.artifact import seal
from lmkit.errors import Stopped
from lmkit.training.sharding import full

_FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


def save(path: Path, *, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
    """Writes folder `path`: one safetensors file a group of tensors, and state.json. Call it in the main process alone.

    A tensor that appears under several names of a group (tied weights) is stored once. Raises Stopped, and writes
    nothing, when one holds a number that is not finite; OSError (ENOSPC) when there is no space.
    """
    check_finite({f"{group}/{name}": tensor for group, named in tensors.items() for name, tensor in named.items()})
    with seal(path, num_bytes(tensor for named in tensors.values() for tensor in named.values())) as folder:
        for group, named in tensors.items():
            first: dict[tuple, str] = {}
            aliases = {}
            for name, tensor in named.items():
                key = (tensor.data_ptr(), tensor.shape, tensor.dtype) if tensor.numel() else (name,)
                if (owner := first.setdefault(key, name)) != name:
                    aliases[name] = owner
            unique = {name: named[name].detach().cpu().contiguous() for name in first.values()}
            save_file(unique, folder / f"{group}.safetensors", metadata={"aliases": json.dumps(aliases)})
        (folder / "state.json").write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Stopped, naming the first tensor that holds NaN or infinity: what is saved can be gone on from.

    Of tensors in shares all processes call it, and all of them are told.
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not full(tensor.detach().isfinite().all()):
            raise Stopped(f"{name} holds numbers that are not finite, so nothing was saved. Lower the learning rate.")


def num_bytes(tensors: Iterable[Tensor]) -> int:
    """What tensors take on a disk, memory that several of them share counted once."""
    return sum({t.data_ptr() or id(t): t.numel() * t.element_size() for t in tensors}.values())


def load(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """(tensors by group and name, state) that `save` wrote."""
    tensors: dict[str, dict[str, Tensor]] = {}
    for file in sorted(Path(path).glob("*.safetensors")):
        with safe_open(file, "pt") as handle:
            named = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 - not a dict
            for name, owner in json.loads((handle.metadata() or {}).get("aliases", "{}")).items():
                named[name] = named[owner]
        tensors[file.stem] = named
    return tensors, json.loads((Path(path) / "state.json").read_text(encoding="utf-8"))


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Full parameters and buffers by name, without wrappers' prefixes. All processes call it, the main one gets it."""
    return get_model_state_dict(model, options=_FULL)


def optimizer_tensors(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Full state of the optimisers as {"parameter name/state name": tensor}. All processes call it."""
    state = get_optimizer_state_dict(model, optimizers, options=_FULL).get("state", {})
    return {f"{name}/{key}": value for name, values in state.items() for key, value in values.items()}


def load_model(model: nn.Module, tensors: Mapping[str, Tensor], *, strict: bool = True) -> None:
    """Sets what `model_tensors` returned, in every process, whatever way the model is distributed.

    strict: every tensor of the model has to be given; otherwise those that are not keep their values.
    """
    set_model_state_dict(model, dict(tensors), options=replace(_FULL, strict=strict))


def load_optimizers(
    model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], tensors: Mapping[str, Tensor]
) -> None:
    """Sets what `optimizer_tensors` returned; learning rates and other settings stay as the optimisers have them."""
    saved: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, _, entry = key.rpartition("/")
        saved.setdefault(name, {})[entry] = value
    for optimizer in optimizers:
        groups = get_optimizer_state_dict(model, [optimizer])["param_groups"]
        state = {name: saved[name] for group in groups for name in group["params"] if name in saved}
        whole = {"state": state, "param_groups": groups}
        set_optimizer_state_dict(model, [optimizer], optim_state_dict=whole, options=_FULL)
        for parameter, entries in optimizer.state.items():
            for entry, value in entries.items():
                # Fused kernels walk parameter and moment by one order of memory, such as channels last.
                if value.shape == parameter.shape and value.stride() != parameter.stride():
                    entries[entry] = torch.empty_like(parameter).copy_(value)


def random_tensors() -> dict[str, Tensor]:
    """torch's generators of all processes, as byte tensors by "device.process". All processes call it."""
    local = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        local["cuda"] = torch.cuda.get_rng_state()
    return {f"{kind}.{rank}": t for rank, states in enumerate(gather_object([local])) for kind, t in states.items()}


def load_random(tensors: Mapping[str, Tensor], rank: int) -> None:
    """Sets this process's generators. A process that did not exist when the checkpoint was written keeps its own."""
    if (state := tensors.get(f"cpu.{rank}")) is not None:
        torch.set_rng_state(state)
    if torch.cuda.is_available() and (state := tensors.get(f"cuda.{rank}")) is not None:
        torch.cuda.set_rng_state(state)
