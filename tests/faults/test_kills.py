"""A stage may be killed at any instant: nothing half-made is visible, it goes on, and ends in the same bytes."""

import json
import multiprocessing
import os
import time

import pytest

from lmkit.artifact import seal
from lmkit.rounds import CHAIN
from lmkit.stage import Stage, latest_checkpoint, rotate
from tests.faults.harness import (
    SAVES,
    announce,
    broken,
    kill_at,
    last_logged,
    newest_step,
    torn,
)

SAVE_STEPS = {"pretrain": 2, "sft": 2, "reward": 2, "ppo": 1}
SAVE_SECONDS = 0.03


@pytest.mark.parametrize("stage", CHAIN)
def test_random_kills(harness, tally, everything, stage):
    """T1 SIGKILL at random instants"""
    if not everything and stage in ("reward", "evaluation"):
        pytest.skip("a sample: FAULTS=all tries each")
    kills, aimed, torn_saves, most_lost = (20, 8, 0, 0) if everything else (2, 1, 0, 0)
    done = 0
    while done < kills or (everything and torn_saves < 5):
        directory = harness.fresh(stage)
        while done < kills or (everything and torn_saves < 5):
            in_a_save = done < aimed or done >= kills
            if not killed(harness, stage, directory, in_a_save):
                break  # it was faster than the kill
            done += 1
            torn_saves += torn(directory)
            assert tally.count(broken(directory) == []), broken(directory)
            if stage in SAVES:
                lost = last_logged(directory) - newest_step(directory)
                most_lost = max(most_lost, lost)
                assert lost <= SAVE_STEPS[stage], f"{lost} steps of work are lost"
            if harness.random.random() < 0.4:
                break
        code, output = harness.run(stage, directory)
        assert code == 0, f"wedged: {output[-2000:]}"
        harness.assert_same(stage, directory)
    if everything:
        assert torn_saves >= 5, "too few kills fell into a save to say anything"
    tally.figure = f"{torn_saves} inside a save, at most {most_lost} steps lost, 0 wedged, all ends equal"


def killed(harness, stage, directory, in_a_save):
    """Starts the stage and kills it; whether it was still at work."""
    listening, connection = multiprocessing.Pipe(duplex=False)
    child = harness.start(stage, directory, hook=Announce(connection))
    connection.close()
    if in_a_save:
        skip = harness.random.randrange(4) if stage in SAVES else 0
        for _ in range(2 * skip + 1):
            try:
                listening.recv_bytes()
            except EOFError:
                break
        time.sleep(harness.random.uniform(0, SAVE_SECONDS))
    else:
        child.join(harness.random.uniform(0.05, 1.0) * harness.seconds[stage])
    child.kill()
    child.join()
    return child.exitcode == -9


class Announce:
    """`announce`, for a connection that is handed to the child."""

    def __init__(self, connection):
        self.connection = connection

    def __call__(self):
        announce(self.connection)


class KillAt:
    def __init__(self, number):
        self.number = number

    def __call__(self):
        kill_at(self.number)


# --------------------------------------------------------------------------------------------- every step of sealing


def saves(folder, steps):
    for step in steps:
        with seal(folder / "checkpoints" / f"step-{step:06d}") as staging:
            (staging / "sub").mkdir()
            (staging / "model").write_text(str(step) * 1000)
            (staging / "sub" / "state").write_text(str(step))
        rotate(folder / "checkpoints")
    with seal(folder / "model") as staging:  # an artifact that is there already is replaced
        (staging / "weights").write_text(f"after {steps}")


def child_of(work, *args):
    """Exit status of a fork that runs `work`."""
    if (pid := os.fork()) == 0:
        try:
            work(*args)
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_every_kill_point_of_sealing(tmp_path, tally):
    """T1b SIGKILL before every system call of sealing and rotating"""

    def work(folder, number):
        kill_at(number)
        saves(folder, (20, 30, 40))

    number, died = 0, True
    while died:
        number += 1
        folder = tmp_path / str(number)
        folder.mkdir()
        saves(folder, (10,))
        died = child_of(work, folder, number) == -9
        newest = latest_checkpoint(folder / "checkpoints")
        assert newest is not None
        assert tally.count(broken(folder) == []), broken(folder)
        steps = sorted(p.name for p in folder.glob("checkpoints/step-*"))
        assert len(steps) >= 2 or steps == ["step-000010"], "an older checkpoint went before a newer one was there"
        saves(folder, (50, 60))
        # What is hidden, a stage sweeps away when it takes its lock.
        names = sorted(p.name for p in [*folder.glob("[!.]*"), *folder.glob("checkpoints/[!.]*")])
        assert names == ["checkpoints", "model", "step-000050", "step-000060"]
    assert number > 60
    tally.figure = f"{number - 1} kill points, a verified checkpoint after each"


def test_a_pretraining_killed_at_every_kind_of_event(harness, tally, everything):
    """T1b the same inside a stage: its record, its checkpoints, its artifact"""
    numbers = [*range(1, 400, 23)] if everything else [60]
    for number in numbers:
        directory = harness.fresh("pretrain")
        child = harness.start("pretrain", directory, hook=KillAt(number))
        child.join()
        if child.exitcode == 0:
            break
        assert child.exitcode == -9
        assert tally.count(broken(directory) == []), broken(directory)
        code, output = harness.run("pretrain", directory)
        assert code == 0, output
        harness.assert_same("pretrain", directory)
    tally.figure = f"up to event {number}"


def test_what_is_written_is_on_the_disk_before_it_gets_its_name(tmp_path, tally, monkeypatch):
    """T1c every file and folder is fsynced before the rename, the parent after it"""
    order, fsync = [], os.fsync

    def note(descriptor):
        order.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    rename = type(tmp_path).rename
    monkeypatch.setattr(
        type(tmp_path), "rename", lambda self, to: order.append(("rename", str(to))) or rename(self, to)
    )
    saves(tmp_path, (10,))
    whole = ["model", "sub/state", "sub", "MANIFEST.json", ""]
    for parent, target, names in (tmp_path / "checkpoints", "step-000010", whole), (tmp_path, "model", ["weights"]):
        renamed = order.index(("rename", str(parent / target)))
        for name in names:
            # A manifest is synced under the name it has before its own replacement.
            path = str(parent / f".staging-{target}" / name).rstrip("/").replace("MANIFEST.json", ".MANIFEST.json.tmp")
            assert tally.count(("fsync", path) in order[:renamed]), f"{path} is not on the disk before the rename"
        assert tally.count(order[renamed + 1] == ("fsync", str(parent)))
    tally.figure = f"{len(order)} calls in order"


# ------------------------------------------------------------------------------------------------------- concurrency


def test_eight_copies_of_one_stage(harness, tally, everything):
    """T9 eight copies at once: one works, the others exit 3 and name it"""
    for _ in range(3 if everything else 1):
        directory = harness.fresh("pretrain")
        started = time.monotonic()
        children = [harness.start("pretrain", directory.parent / "pretrain") for _ in range(8)]
        for child in children:
            child.join(120)
        codes = sorted(child.exitcode for child in children)
        assert tally.count(codes == [0] + [3] * 7, 8), codes
        log = children[0].log.read_text()
        assert log.count("is being written by") + log.count("was finished by another process") == 7
        harness.assert_same("pretrain", directory)
    tally.figure = f"codes {codes} in {time.monotonic() - started:.1f} s"


def test_a_lock_dies_with_its_holder(harness, tally):
    """T9 the winner is killed: the lock is free at once, the next one goes on"""
    for stage in ("pretrain", "tokenizer"):
        directory = harness.fresh(stage)
        child = harness.start(stage, directory)
        while not (directory / "plan.json").exists():
            time.sleep(0.005)
        second = harness.run(stage, directory)
        assert second[0] == 3
        assert f"process {child.pid} on" in second[1]
        child.kill()
        child.join()
        code, output = harness.run(stage, directory)
        assert tally.count(code == 0), output
        harness.assert_same(stage, directory)
    tally.figure = "no lock outlives its process"


def test_a_finished_stage_changes_nothing(harness, tally, everything):
    """T5 finished stages run again, files touched, moved: nothing is written, nothing trained"""

    def snapshot(folder):
        return {
            str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.stat().st_size)
            for p in sorted(folder.rglob("*"))
            if p.is_file()
        }

    for stage in CHAIN if everything else ("tokenizer", "sft"):
        directory = harness.fresh(stage)
        assert harness.run(stage, directory)[0] == 0
        for path in directory.rglob("*"):
            os.utime(path)
        before = snapshot(directory)
        for _ in range(3 if everything else 1):
            code, output = harness.run(stage, directory)
            assert tally.count(code == 0 and snapshot(directory) == before)
            assert "finished already, skipped" in output
        moved = directory.rename(directory.parent / "moved")
        code, output = harness.run(stage, moved)
        assert tally.count(code == 0 and snapshot(moved) == before)
    tally.figure = "0 files changed"


def test_what_is_told_when_a_record_is_edited(harness, tmp_path, tally):
    """T2 stage.json with a bit flipped anywhere is refused"""
    import shutil

    from lmkit.errors import BadInput, CorruptInput

    shutil.copytree(harness.reference("pretrain"), tmp_path / "pretrain")
    path = tmp_path / "pretrain" / "stage.json"
    whole = bytearray(path.read_bytes())
    config = json.loads(whole)["full_config"] | {"output_dir": str(tmp_path / "pretrain")}
    import pretrain

    made = pretrain.PretrainConfig.model_validate(config)
    assert Stage("pretrain", made).finished
    for _ in range(200):
        place, bit = harness.random.randrange(len(whole)), 1 << harness.random.randrange(8)
        damaged = whole.copy()
        damaged[place] ^= bit
        path.write_bytes(damaged)
        if content(damaged) == content(whole):
            continue  # white space, or the name of the id: what the record says is whole
        try:
            Stage("pretrain", made).finished  # noqa: B018
            held = False
        except (CorruptInput, BadInput):
            held = True
        assert tally.count(held), f"byte {place}, bit {bit}: {bytes(damaged[place - 20 : place + 20])}"


def content(text):
    """What a record says, its id apart; None when it cannot be read."""
    try:
        value = json.loads(bytes(text))
        return {
            key: value[key] for key in ("config", "inputs", "artifacts", "metrics", "seed", "versions", "full_config")
        }
    except (ValueError, KeyError, TypeError):
        return None
