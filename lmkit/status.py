"""What is in a run: the state of each stage, read from its records without hashing anything, and what comes next."""

from __future__ import annotations

import fcntl
import json
import time
from pathlib import Path
from typing import Any

from lmkit.artifact import MANIFEST
from lmkit.errors import CorruptInput, Interrupted
from lmkit.rounds import CHAIN, recipe_of
from lmkit.stage import made_from, newest_first, read_record

FINISHED = "finished"


def stage_state(run: Path, stage: str) -> tuple[str, str, str, str]:
    """Age, size, fingerprint and state of one stage, as text."""
    directory = run / stage
    if not directory.is_dir():
        return "", "", "", "absent"
    size = human_size(directory)
    marks = [path for name in (".lock", "plan.json", "exit.json", "stage.json") if (path := directory / name).exists()]
    old = age(marks[-1]) if marks else ""
    try:
        record, made = read_record(directory), made_from(directory) or {}
    except CorruptInput as error:
        return old, size, "", f"damaged: {error}"
    shown = old, size, made.get("fingerprint", "")[:12]
    if running := lock_holder(directory):
        return *shown, f"running ({running})"
    if record is None:
        return *shown, _unfinished(directory)
    gone = [name for name, manifest_id in record["artifacts"].items() if not looks_whole(directory / name, manifest_id)]
    if gone:
        return *shown, f"damaged: {', '.join(gone)} is not what was sealed (`lmkit verify {run}` says more)"
    changed = outdated(run, record)
    return *shown, f"{FINISHED}, but {' and '.join(changed)} changed since" if changed else FINISHED


def _unfinished(directory: Path) -> str:
    try:
        ending = json.loads((directory / "exit.json").read_text(encoding="utf-8"))
        state = f"ended with {ending['code']}: {ending['reason'].splitlines()[0]}"
    except (OSError, ValueError, KeyError, IndexError):
        state = "killed" if (directory / "plan.json").exists() else "unfinished"
    checkpoints = newest_first(directory / "checkpoints")
    return f"{state}; goes on from {checkpoints[0].name}" if checkpoints else state


def next_stage(run: Path, states: dict[str, str]) -> str:
    """What would run next, why, and the command for it."""
    for stage, state in states.items():
        if state == FINISHED:
            continue
        if state.startswith("running"):
            return f"{stage}, once this process is through"
        recipe, _ = recipe_of(stage)
        config = run / "configs" / f"{stage}.yaml"
        command = f"python recipes/{recipe}.py --config {config}"
        why = state
        if state.startswith((FINISHED, "damaged")):
            command = f"python recipes/rlhf.py ... --redo {stage}"
        elif not config.exists():
            command = f"python recipes/rlhf.py ... --from {stage}"
        elif not state.startswith(("absent", f"ended with {Interrupted.exit_code}", "killed")):
            why += " (see to that first)"
        return f"{stage} ({why})\n      {command}"
    return "nothing, every stage is finished"


def looks_whole(folder: Path, manifest_id: str) -> bool:
    """Whether a sealed folder has the recorded manifest and every file in its size; contents are not hashed."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        sizes = {name: entry["size"] for name, entry in manifest["files"].items()}
        return manifest["id"] == manifest_id and all((folder / n).stat().st_size == size for n, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def outdated(run: Path, record: dict[str, Any]) -> list[str]:
    """Inputs of a finished stage whose artifact in this run is another one now."""
    names = []
    for name, entry in record["inputs"].items():
        path = Path(entry["path"])
        manifest = run / path.parent.name / path.name / MANIFEST
        if recipe_of(path.parent.name)[0] not in CHAIN or not manifest.exists():
            continue
        if json.loads(manifest.read_text())["id"] != entry["id"]:
            names.append(name)
    return names


def lock_holder(directory: Path) -> str:
    """Who works on a stage now, as its lock says; empty when nobody does."""
    try:
        with (directory / ".lock").open() as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return lock.read().strip() or "starting"
    except FileNotFoundError:
        pass
    return ""


def human_size(path: Path) -> str:
    """Size of a file, or of all files of a folder."""
    size = sum(file.stat().st_size for file in [path, *path.rglob("*")] if file.is_file())
    for power, unit in ((3, "GB"), (2, "MB"), (1, "kB")):
        if size >= 1000**power:
            return f"{size / 1000**power:.1f} {unit}"
    return f"{size} B"


def age(path: Path) -> str:
    seconds = max(time.time() - path.stat().st_mtime, 0)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
