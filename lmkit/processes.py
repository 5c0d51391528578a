"""The processes of one run: as many as were asked for, none waiting for another for ever, none left behind."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import signal
import subprocess
import sys
from datetime import timedelta
from typing import TYPE_CHECKING

from lmkit.errors import BadInput, Interrupted

if TYPE_CHECKING:
    from accelerate import Accelerator, PartialState

TIMEOUT_SECONDS = 600
TWO_ON_A_CPU = "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes {} ..."
_PR_SET_PDEATHSIG = 1
# What gloo and NCCL say when a process they wait for is gone or silent.
_LOST = ("Connection closed by peer", "Connection reset by peer", "Timed out waiting", "gloo/transport", "NCCL")


def num_asked() -> int:
    """How many processes the launcher says there are; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_set(name: str) -> bool:
    """Whether an environment variable says yes, as Accelerate reads it."""
    return os.environ.get(name, "").lower() in ("1", "true", "yes", "y", "t", "on")


def is_main() -> bool:
    """Whether this process writes: rank 0, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def require_one(what: str) -> None:
    """BadInput when a launcher started several processes of a program that is one."""
    if num_asked() > 1:
        raise BadInput(f"{what} is one process, and the launcher started {num_asked()}. Run it with plain python.")


def check_launcher() -> None:
    """BadInput when `accelerate launch` was asked for several processes and started one, as `--cpu` makes it do."""
    # For several processes it names an address to meet at, and only a launcher that starts them numbers them.
    if {"ACCELERATE_USE_CPU", "MASTER_ADDR"} <= os.environ.keys() and "WORLD_SIZE" not in os.environ:
        raise BadInput(
            "accelerate launch was asked for several processes and started this one alone: with --cpu, or without "
            f"--multi_gpu, it does so silently. On CPUs: `{TWO_ON_A_CPU.format('N')}`."
        )


def join() -> PartialState:
    """This process's place among those of the launcher, after meeting them; one process is a world of its own.

    BadInput when the launcher started several and they do not know of each other. A process that the others wait for
    longer than LMKIT_TIMEOUT_SECONDS (600), in a collective or at a barrier, is taken for dead, and the run ends.
    """
    from accelerate import PartialState

    # Accelerator alone looks at this variable; a bare PartialState would meet nobody on a CPU.
    cpu = is_set("ACCELERATE_USE_CPU")
    if is_set("ACCELERATE_USE_DEEPSPEED") and cpu:
        raise BadInput(
            "the launcher asked for DeepSpeed and for CPUs, where Accelerate trains by DDP without a word. Launch with "
            "accelerate_configs/ddp.yaml, or leave ACCELERATE_USE_CPU out."
        )
    if is_set("ACCELERATE_USE_DEEPSPEED") and importlib.util.find_spec("deepspeed") is None:
        raise BadInput("the launcher asked for DeepSpeed, which is not installed: pip install -e .[deepspeed].")
    seconds = float(os.environ.get("LMKIT_TIMEOUT_SECONDS", TIMEOUT_SECONDS))
    state = PartialState(cpu=cpu, timeout=timedelta(seconds=seconds))
    if num_asked() != state.num_processes:
        raise BadInput(
            f"the launcher started {num_asked()} processes, but each of them works alone. On CPUs launch with "
            f"`{TWO_ON_A_CPU.format(num_asked())}`."
        )
    return state


def any_process(flag: bool, accelerator: Accelerator) -> bool:
    """Whether the flag is set in any process; every process has to ask."""
    if accelerator.num_processes == 1:
        return flag
    import torch

    return bool(accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), reduction="sum"))


def lost_another(error: BaseException) -> bool:
    """Whether an exception says that another process of this run died or does not answer."""
    return num_asked() > 1 and isinstance(error, RuntimeError) and any(text in str(error) for text in _LOST)


def die_with_parent() -> None:
    """Asks Linux to send SIGTERM to this process when its parent is gone, also after a SIGKILL; elsewhere nothing."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def run_group(command: list[str]) -> int:
    """Runs a command as a process group of its own, passing SIGTERM and Ctrl-C on to it; its exit code.

    A code below 0 is the signal that ended it; the rest of the group is killed then. When this process is killed, the
    command gets SIGTERM. Raises Interrupted when there was a signal and the command ended well all the same.
    """
    process, early, asked = None, [], []

    def forward(number: int, frame: object) -> None:
        asked.append(number)
        if process is None:
            early.append(number)
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)

    handlers = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    process = subprocess.Popen(command, start_new_session=True, preexec_fn=die_with_parent)
    for number in early:
        forward(number, None)
    code = process.wait()
    if code < 0:
        forward(signal.SIGKILL, None)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if asked and code == 0:  # it was through before the signal met it; what comes after it must not start
        raise Interrupted(f"{signal.Signals(asked[0]).name} received as {command[-1]} ended.")
    return code
