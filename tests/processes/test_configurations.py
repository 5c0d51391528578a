"""Every file in accelerate_configs is one that accelerate reads, and asks of lmkit what its first line says."""

import subprocess

import pytest
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.utils import DistributedType

from lmkit.training import sharding
from lmkit.training.sharding import Sharding
from tests.processes.worlds import CONFIGS, launched_with

FILES = sorted(path.name for path in CONFIGS.glob("*.yaml"))
KINDS = {
    "cpu.yaml": (DistributedType.NO, None),
    "ddp.yaml": (DistributedType.MULTI_GPU, None),
    "fsdp2.yaml": (DistributedType.FSDP, Sharding(1, True)),
    "hsdp_multinode.yaml": (DistributedType.FSDP, Sharding(2, True)),
    "zero2.yaml": (DistributedType.DEEPSPEED, None),
    "zero3.yaml": (DistributedType.DEEPSPEED, None),
}


def test_there_is_a_file_for_each_way_to_launch():
    assert sorted(KINDS) == FILES


@pytest.mark.parametrize("name", FILES)
def test_accelerate_reads_the_file_and_its_first_line_says_when_to_use_it(name):
    text = (CONFIGS / name).read_text()
    assert text.startswith("# For ")
    config = load_config_from_file(str(CONFIGS / name))
    assert isinstance(config, ClusterConfig)
    assert config.distributed_type == KINDS[name][0]
    assert config.use_cpu == (name == "cpu.yaml")
    assert "bf16" in text or name == "cpu.yaml"
    if name.startswith("zero"):
        assert config.deepspeed_config["zero_stage"] == int(name[4])


@pytest.mark.parametrize("name", ["ddp.yaml", "fsdp2.yaml", "hsdp_multinode.yaml"])
def test_what_the_launcher_sets_is_what_lmkit_shards_by(name, monkeypatch):
    for variable, value in launched_with(name, 16).items():
        monkeypatch.setenv(variable, value)
    assert sharding.asked_sharding(16) == KINDS[name][1]


def test_a_machine_of_slurm_starts_its_processes_by_the_configuration_of_several_machines(tmp_path, monkeypatch):
    """The script with stand-ins for Slurm's commands, as the second of four machines."""
    for command, body in {"scontrol": "echo alpha; echo beta", "srun": 'shift; exec "$@"'}.items():
        (tmp_path / command).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / command).chmod(0o755)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/accelerate").write_text('#!/bin/bash\necho "$@"\n')
    (tmp_path / ".venv/bin/accelerate").chmod(0o755)
    slurm = {"SLURM_NNODES": "4", "SLURM_NODEID": "1", "SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_NODELIST": "alpha,beta"}
    command = ["bash", str(CONFIGS / "slurm.sbatch"), "pretrain", "--train.max_steps", "9", "--run", "two words"]
    environment = slurm | {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = done.stdout
    assert "--num_machines 4 --machine_rank 1 --num_processes 32 --main_process_ip alpha" in said
    assert "dp_replicate_size 4 --parallelism_config_dp_shard_size 8 recipes/pretrain.py --train.max_steps 9" in said
    flags = said.split("--main_process_port 29500 ")[1].split(" recipes/")[0].split()
    for variable, value in launched_with("hsdp_multinode.yaml", 32, "--num_machines", "4", *flags).items():
        monkeypatch.setenv(variable, value)
    assert sharding.asked_sharding(32) == Sharding(4, True)
