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
import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from lmkit.artifact import MANIFEST, check_inputs, content_id, is_out_of_space, remove, seal, verify, write_json
from lmkit.config import Config, StageConfig, explain, load
from lmkit.environment import environment, peak_memory_bytes
from lmkit.errors import BadInput, CorruptInput, Interrupted, Locked, Stopped
from lmkit.processes import check_launcher, die_with_parent, is_main, lost_another, num_asked, run_group
from lmkit.rounds import CHAIN, recipe_of
from lmkit.tracking import printable, read_jsonl

# Keys of a pass-through `train` mapping that change what is shown or kept, never what is learnt.
KNOBS = frozenset({"output_dir", "logging_steps", "logging_strategy", "logging_first_step", "report_to", "run_name"})
KNOBS |= {"disable_tqdm", "save_steps", "save_strategy", "save_total_limit", "eval_steps", "eval_strategy"}
KNOBS |= {"dataloader_num_workers", "dataloader_pin_memory"}

# ------------------------------------------------------------------------------------------------------ checkpoints


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that verifies; a damaged one is renamed `.corrupt-*` with a warning and the next tried."""
    return next(filter(_is_whole, newest_first(folder)), None)


def rotate(folder: Path, keep: int = 2) -> None:
    """Deletes checkpoints once `keep` newer ones are whole, each first renamed so that a kill leaves no half of one.

    The newest is taken to be whole, since it was sealed a moment ago; a damaged one among the others does not count.
    """
    for checkpoint in newest_first(folder)[1:]:
        if keep > 1:
            keep -= _is_whole(checkpoint)
        else:
            trash = checkpoint.with_name(f".trash-{checkpoint.name}")
            checkpoint.rename(trash)
            remove(trash)


def newest_first(folder: Path) -> list[Path]:
    """The checkpoints in a folder, whole or not; their numbers have six digits or more."""
    return sorted(Path(folder).glob("step-*"), key=lambda path: int(path.name.split("-")[1]), reverse=True)


def _is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint verifies; one that does not is put out of the way, not deleted."""
    try:
        verify(checkpoint)
    except CorruptInput as error:
        print(f"warning: {error} Going back to the checkpoint before it.", file=sys.stderr, flush=True)
        checkpoint.rename(checkpoint.with_name(f".corrupt-{checkpoint.name}-{time.time_ns()}"))
        return False
    return True


# ------------------------------------------------------------------------------------------------------------ stage


class Stage:
    """One run of one stage: `finished`, then `with stage:` around the work, `seal` for artifacts, `finish` at the end.

    name: the recipe's name. config: its configuration; its inputs, known by content, are the fields that hold a path
    or are declared by `source`. large_inputs: those whose large files are compared with their manifest while the stage
    starts, so that the start does not take longer for a larger corpus; nothing is sealed before that is done. Only the
    main process locks and writes; the others run the same code beside it.
    """

    def __init__(self, name: str, config: StageConfig, large_inputs: tuple[str, ...] = ()):
        self.name, self.config = name, config
        self.directory = Path(config.output_dir)
        # What the chain calls it: a stage of a later round by its folder.
        self.title = self.directory.name if recipe_of(self.directory.name)[0] == name else name
        if not str(self.directory).isprintable():
            raise BadInput(f"output_dir is {str(self.directory)!r}: wanted a path without control characters.")
        self.checkpoints = self.directory / "checkpoints"
        self.inputs = inputs_of(config)
        self._input_ids = {
            name: content_id(value, name, meanwhile=name in large_inputs) for name, value in self.inputs.items()
        }
        self._plan = {"stage": name, "config": semantic(config), "inputs": self._input_ids}
        self.fingerprint = hashlib.sha256(json.dumps(self._plan, sort_keys=True, default=str).encode()).hexdigest()
        self._artifacts: dict[str, str] = {}
        self._stop = self._polled = False

    @property
    def finished(self) -> bool:
        """True when this very stage was completed and its artifacts verify; BadInput when it was made otherwise."""
        record, made = read_record(self.directory), made_from(self.directory)
        redo = f"`python recipes/rlhf.py --config FILE --redo {self.title}`, FILE the chain file of the run"
        changes = []
        if made and made["fingerprint"] != self.fingerprint:
            inputs = {name: self.inputs.get(name, "no longer given") for name in self.changed_inputs(made)}
            changes = [*self.changed_settings(made), *(f"the content of {n} ({p})" for n, p in inputs.items())]
        if changes:
            raise BadInput(
                f"{self.directory} was made with other settings: {'; '.join(changes)}. Give another --output_dir "
                f"(a chain: --name), or redo it with {redo} (the old one is moved aside, not deleted)."
            )
        if record is None:
            return False
        check_inputs()
        for artifact, manifest_id in record["artifacts"].items():
            if verify(self.directory / artifact) != manifest_id:
                raise CorruptInput(
                    f"{self.directory / artifact} is whole, but not what stage.json records. Redo it with {redo}."
                )
        self.say(f"{self.title}: finished already, skipped ({self.directory})", log=False)
        return True

    def changed_settings(self, made: dict) -> list[str]:
        """What differs between the settings in a record and these, a line each.

        A setting that the record's version of lmkit did not have, and that has its default now, is no difference.
        """
        old, new = made["config"], self._plan["config"]
        default = semantic(type(self.config)(output_dir=self.directory))
        old, new, default = (_flat(json.loads(json.dumps(values, default=str))) for values in (old, new, default))
        new = {key: value for key, value in new.items() if key in old or value != default.get(key)}
        return [f"{k}: {old.get(k)}, now {new.get(k)}" for k in sorted(old | new) if old.get(k) != new.get(k)]

    def changed_inputs(self, made: dict) -> list[str]:
        """Names of the inputs whose content differs between a record and now."""
        old = {name: entry["id"] for name, entry in made["inputs"].items()}
        return sorted(name for name in old | self._input_ids if old.get(name) != self._input_ids.get(name))

    def __enter__(self) -> Stage:
        self._started = time.time()
        if is_main():
            self._lock = self._locked()
            for leftover in [*self.directory.glob(".[srt]*-*"), *self.checkpoints.glob(".[srt]*-*")]:
                remove(leftover)
            (self.directory / "exit.json").unlink(missing_ok=True)  # it tells of an earlier ending
            before = read_jsonl(self.directory / "metrics.jsonl")
            self._started -= before[-1]["seconds"] if before else 0.0  # the work of those that were stopped
            write_json(self.directory / "plan.json", self._plan_record())
        self._handlers = {s: signal.signal(s, self._on_signal) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if is_main():
            self._lock.close()

    def _locked(self) -> TextIO:
        """The stage's lock file, held; the directory is made, and checked for links that would lead writing astray."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            for path in [*self.directory.iterdir(), *self.checkpoints.glob("*")]:
                if path.is_symlink():
                    raise BadInput(f"{path} is a link; a stage writes through none. Remove it, or move what it names.")
            lock = (self.directory / ".lock").open("a+")
        except OSError as error:
            if is_out_of_space(error):
                raise
            raise BadInput(
                f"{self.directory} cannot be written ({error.strerror}). Choose another --output_dir."
            ) from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read().strip() or "another process"
            raise Locked(f"{self.directory} is being written by {holder}. Wait for it, or stop it.") from None
        if read_record(self.directory) is not None:  # this one started while the other was at work
            raise Locked(f"{self.directory} was finished by another process just now. Run again, and it is skipped.")
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        return lock

    def _on_signal(self, number: int, frame: object) -> None:
        name = signal.Signals(number).name
        if self._stop:
            _write_ending(self.directory, Interrupted.exit_code, f"a second {name} stopped it at once.")
            os._exit(Interrupted.exit_code)
        self._stop = True
        if not self._polled:
            raise Interrupted(f"{name} received; this stage starts over when run again.")
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
    def seal(self, artifact: str, num_bytes: int = 0) -> Iterator[Path]:
        """A staging folder that becomes the stage's artifact of that name; num_bytes: about how large it will be."""
        with seal(self.directory / artifact, num_bytes) as folder:
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
        record = json.loads(json.dumps(record, default=str))  # as it will be read
        write_json(self.directory / "stage.json", record | {"id": _record_id(record)})
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
        record = json.loads(path.read_text(encoding="utf-8"))
        if "id" in record and record["id"] != _record_id(record):
            raise ValueError
        return record
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
            return None
        raise
    except (ValueError, TypeError):
        raise CorruptInput(f"{path} is damaged or was edited. Move its folder aside to redo the stage.") from None


def _record_id(record: dict[str, Any]) -> str:
    """sha256 of all but the id itself, as JSON gives it back."""
    rest = {key: value for key, value in record.items() if key != "id"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _flat(value: dict, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= _flat(inner, f"{prefix}{key}.") if isinstance(inner, dict) else {prefix + key: inner}
    return flat


# -------------------------------------------------------------------------------------------------------------- run


def run(main: Callable[[Any], Path], cls: type[StageConfig], doc: str | None) -> None:
    """A recipe's command line: reads flags, makes a missing default upstream, runs `main`, ends with the exit code."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        rows = explain(cls)
        print(f"{doc}\nOptions (--name value, --section.name value, or --config FILE):")
        for name, default, description in rows:
            print(f"  --{name:<34} {description} [{default}]")
        sys.exit(0)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _before_a_stage)
    if "RANK" in os.environ:  # a launcher that is killed leaves its processes behind
        die_with_parent()
    config = None
    try:
        config = load(cls, sys.argv[1:])
        check_launcher()
        make_upstream(config)
        try:
            main(config)
        except Locked:
            raise
        except Exception:
            check_inputs()  # damage explains whatever else went wrong
            raise
        code, reason = 0, "done"
    except (BadInput, Locked, Stopped, CorruptInput, Interrupted) as error:
        code, reason = error.exit_code, str(error)
    except Exception as error:
        if is_out_of_space(error):
            place, detail = getattr(error, "filename", None), getattr(error, "strerror", None) or error
            code = Interrupted.exit_code
            reason = f"No space left for {place or config.output_dir} ({detail}). What was saved is whole; free some."
        elif lost_another(error):
            code, reason = Interrupted.exit_code, f"another process of this run is gone or silent ({error})."
        else:
            traceback.print_exc()
            code, reason = 1, f"{type(error).__name__}: {error}"
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # it ends anyway; what follows takes no time
    if code:
        print(f"\nerror: {reason}" if code != Interrupted.exit_code else f"\n{reason}", file=sys.stderr)
    if code == Interrupted.exit_code:
        print(f"Go on with the same command: python {' '.join(sys.argv)}", file=sys.stderr)
    if isinstance(config, StageConfig) and is_main() and code != Locked.exit_code:
        _write_ending(config.output_dir, code, reason)
    sys.exit(code)


def _before_a_stage(number: int, frame: object) -> None:
    raise Interrupted(f"{signal.Signals(number).name} received before the work began; nothing is lost.")


def _write_ending(directory: Path, code: int, reason: str) -> None:
    """exit.json, for whoever started this process and cannot see its exit code; no reason to fail if it cannot be."""
    ending = {"code": code, "reason": reason}
    with contextlib.suppress(OSError, ValueError):
        directory.mkdir(parents=True, exist_ok=True)
        if not (directory / "exit.json").exists() or json.loads((directory / "exit.json").read_text()) != ending:
            write_json(directory / "exit.json", ending)


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
    if num_asked() > 1:
        raise BadInput(f"{missing[0]} is missing. Make it first, in one process: {' '.join(command)}")
    print(f"{missing[0]} is missing: making it first with {' '.join(command)}", flush=True)
    if code := run_group(command):
        sys.exit(code)
