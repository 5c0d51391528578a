"""Every file of every checkpoint and artifact, damaged in every way: passed over or refused, named, never used."""

import json
import os
import shutil

import pytest

from lmkit.artifact import MANIFEST, seal, verify
from lmkit.errors import CorruptInput
from lmkit.rounds import CHAIN
from lmkit.stage import latest_checkpoint, read_record
from tests.faults.harness import SAVES

BIT_FLIPS = 10


def damages(path, older, rng, everything):
    """(name, function that does it) of each kind of damage to one file."""

    def flip(place):
        def do():
            data = bytearray(path.read_bytes())
            data[place] ^= 1 << rng.randrange(8)
            path.write_bytes(data)

        return do

    def zero_tail():
        size = path.stat().st_size
        os.truncate(path, size // 2)
        os.truncate(path, size)

    def link():
        path.rename(path.parent.parent / ".elsewhere")
        path.symlink_to(path.parent.parent / ".elsewhere")

    size = path.stat().st_size
    yield "missing", path.unlink
    yield "a folder in its place", lambda: (path.unlink(), path.mkdir())
    yield "a link in its place", link
    yield "an extra file beside it", lambda: (path.parent / "extra").write_text("x")
    if size:
        yield "empty", lambda: os.truncate(path, 0)
        yield "cut in half", lambda: os.truncate(path, size // 2)
        if path.read_bytes()[size // 2 :].strip(b"\0"):
            yield "second half zero", zero_tail
        for _ in range(BIT_FLIPS if everything else 2):
            yield "a bit flipped", flip(rng.randrange(size))
    yield "a byte more", lambda: path.write_bytes(path.read_bytes() + b"\n")
    if older is not None and older.is_file() and older.read_bytes() != path.read_bytes():
        yield "that of an older step", lambda: shutil.copyfile(older, path)


def damage_manifest(folder):
    """The manifest edited so that it is still JSON, in each way that a careless hand would."""
    path = folder / MANIFEST
    manifest = json.loads(path.read_text())
    name = next(iter(manifest["files"]))
    other = "0" * 64
    for edited in (
        manifest | {"id": other},
        manifest | {"files": {k: v for k, v in manifest["files"].items() if k != name}},
        manifest | {"files": manifest["files"] | {name: manifest["files"][name] | {"sha256": other}}},
        manifest | {"files": manifest["files"] | {name: manifest["files"][name] | {"size": 1}}},
        manifest | {"files": manifest["files"] | {"../outside": manifest["files"][name]}},
        {"files": manifest["files"]},
        [],
    ):
        yield lambda edited=edited: path.write_text(json.dumps(edited))


def sealed_files(folder):
    return sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())


@pytest.mark.parametrize("stage", SAVES)
def test_damaged_checkpoints(harness, tally, everything, tmp_path, capsys, stage):
    """T2 damage to a checkpoint"""
    source = harness.reference(stage) / "checkpoints"
    older, newest = sorted(source.glob("step-*"))[-2:]
    cases = []
    for name in sealed_files(newest):
        for number in range(sum(1 for _ in damages(newest / name, older / name, harness.random, everything))):
            cases.append((name, number))
    cases += [(MANIFEST, -1 - number) for number in range(7)]
    for name, number in cases:
        copy = tmp_path / "checkpoints"
        shutil.copytree(source, copy)
        target = copy / newest.name
        if number < 0:
            list(damage_manifest(target))[-1 - number]()
            what = "edited"
        else:
            kinds = list(damages(target / name, copy / older.name / name, harness.random, everything))
            what, do = kinds[number]
            do()
        held = latest_checkpoint(copy) == copy / older.name and bool(list(copy.glob(f".corrupt-{newest.name}-*")))
        told = capsys.readouterr().err
        assert tally.count(held and newest.name in told), f"{name}: {what} is used ({told})"
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
    tally.figure = f"{len(sealed_files(newest))} files, 0 silent"


@pytest.mark.parametrize("stage", CHAIN)
def test_damaged_artifacts(harness, tally, everything, tmp_path, stage):
    """T2 damage to an artifact"""
    for artifact in read_record(harness.reference(stage))["artifacts"]:
        source = harness.reference(stage) / artifact
        for name in sealed_files(source):
            for number in range(sum(1 for _ in damages(source / name, None, harness.random, everything))):
                copy = tmp_path / artifact
                shutil.copytree(source, copy)
                what, do = list(damages(copy / name, None, harness.random, everything))[number]
                do()
                with pytest.raises(CorruptInput) as caught:
                    verify(copy)
                named = copy.name in str(caught.value)
                assert tally.count(named), f"{artifact}/{name}: {what} is accepted ({caught.value})"
                shutil.rmtree(tmp_path)
                tmp_path.mkdir()
    tally.figure = "0 silent"


DOWNSTREAM = {
    "tokenizer": "pretrain",
    "pretrain": "sft",
    "sft": "preferences",
    "preferences": "reward",
    "ppo": "evaluation",
}
FIELD = {"tokenizer": "shards", "pretrain": "model", "sft": "model", "preferences": "data", "ppo": "ppo"}


def test_a_damaged_artifact_is_read_by_nobody(harness, tally, tmp_path):
    """T2 the next stage, given a damaged artifact, exits 5 and starts nothing"""
    for stage, after in DOWNSTREAM.items():
        artifact = (
            FIELD[stage] if stage == "tokenizer" else next(iter(read_record(harness.reference(stage))["artifacts"]))
        )
        copy = tmp_path / stage
        shutil.copytree(harness.reference(stage) / artifact, copy)
        largest = max((p for p in copy.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
        data = bytearray(largest.read_bytes())
        data[len(data) // 2] ^= 16
        largest.write_bytes(data)
        directory = harness.fresh(after)
        code, output = harness.run(after, directory, f"--{FIELD[stage]}", copy)
        assert tally.count(code == 5 and largest.name in output), output
        assert {p.name for p in directory.iterdir()} <= {"exit.json"}
    tally.figure = "exit 5, the file named"


@pytest.mark.parametrize("stage", SAVES)
def test_going_on_past_a_damaged_checkpoint_is_exact(harness, tally, everything, stage):
    """T2 resumed past damage: the same bytes; with all checkpoints damaged: from the start, the same bytes"""
    if not everything and stage in ("sft", "ppo"):
        pytest.skip("a sample: FAULTS=all tries each")
    whole = harness.fresh(stage)
    whole.parent.mkdir(parents=True)
    shutil.copytree(harness.reference(stage), whole)
    shutil.rmtree(whole / "model")
    (whole / "stage.json").unlink()
    older, newest = sorted((whole / "checkpoints").glob("step-*"))
    broken = [[newest], [newest, older]] if everything else [[newest]]
    for targets in broken:
        directory = harness.fresh(stage)
        shutil.copytree(whole, directory)
        for target in targets:
            name = harness.random.choice(sealed_files(target))
            os.truncate(directory / "checkpoints" / target.name / name, 1)
        code, output = harness.run(stage, directory)
        assert code == 0, output
        assert output.count("Going back to the checkpoint before it") >= len(targets)
        harness.assert_same(stage, directory)
        tally.count(True)
    tally.figure = "bit for bit"


@pytest.mark.parametrize("stage", ["pretrain", "ppo"])
def test_each_part_of_a_checkpoint_matters(harness, tally, everything, stage):
    """T4 a checkpoint that lacks a part, but whose manifest is right, does not give the same end silently"""
    if not everything and stage == "pretrain":
        pytest.skip("a sample: FAULTS=all tries each")
    first = harness.fresh(stage)
    stop_at = 6 if stage == "pretrain" else 2
    code, output = harness.run(stage, first, hook=StopAfter(stop_at))
    assert code == 75, output
    (checkpoint,) = sorted((first / "checkpoints").glob("step-*"))[-1:]
    for part in ("optimizer.safetensors", "model.safetensors", "state.json"):
        directory = harness.fresh(stage)
        shutil.copytree(first, directory)
        target = directory / "checkpoints" / checkpoint.name
        with seal(directory / "checkpoints" / "made") as folder:
            for path in target.iterdir():
                if path.name not in (part, MANIFEST):
                    shutil.copyfile(path, folder / path.name)
        shutil.rmtree(target)
        (directory / "checkpoints" / "made").rename(target)
        for other in (directory / "checkpoints").glob("step-*"):
            if other != target:
                shutil.rmtree(other)
        code, output = harness.run(stage, directory)
        differs = code != 0 or read_record(directory)["artifacts"] != read_record(harness.reference(stage))["artifacts"]
        assert tally.count(differs), f"without {part} nothing changes: the test of exact resuming has no power"
    code, output = harness.run(stage, first)
    assert code == 0
    harness.assert_same(stage, first)
    tally.figure = "with all parts: the same bytes"


class StopAfter:
    """In the child: a stop is asked for at the `number`-th look."""

    def __init__(self, number):
        self.number, self.looks = number, 0

    def __call__(self):
        from lmkit.stage import Stage

        def stop_requested(stage):
            stage._polled = True
            self.looks += 1
            return self.looks >= self.number

        Stage.stop_requested = stop_requested
