"""A stage's record: what it was made from, whether it is finished, and how its output becomes visible.

A stage directory holds artifact folders, each of which appears whole by one rename, and beside them `stage.json`
(written last), logs and checkpoints. A folder that matches its MANIFEST.json is complete; nothing else is believed.

Exit codes: 0 done or skipped, 1 a bug, 2 bad input, 3 locked, 4 stopped by a guard, 5 corrupt input, 75 interrupted
and resumable. They are promised for `python recipes/...`; a launcher makes every failure 1, so `exit.json` says it too.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lmkit.artifact import MANIFEST, content_id, seal, verify, write_json
from lmkit.config import Config, StageConfig, explain, load
from lmkit.errors import BadInput, CorruptInput, Interrupted, Locked, Stopped
from lmkit.tracking import printable

CHAIN = ("tokenizer", "pretrain", "sft", "preferences", "reward", "ppo", "evaluation")
# Keys of a pass-through `train` mapping that change what is shown or kept, never what is learnt.
KNOBS = frozenset({"output_dir", "logging_steps", "logging_strategy", "logging_first_step", "report_to", "run_name"})
KNOBS |= {"disable_tqdm", "save_steps", "save_strategy", "save_total_limit", "eval_steps", "eval_strategy"}
KNOBS |= {"dataloader_num_workers", "dataloader_pin_memory"}

# ------------------------------------------------------------------------------------------------------ checkpoints


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that verifies; a damaged one is renamed `.corrupt-*` with a warning and the next tried."""
    for checkpoint in sorted(Path(folder).glob("step-*"), reverse=True):
        try:
            verify(checkpoint)
        except CorruptInput as error:
            print(f"warning: {error} Going back to the checkpoint before it.", file=sys.stderr, flush=True)
            checkpoint.rename(checkpoint.with_name(f".corrupt-{checkpoint.name}-{time.time_ns()}"))
        else:
            return checkpoint
    return None


def rotate(folder: Path, keep: int = 2) -> None:
    """Deletes all but the newest `keep` checkpoints, each first renamed so that a kill leaves no half of one."""
    for checkpoint in sorted(Path(folder).glob("step-*"))[:-keep]:
        trash = checkpoint.with_name(f".trash-{checkpoint.name}")
        checkpoint.rename(trash)
        shutil.rmtree(trash, ignore_errors=True)


# ------------------------------------------------------------------------------------------------------------ stage


class Stage:
    """One run of one stage: `finished`, then `with stage:` around the work, `seal` for artifacts, `finish` at the end.

    name: the recipe's name. config: its configuration; its inputs, known by content, are the fields that hold a path
    or are declared by `source`. Only the main process locks and writes; the others run the same code beside it.
    """

    def __init__(self, name: str, config: StageConfig):
        self.name, self.config = name, config
        self.directory = Path(config.output_dir)
        self.checkpoints = self.directory / "checkpoints"
        self.inputs = inputs_of(config)
        self._input_ids = {name: content_id(value) for name, value in self.inputs.items()}
        self._plan = {"stage": name, "config": semantic(config), "inputs": self._input_ids}
        self.fingerprint = hashlib.sha256(json.dumps(self._plan, sort_keys=True, default=str).encode()).hexdigest()
        self._artifacts: dict[str, str] = {}
        self._stop = self._polled = False

    @property
    def finished(self) -> bool:
        """True when this very stage was completed and its artifacts verify; BadInput when it was made otherwise."""
        record, made = read_record(self.directory), made_from(self.directory)
        if made and made["fingerprint"] != self.fingerprint:
            inputs = [
                f"the content of {n} ({self.inputs.get(n, 'no longer given')})" for n in self.changed_inputs(made)
            ]
            changes = "; ".join(self.changed_settings(made) + inputs) or "its fingerprint"
            raise BadInput(
                f"{self.directory} was made with other settings: {changes}. Choose another run name, or redo it with "
                f"`python recipes/rlhf.py --redo {self.name}` (the old one is moved aside, not deleted)."
            )
        if record is None:
            return False
        for artifact, manifest_id in record["artifacts"].items():
            if verify(self.directory / artifact) != manifest_id:
                raise CorruptInput(f"{self.directory / artifact} is not the artifact that stage.json records.")
        self.say(f"{self.name}: finished already, skipped ({self.directory})", log=False)
        return True

    def changed_settings(self, made: dict) -> list[str]:
        """What differs between the settings in a record and these, a line each."""
        old, new = _flat(made["config"]), _flat(json.loads(json.dumps(self._plan["config"], default=str)))
        return [f"{k}: {old.get(k)}, now {new.get(k)}" for k in sorted(old | new) if old.get(k) != new.get(k)]

    def changed_inputs(self, made: dict) -> list[str]:
        """Names of the inputs whose content differs between a record and now."""
        old = {name: entry["id"] for name, entry in made["inputs"].items()}
        return sorted(name for name in old | self._input_ids if old.get(name) != self._input_ids.get(name))

    def __enter__(self) -> Stage:
        self._started = time.time()
        if not is_main():
            return self
        self.directory.mkdir(parents=True, exist_ok=True)
        self._lock = (self.directory / ".lock").open("a+")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.seek(0)
            raise Locked(
                f"{self.directory} is being written by {self._lock.read().strip()}. Wait for it, or stop it."
            ) from None
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        self._lock.flush()
        for leftover in [*self.directory.glob(".staging-*"), *self.checkpoints.glob(".[str]*-*")]:
            shutil.rmtree(leftover, ignore_errors=True)
        write_json(self.directory / "plan.json", self._plan_record())
        self._handlers = {s: signal.signal(s, self._on_signal) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exc_info: object) -> None:
        if is_main():
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
            self._lock.close()

    def _on_signal(self, number: int, frame: object) -> None:
        if self._stop:
            os._exit(Interrupted.exit_code)
        self._stop = True
        if not self._polled:
            raise Interrupted(f"{signal.Signals(number).name} received; this stage starts over when run again.")
        self.say("stopping after this step and saving; a second signal stops at once")

    def stop_requested(self) -> bool:
        """Whether a signal asked to stop; from the first call on, a signal only sets this answer."""
        self._polled = True
        return self._stop

    def say(self, text: str, log: bool = True) -> None:
        """Prints lines for the user, control characters of a model's text shown as escapes; appends them to log.txt."""
        text = printable(text)
        if is_main():
            print(text, flush=True)
            if log:
                with (self.directory / "log.txt").open("a", encoding="utf-8") as file:
                    file.write(text + "\n")

    @contextlib.contextmanager
    def seal(self, artifact: str) -> Iterator[Path]:
        """A staging folder that becomes the stage's artifact of that name."""
        with seal(self.directory / artifact) as folder:
            yield folder
        self._artifacts[artifact] = json.loads((self.directory / artifact / MANIFEST).read_text())["id"]

    def finish(self, metrics: dict[str, Any]) -> None:
        """Writes stage.json: from here on the stage is finished."""
        if not is_main():
            return
        record = self._plan_record() | {
            "full_config": self.config.model_dump(mode="json"),
            "artifacts": self._artifacts,
            "metrics": metrics,
            "seed": self.config.seed,
            "seconds": round(time.time() - self._started, 2),
            "peak_memory_bytes": peak_memory_bytes(),
            **environment(),
        }
        write_json(self.directory / "stage.json", record)
        (self.directory / "plan.json").unlink()

    def _plan_record(self) -> dict[str, Any]:
        inputs = {name: {"path": str(value), "id": self._input_ids[name]} for name, value in self.inputs.items()}
        return {**self._plan, "inputs": inputs, "fingerprint": self.fingerprint}


def inputs_of(config: StageConfig) -> dict[str, Any]:
    """Field name -> path or source text, of every input a configuration names; fields that are None are left out."""
    inputs = {}
    for name, field in type(config).model_fields.items():
        extra, value = field.json_schema_extra or {}, getattr(config, name)
        if value is not None and not extra.get("knob") and (isinstance(value, Path) or extra.get("source")):
            inputs[name] = value
    return inputs


def semantic(config: Config) -> dict[str, Any]:
    """What decides the result, besides the inputs' content: the configuration as JSON values."""
    result = {}
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if isinstance(value, Path) or {"knob", "source"} & set(field.json_schema_extra or {}):
            continue
        if isinstance(value, Config):
            result[name] = semantic(value)
        elif isinstance(value, dict):
            result[name] = {k: v for k, v in value.items() if k not in KNOBS}
        else:
            result[name] = config.model_dump(mode="json", include={name})[name]
    return result


def read_record(directory: Path) -> dict[str, Any] | None:
    """The record of a finished stage, or None."""
    return _read(Path(directory) / "stage.json")


def made_from(directory: Path) -> dict[str, Any] | None:
    """The settings and inputs a stage directory was begun with, finished or not; None when there is nothing."""
    return read_record(directory) or _read(Path(directory) / "plan.json")


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        raise CorruptInput(f"{path} is not readable JSON. Move it aside to redo the stage.") from None


def _flat(value: dict, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= _flat(inner, f"{prefix}{key}.") if isinstance(inner, dict) else {prefix + key: inner}
    return flat


def is_main() -> bool:
    """Whether this process writes: rank 0, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def peak_memory_bytes() -> int:
    """The most memory the process held: on the GPU when one was used, else resident."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def environment() -> dict[str, Any]:
    """Versions, commit and hardware, recorded but never hashed."""
    packages = ["lmkit", "torch", "transformers", "trl", "accelerate", "datasets", "tokenizers"]
    versions = {"python": platform.python_version()}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    here = Path(__file__).resolve().parent
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False)
    torch = sys.modules.get("torch")
    device = torch.cuda.get_device_name() if torch is not None and torch.cuda.is_available() else platform.machine()
    hardware = {"device": device, "cpus": os.cpu_count(), "processes": int(os.environ.get("WORLD_SIZE", 1))}
    return {"versions": versions, "git_commit": git.stdout.strip() or None, "hardware": hardware}


# -------------------------------------------------------------------------------------------------------------- run


def run(main: Callable[[Any], Path], cls: type[StageConfig], doc: str | None) -> None:
    """A recipe's command line: reads flags, makes a missing default upstream, runs `main`, ends with the exit code."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        rows = explain(cls)
        print(f"{doc}\nOptions (--name value, --section.name value, or --config FILE):")
        for name, default, description in rows:
            print(f"  --{name:<34} {description} [{default}]")
        sys.exit(0)
    config = None
    try:
        config = load(cls, sys.argv[1:])
        make_upstream(config)
        main(config)
        code, reason = 0, "done"
    except BadInput as error:
        code, reason = 2, str(error)
    except (Locked, Stopped, CorruptInput, Interrupted) as error:
        code, reason = error.exit_code, str(error)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        code, reason = Interrupted.exit_code, f"no space left on the disk of {error.filename or config.output_dir}."
    except Exception as error:
        traceback.print_exc()
        code, reason = 1, f"{type(error).__name__}: {error}"
    if code:
        print(f"\nerror: {reason}" if code != Interrupted.exit_code else f"\n{reason}", file=sys.stderr)
    if code == Interrupted.exit_code:
        print(f"Go on with the same command: python {' '.join(sys.argv)}", file=sys.stderr)
    if isinstance(config, StageConfig) and is_main() and code != Locked.exit_code:
        config.output_dir.mkdir(parents=True, exist_ok=True)
        write_json(config.output_dir / "exit.json", {"code": code, "reason": reason})
    sys.exit(code)


def make_upstream(config: StageConfig) -> None:
    """Runs the chain up to a stage whose output a default path names and which is not there."""
    fields, paths = type(config).model_fields, {name: Path(str(value)) for name, value in inputs_of(config).items()}
    missing = [
        path
        for name, path in paths.items()
        if str(path) == str(fields[name].default) and path.parts[:2] == ("runs", "tiny") and not path.exists()
    ]
    if not missing:
        return
    upstream = max((path.parts[2] for path in missing), key=CHAIN.index)
    command = [sys.executable, str(Path(__file__).resolve().parents[1] / "recipes" / "rlhf.py"), "--to", upstream]
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise BadInput(f"{missing[0]} is missing. Make it first, in one process: {' '.join(command)}")
    print(f"{missing[0]} is missing: making it first with {' '.join(command)}", flush=True)
    if code := subprocess.run(command, check=False).returncode:
        sys.exit(code)
