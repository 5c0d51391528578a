import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lmkit.errors import BadInput, Interrupted
from lmkit.processes import check_launcher, join, lost_another, require_one, run_group


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "ACCELERATE_USE_CPU"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_one_process_needs_no_launcher():
    check_launcher()
    require_one("this")


def test_what_is_one_process_refuses_several(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(BadInput, match=r"rlhf.py is one process, and the launcher started 2"):
        require_one("rlhf.py")


def test_a_launcher_that_starts_one_of_several_is_seen(monkeypatch):
    """`accelerate launch --cpu --num_processes 2` sets these, and nothing that says 2."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    check_launcher()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(BadInput, match="asked for several processes and started this one alone"):
        check_launcher()
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_launcher()


def test_deepspeed_is_refused_where_it_would_silently_be_left_out_or_is_not_there(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BadInput, match=r"DeepSpeed, which is not installed: pip install -e \.\[deepspeed\]"):
        join()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(BadInput, match=r"DeepSpeed and for CPUs, where Accelerate trains by DDP .*ddp\.yaml"):
        join()


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:3"), True),
        (RuntimeError("Timed out waiting 15000ms for recv operation to complete"), True),
        (RuntimeError("shape '[2]' is invalid for input of size 3"), False),
        (ValueError("Timed out waiting"), False),
    ],
)
def test_a_lost_process_is_told_from_a_bug(monkeypatch, error, lost):
    assert not lost_another(error), "one process has no other to lose"
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert lost_another(error) == lost


def python(code):
    return [sys.executable, "-c", code]


@pytest.mark.parametrize(("code", "status"), [("raise SystemExit(5)", 5), ("import os; os.kill(os.getpid(), 9)", -9)])
def test_a_commands_exit_code_is_given_back(code, status):
    assert run_group(python(code)) == status


def test_signals_are_passed_on_and_the_old_handlers_are_back():
    before = signal.getsignal(signal.SIGTERM)
    ready = (
        "import signal, sys, time\nsignal.signal(15, lambda *a: sys.exit(75))\nimport os\nos.kill(os.getppid(), 15)\n"
    )
    assert run_group(python(ready + "time.sleep(30)")) == 75
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_signal_that_comes_as_the_command_ends_is_not_lost():
    with pytest.raises(Interrupted, match="SIGTERM received"):
        run_group(python("import os, signal; signal.signal(15, signal.SIG_IGN); os.kill(os.getppid(), 15)"))


def test_a_child_dies_with_its_parent(tmp_path):
    child = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    parent = f"from lmkit.processes import run_group; run_group([{sys.executable!r}, '-c', {child!r}])"
    process = subprocess.Popen(python(parent))
    deadline = time.monotonic() + 30
    while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait()
    pid = int((tmp_path / "pid").read_text())
    while is_alive(pid):
        assert time.monotonic() < deadline, "the child outlives a parent that was killed"
        time.sleep(0.01)


def is_alive(pid):
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
