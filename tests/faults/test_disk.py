"""A disk that fills up, a quota, a read-only folder: one line that names the path, nothing lost, and on it goes."""

import resource
import shutil
import subprocess

import pytest

from lmkit.stage import latest_checkpoint
from tests.faults.harness import broken

STAGES = ("tokenizer", "pretrain", "sft", "preferences", "reward", "ppo", "evaluation")


@pytest.fixture
def small_disk(tmp_path):
    """A function that mounts a file system of so many bytes; the test is skipped where that is not allowed."""
    mounted = []

    def mount(num_bytes):
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", folder], capture_output=True, check=False
        )
        if done.returncode:
            pytest.skip("mounting a small file system needs root")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", folder], check=True)


def size_of(folder):
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def full(output):
    lines = [line for line in output.splitlines() if "No space left for" in line]
    return len(lines) == 1 and "Traceback" not in output


@pytest.mark.parametrize("stage", STAGES)
def test_a_full_disk(harness, tally, everything, small_disk, stage):
    """T10 the disk fills up at five places of the run"""
    if not everything and stage in ("reward", "ppo", "evaluation"):
        pytest.skip("a sample: FAULTS=all tries each")
    whole = size_of(harness.reference(stage)) + (2 << 20)
    places = (0.02, 0.25, 0.45, 0.6, 0.8) if everything else (0.45,)
    stopped = 0
    for place in places:
        disk = small_disk(4 * whole)
        filler = disk / "filler"
        room = int(place * whole)
        filler.write_bytes(b"\0" * max(shutil.disk_usage(disk).free - room, 0))
        directory = disk / "run" / stage
        code, output = harness.run(stage, directory)
        if code == 0:
            tally.count(True)  # there was room for it
            continue
        stopped += 1
        assert tally.count(code == 75 and full(output)), output[-2000:]
        assert str(directory) in output
        assert broken(directory) == []
        before = latest_checkpoint(directory / "checkpoints")
        filler.unlink()
        code, output = harness.run(stage, directory)
        assert code == 0, output[-2000:]
        assert before is None or "from step" in output or "going on" in output
        harness.assert_same(stage, directory)
    tally.figure = f"{stopped} stopped with one line, all went on exactly"


class FileLimit:
    """In the child: no file may grow beyond so many bytes, as under `ulimit -f` or a quota."""

    def __init__(self, num_bytes):
        self.num_bytes = num_bytes

    def __call__(self):
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.num_bytes, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_a_limit_on_file_sizes(harness, tally, stage):
    """T10 ulimit -f in the middle of a checkpoint's tensors"""
    largest = max(p.stat().st_size for p in (harness.reference(stage) / "checkpoints").rglob("*") if p.is_file())
    directory = harness.fresh(stage)
    code, output = harness.run(stage, directory, hook=FileLimit(largest // 2))
    assert tally.count(code == 75 and full(output)), output[-2000:]
    code, output = harness.run(stage, directory)
    assert code == 0, output
    harness.assert_same(stage, directory)
    tally.figure = "one line, went on exactly"


def test_a_read_only_directory(harness, tally, small_disk):
    """T10 a directory that cannot be written"""
    disk = small_disk(1 << 20)
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    code, output = harness.run("pretrain", disk / "pretrain")
    assert tally.count(code == 2 and "cannot be written (Read-only file system)" in output), output
    assert "Traceback" not in output
    file = harness.folder / "a-file"
    file.write_text("")
    code, output = harness.run("pretrain", file)
    assert tally.count(code == 2 and "cannot be written (File exists)" in output), output
    tally.figure = "exit 2, one line"
