"""A model in several processes: whole in each of them (DDP), or shared out among them (FSDP2, HSDP).

Which of the two is the launcher's to say, by variables that `accelerate launch` sets from its configuration file.
Sharding is torch's own `fully_shard`, called here rather than through Accelerate, whose FSDP plugin is attached to the
backends of GPUs alone (`AcceleratorState.__init__`) and gives way to DDP on a CPU without a word: so one code path
serves both.

A sharded model is a double of the one that was given, of which it takes the parameters. The given one is empty between
the uses that need whole weights (evaluation, sampling, saving), and for these it is filled: plain tensors in a plain
module, which any code can read.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, patch_environment
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from lmkit.errors import BadInput
from lmkit.processes import is_set


@dataclass(frozen=True)
class Sharding:
    """num_replicas: groups of processes that hold a whole model each, one process a share. reshard_after_forward: free
    the gathered weights of a block until its backward, which gathers them again."""

    num_replicas: int
    reshard_after_forward: bool


def asked_sharding(num_processes: int) -> Sharding | None:
    """What the launcher's configuration asks for; None: a whole model in each process.

    BadInput for what lmkit's own loops do not do: DeepSpeed, FSDP1, offloading, and other dimensions of parallelism.
    """
    if is_set("ACCELERATE_USE_DEEPSPEED"):
        raise BadInput(
            "the launcher asked for DeepSpeed, which serves sft and reward alone. Pretraining, PPO and vision are "
            "sharded by accelerate_configs/fsdp2.yaml."
        )
    if not is_set("ACCELERATE_USE_FSDP") or num_processes == 1:
        return None
    wanted = {
        "FSDP_VERSION": ("2", "fsdp_version: 2"),
        "FSDP_OFFLOAD_PARAMS": ("false", "fsdp_offload_params: false"),
        "FSDP_CPU_RAM_EFFICIENT_LOADING": ("false", "fsdp_cpu_ram_efficient_loading: false"),
        "FSDP_ACTIVATION_CHECKPOINTING": ("false", "train.gradient_checkpointing in its place"),
    }
    wanted |= {f"PARALLELISM_CONFIG_{name}_SIZE": ("1", f"no {name.lower()}_size") for name in ("TP", "CP", "SP")}
    if wrong := [text for name, (value, text) in wanted.items() if os.environ.get(name, value).lower() != value]:
        raise BadInput(f"the launcher's configuration is not one that lmkit shards by; it wants {', '.join(wrong)}.")
    replicas = int(os.environ.get("PARALLELISM_CONFIG_DP_REPLICATE_SIZE", 1))
    shards = int(os.environ.get("PARALLELISM_CONFIG_DP_SHARD_SIZE", num_processes // replicas))
    if replicas * shards != num_processes:
        raise BadInput(
            f"dp_replicate_size {replicas} x dp_shard_size {shards} is not the number of processes, {num_processes}. "
            "Make dp_shard_size the GPUs of a machine, and dp_replicate_size the number of machines."
        )
    return Sharding(replicas, os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() != "false")


def plain_accelerator(mixed_precision: str) -> Accelerator:
    """An Accelerator that knows nothing of sharding: it gives processes, precision and devices."""
    with patch_environment(ACCELERATE_USE_FSDP="false", ACCELERATE_USE_PARALLELISM_CONFIG="false"):
        return Accelerator(mixed_precision=mixed_precision)


def prepare(module: nn.Module, accelerator: Accelerator, torch_compile: bool = False) -> nn.Module:
    """What training calls and updates: the module in DDP, its sharded double, or with one process the module itself;
    where it is compiled by blocks, a double.

    Build optimisers on what is returned. After it a sharded module is empty outside of `whole`. A module of which some
    updates leave parameters out says so by `leaves_parameters_out`; BadInput where it is to be sharded.
    """
    sharding, leaves_out = asked_sharding(accelerator.num_processes), getattr(module, "leaves_parameters_out", False)
    if sharding is None:
        # Gradients live in DDP's buckets rather than beside them: 4 bytes a parameter less.
        accelerator.ddp_handler = DistributedDataParallelKwargs(
            find_unused_parameters=leaves_out, gradient_as_bucket_view=True
        )
        if torch_compile and blocks(module):
            # The given one stays as it is: evaluation and sampling have other lengths at every turn.
            module = compile_parts(double_of(module.to(accelerator.device)))
        elif torch_compile:
            module.compile(dynamic=False)
        return accelerator.prepare_model(module)
    if leaves_out:
        raise BadInput("a model whose parts learn in turn cannot be sharded; launch with accelerate_configs/ddp.yaml.")
    if single := [name for name, parameter in module.named_parameters() if parameter.ndim == 0]:
        raise BadInput(
            f"{single[0]} is a single number, which cannot be shared out; launch with accelerate_configs/ddp.yaml."
        )
    for tensor in (*module.to(accelerator.device).parameters(), *module.buffers()):
        tensor.data = tensor.data.contiguous()  # what is channels last cannot be sharded
        torch.distributed.broadcast(tensor.data, 0)  # as DDP does: all start from the first one's
    # Sharding it copies no more than a block at a time.
    double = double_of(module)
    if torch_compile:
        compile_parts(double)
    shards = accelerator.num_processes // sharding.num_replicas
    mesh = init_device_mesh(
        accelerator.device.type, (sharding.num_replicas, shards), mesh_dim_names=("replicate", "shard")
    )
    options = {"mesh": mesh if sharding.num_replicas > 1 else mesh["shard"]}
    if accelerator.mixed_precision == "bf16":
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in blocks(double):
        fully_shard(block, reshard_after_forward=sharding.reshard_after_forward, **options)
    fully_shard(double, **options)
    empty(module)
    return accelerator.prepare_model(double, evaluation_mode=True)  # autocast, and no DDP


NUM_WIDTHS = 64  # batches are as wide as their longest row, to the next multiple of 16: 1,024 tokens have so many


def blocks(module: nn.Module) -> list[nn.Module]:
    """The layers that a transformers model names as its units; none in other modules, which are one unit."""
    names = {name for inner in module.modules() for name in getattr(inner, "_no_split_modules", None) or ()}
    return [inner for inner in module.modules() if type(inner).__name__ in names]


def double_of(module: nn.Module) -> nn.Module:
    """A copy that shares all tensors."""
    tensors = [*module.parameters(), *module.buffers()]
    return copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})


def compile_parts(module: nn.Module) -> nn.Module:
    """The module, its blocks and the loss after them compiled, each on its own.

    Alike blocks share what is compiled once. In one graph each would be compiled, and would take the sines and cosines
    of all positions anew for every head, forward and backward.
    """
    # A graph for each width of a batch: beyond torch's 8 all others would run uncompiled.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, NUM_WIDTHS)
    for block in blocks(module):
        block.compile(dynamic=False)
    if hasattr(module, "loss"):
        module.loss = torch.compile(module.loss, dynamic=False)
    return module


@contextlib.contextmanager
def whole(module: nn.Module, prepared: nn.Module, dtype: torch.dtype | None = None) -> Iterator[None]:
    """Inside the block `module` has all weights of what `prepare` made of it, in every process; all of them enter.

    The one gathering is at the start: no forward in the block waits for another process. dtype: what the weights are
    gathered in; None: as they are kept. Nothing is done where they are whole already.
    """
    if not is_empty(module):
        yield
        return
    fill(module, prepared, dtype)
    try:
        yield
    finally:
        empty(module)


@torch.no_grad()
def fill(module: nn.Module, prepared: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Gives an empty module the whole weights for good; one that was never emptied has them."""
    if is_empty(module):
        for own, shared in zip(module.parameters(), prepared.parameters(), strict=True):
            own.data = full(shared).to(dtype or shared.dtype)


def is_empty(module: nn.Module) -> bool:
    """Whether the weights of a module are in its sharded double alone."""
    return all(parameter.numel() == 0 for parameter in module.parameters())


def empty(module: nn.Module) -> None:
    """Lets go of a module's weights; its buffers stay."""
    for parameter in module.parameters():
        parameter.data = parameter.data.new_empty(0)


def compute_dtype(accelerator: Accelerator) -> torch.dtype | None:
    """What sharded weights are gathered in for a forward; None: as they are kept."""
    return torch.bfloat16 if accelerator.mixed_precision == "bf16" else None


def full(tensor: Tensor) -> Tensor:
    """A whole tensor of one that may be sharded; all processes call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
