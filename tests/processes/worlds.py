"""Several processes as a launcher would start them, forked from a server that has imported everything."""

import importlib
import os
import socket
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from lmkit.stage import run
from tests.faults.harness import PRELOAD, ROOT, config_class, serve

VISION = ["sklearn.datasets", "sklearn.metrics", "matplotlib.pyplot", "lmkit.vision.classifier", "lmkit.vision.data"]
CONFIGS = ROOT / "accelerate_configs"


def launched_with(config, num_processes, *flags):
    """The variables that `accelerate launch --config_file CONFIG FLAGS` sets, by its own code."""
    before = dict(os.environ)
    arguments = ["--config_file", str(CONFIGS / config), "--num_processes", str(num_processes), *flags, "script.py"]
    args = launch_command_parser().parse_args(arguments)
    args, *_ = _validate_launch_command(args)
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ""  # they matter beside a DeepSpeed file alone
        found = prepare_deepspeed_cmd_env(args)[1]
    else:
        found = prepare_multi_gpu_env(args)
    os.environ.clear()
    os.environ.update(before)
    return {name: value for name, value in found.items() if before.get(name) != value and value is not None}


def task_in_world(environment, log, task, arguments):
    """In a child: one process's part of a task; the folder `log` has its output."""
    output = os.open(log, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(environment)
    os.chdir(ROOT)
    task(*arguments)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # gloo aborts where one process is gone while another still closes
        torch.distributed.destroy_process_group()


def recipe(name, *argv):
    """A task: `python recipes/NAME.py ARGV`."""
    sys.argv = [f"recipes/{name}.py", *map(str, argv)]
    module = importlib.import_module(name.replace("/", "."))
    run(module.main, config_class(module), module.__doc__)


def with_deepspeed(name, *argv):
    """A task: a recipe under DeepSpeed on gloo. Accelerate offers it to GPUs alone, unless there is a world already."""
    PartialState(cpu=False, backend="gloo")
    recipe(name, *argv)


class Worlds:
    """Runs tasks (functions of a module under tests/) in any number of processes."""

    def __init__(self, folder):
        self.context, self.folder, self.number = serve(), Path(folder), 0
        self.context.set_forkserver_preload(PRELOAD + VISION)

    def run(self, num_processes, task, *arguments, config=None, **environment):
        """Runs `task(*arguments)` in so many processes that know of each other; all have to end well.

        config: a file in accelerate_configs.
        """
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = str(server.getsockname()[1])
        common = launched_with(config, num_processes) if config else {}
        common |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "LMKIT_TIMEOUT_SECONDS": "60"}
        if num_processes > 1:
            common |= {"WORLD_SIZE": str(num_processes), "LOCAL_WORLD_SIZE": str(num_processes)}
            common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        common |= environment
        self.number += 1
        children = []
        for rank in range(num_processes):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if num_processes > 1 else {}
            log = self.folder / f"{self.number}.{rank}.log"
            child = self.context.Process(target=task_in_world, args=(common | place, log, task, arguments))
            child.log = log
            child.start()
            children.append(child)
        for child in children:
            child.join(180)
            if child.is_alive():
                child.kill()
        wrong = [child.log.read_text()[-4000:] for child in children if child.exitcode]
        assert not wrong, "\n\n".join(wrong)
