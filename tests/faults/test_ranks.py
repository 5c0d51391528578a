"""Two processes: as many as were asked for or none; a dead or silent one ends the run soon, and nobody is left."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from lmkit.stage import read_record
from tests.faults.harness import ROOT, broken, visible
from tests.faults.test_non_finite import Poison, finite
from tests.faults.test_signals import alive

TIMEOUT_SECONDS = 15
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch"]


def ranks(harness, stage, directory, *flags, hooks=(None, None)):
    """Two children as a launcher would start them."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    common |= {"ACCELERATE_USE_CPU": "true", "LMKIT_TIMEOUT_SECONDS": str(TIMEOUT_SECONDS)}
    places = [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    started = zip(places, hooks)
    return [harness.start(stage, directory, *flags, environment=place, hook=hook) for place, hook in started]


def wait(children, seconds=120):
    for child in children:
        child.join(seconds)
    return [child.exitcode for child in children]


FLAGS = {
    "pretrain": ["--train.per_device_train_batch_size", 2],
    "sft": ["--train.per_device_train_batch_size", 2],
    "ppo": [],
}


@pytest.mark.parametrize("stage", FLAGS)
def test_a_process_dies_or_hangs(harness, tally, everything, stage):
    """T8 one of two processes is killed or stands still"""
    if not everything and stage != "sft":
        pytest.skip("a sample: FAULTS=all tries each")
    whole = harness.fresh(stage)
    children = ranks(harness, stage, whole, *FLAGS[stage])
    assert wait(children) == [0, 0], children[0].log.read_text()[-3000:]
    slowest = {}
    faults = [(1, signal.SIGKILL), (0, signal.SIGKILL), (1, signal.SIGSTOP)]
    for victim, number in faults if everything else faults[2:]:
        directory = harness.fresh(stage)
        children = ranks(harness, stage, directory, *FLAGS[stage])
        while not list((directory / "checkpoints").glob("step-*")):
            time.sleep(0.005)
        sent = time.monotonic()
        os.kill(children[victim].pid, number)
        other = children[1 - victim]
        other.join(TIMEOUT_SECONDS + 30)
        took = time.monotonic() - sent
        children[victim].kill()
        children[victim].join()
        limit = TIMEOUT_SECONDS + 10 if number == signal.SIGSTOP else 10
        held = other.exitcode not in (None, 0) and took < limit and broken(directory) == []
        assert tally.count(held), f"{other.exitcode} after {took:.1f} s: {other.log.read_text()[-2000:]}"
        slowest[number.name] = round(max(slowest.get(number.name, 0), took), 1)
        if victim == 1:
            ending = json.loads((directory / "exit.json").read_text())
            assert ending["code"] == 75, ending
        codes = wait(ranks(harness, stage, directory, *FLAGS[stage]))
        assert codes == [0, 0], other.log.read_text()[-3000:]
        assert read_record(directory)["artifacts"] == read_record(whole)["artifacts"], "resumed to other bytes"
    tally.figure = f"seconds until the other ended: {slowest}, then bit for bit"


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("stage", FLAGS)
def test_a_number_that_is_not_finite_in_one_process(harness, tally, everything, stage, what):
    """T11 not finite in the second process alone"""
    if not everything:
        pytest.skip("a sample: FAULTS=all tries each")
    directory = harness.fresh(stage)
    children = ranks(harness, stage, directory, *FLAGS[stage], hooks=(None, Poison(what, float("nan"), 3)))
    codes = wait(children)
    # A loss is summed over the processes; a gradient is spoilt here after it was, so the first only misses the second.
    wanted = [4, 4] if what == "loss" else [75, 4]
    assert tally.count(codes == wanted), f"{codes}: {children[0].log.read_text()[-2000:]}"
    assert json.loads((directory / "exit.json").read_text())["code"] == wanted[0]
    assert all(finite(folder) for folder in visible(directory))
    tally.figure = f"exit {codes[0]} and {codes[1]}"


def launch(harness, directory, *options, stage="sft", **environment):
    config = harness.folder / "configs" / f"{stage}.yaml"
    command = [*LAUNCH, *options, f"recipes/{stage}.py", "--config", str(config), "--output_dir", str(directory)]
    return subprocess.Popen(
        command, cwd=ROOT, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.parametrize(
    ("options", "stage", "said"),
    [
        (["--cpu", "--num_processes", "2"], "sft", "asked for several processes and started this one alone"),
        (["--multi_gpu", "--num_processes", "2", "--main_process_port", "0"], "ppo", "each of them works alone"),
        (["--multi_gpu", "--num_processes", "2", "--main_process_port", "0"], "tokenizer", "is one process"),
    ],
    ids=["--cpu", "--multi_gpu on a CPU", "tokenizer"],
)
def test_another_number_of_processes_than_asked_for(harness, tally, everything, options, stage, said):
    """T8 the launcher's traps: exit 2 before the first step"""
    if not everything and options[0] != "--cpu":
        pytest.skip("a sample: FAULTS=all tries each")
    directory = harness.fresh(stage)
    process = launch(harness, directory, *options, stage=stage)
    output, _ = process.communicate(timeout=120)
    told = json.loads((directory / "exit.json").read_text())["code"]
    assert tally.count(process.returncode != 0 and told == 2 and said in output), output[-3000:]
    assert not (directory / "metrics.jsonl").exists()
    tally.figure = "exit 2 in exit.json"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=lambda number: number.name)
def test_the_launcher_is_stopped(harness, tally, everything, number):
    """T9 the launcher alone gets a signal: its processes end, saved or not"""
    if not everything:
        pytest.skip("a sample: FAULTS=all tries each")
    directory = harness.fresh("pretrain")
    options = ["--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    process = launch(harness, directory, *options, stage="pretrain", ACCELERATE_USE_CPU="true")
    while not list((directory / "checkpoints").glob("step-*")):
        assert process.poll() is None, process.stdout.read()[-3000:]
        time.sleep(0.01)
    holder = int((directory / ".lock").read_text().split()[1])
    children = [
        int(pid)
        for pid in subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    ]
    process.send_signal(number)
    deadline = time.monotonic() + 10
    while any(map(alive, {*children, holder})) and time.monotonic() < deadline:
        time.sleep(0.05)
    took = time.monotonic() - deadline + 10
    process.kill()
    process.communicate()
    assert tally.count(not any(map(alive, {*children, holder}))), "a process outlives its launcher by ten seconds"
    if not (directory / "stage.json").exists():
        assert json.loads((directory / "exit.json").read_text())["code"] == 75
    tally.figure = f"all gone after {took:.1f} s, exit 75 in exit.json"
