"""SIGTERM and Ctrl-C: finish the step, save, exit 75 soon; a second one exits at once; the same command goes on."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from lmkit.rounds import CHAIN
from lmkit.stage import read_record
from tests.faults.harness import ROOT, SAVES, broken, newest_step

LIMIT_SECONDS = 10


@pytest.mark.parametrize("stage", CHAIN)
def test_signals_at_random_instants(harness, tally, everything, stage):
    """T7 SIGTERM and Ctrl-C at random instants"""
    if not everything and stage in ("tokenizer", "reward", "evaluation"):
        pytest.skip("a sample: FAULTS=all tries each")
    slowest, tries = 0.0, 6 if everything else 1
    while tally.tried < tries:
        directory = harness.fresh(stage)
        child = harness.start(stage, directory)
        while not child.log.exists():
            time.sleep(0.005)
        time.sleep(harness.random.uniform(0.1, 0.9) * harness.seconds[stage])
        if not child.is_alive():
            continue
        sent = time.monotonic()
        os.kill(child.pid, signal.SIGINT if tally.tried % 2 else signal.SIGTERM)
        child.join(60)
        took = time.monotonic() - sent
        if child.exitcode == 0:
            continue  # the signal found it at its very end
        log = child.log.read_text()
        held = child.exitcode == 75 and took < LIMIT_SECONDS and broken(directory) == []
        assert tally.count(held), f"code {child.exitcode} after {took:.1f} s: {log[-2000:]}"
        slowest = max(slowest, took)
        assert "Go on with the same command" in log
        if directory.exists():
            assert read_record(directory) is None
            assert json.loads((directory / "exit.json").read_text())["code"] == 75
        if "saving" in log and stage in SAVES:
            assert newest_step(directory) > 0
        code, output = harness.run(stage, directory)
        assert code == 0, output
        harness.assert_same(stage, directory)
    tally.figure = f"exit 75 within {slowest:.1f} s, all ends equal"


class SlowSave:
    """In the child: the seal of a checkpoint takes five seconds, so that a second signal meets it."""

    def __call__(self):
        import lmkit.training.checkpoint as checkpoint

        save_file = checkpoint.save_file

        def slow(*args, **kwargs):
            time.sleep(5)
            save_file(*args, **kwargs)

        checkpoint.save_file = slow


def test_a_second_signal_exits_at_once(harness, tally):
    """T7 a second signal, in the middle of a save"""
    directory = harness.fresh("pretrain")
    child = harness.start("pretrain", directory, hook=SlowSave())
    while not list((directory / "checkpoints").glob(".staging-*")):
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGTERM)
    time.sleep(0.3)
    assert child.is_alive()
    sent = time.monotonic()
    os.kill(child.pid, signal.SIGTERM)
    child.join(30)
    took = time.monotonic() - sent
    assert tally.count(child.exitcode == 75 and took < 1), f"code {child.exitcode} after {took:.1f} s"
    assert "second" in json.loads((directory / "exit.json").read_text())["reason"]
    code, output = harness.run("pretrain", directory)
    assert code == 0, output
    harness.assert_same("pretrain", directory)
    tally.figure = f"{took:.2f} s"


def test_the_chain_stops_with_its_stage(harness, tally, everything):
    """T7, T9 SIGTERM and SIGKILL of rlhf.py: the stage ends too, the next one is not started"""
    for number in (signal.SIGTERM, signal.SIGKILL) if everything else (signal.SIGKILL,):
        runs = harness.folder / f"chain-{number}"
        command = [sys.executable, "recipes/rlhf.py", "--config", str(harness.folder / "chain.yaml")]
        command += ["--runs_dir", str(runs), "--to", "pretrain", "--tokenizer.num_processes", "1"]
        chain = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        while not (runs / "chain" / "tokenizer" / "plan.json").exists():
            time.sleep(0.02)
        holder = int((runs / "chain" / "tokenizer" / ".lock").read_text().split()[1])
        chain.send_signal(number)
        output, _ = chain.communicate(timeout=60)
        deadline = time.monotonic() + 5
        while alive(holder) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert tally.count(not alive(holder)), "the stage outlives the chain"
        assert not (runs / "chain" / "pretrain").exists()
        if number == signal.SIGTERM:
            assert chain.returncode == 75
            assert "To go on:" in output or "Go on with the same command" in output
    tally.figure = "no orphan after 5 s"


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
