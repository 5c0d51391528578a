"""What a long step shows and keeps: a progress bar with ETA and tokens/s, metrics.jsonl, samples.jsonl, trackers.

    with Tracker(stage.directory, total_steps=config.max_steps, description="pretrain") as tracker:
        tracker.log(step, {"loss": 2.1}, tokens=4096)

The two JSONL files are the record; the report reads nothing else. TensorBoard and its like come through Accelerate.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lmkit.errors import BadInput

LINE_SECONDS = 10.0  # between two plain lines when there is no terminal to draw a bar on
SHORT_UNITS = {"tokens": "tok", "images": "img"}
NUM_SHOWN = 4  # metrics on the progress line: the first of what is logged


class Tracker:
    """Progress and metrics of one stage; every process may hold one, the main process alone writes.

    directory: where metrics.jsonl and samples.jsonl lie; made when absent.
    total_steps: what the ETA counts to.
    start_step: last finished step of the checkpoint that is resumed. Rows after it are dropped from both files, since
        those steps are about to be taken again; 0 empties them.
    accelerator: asked which process is the main one; without it, the RANK of the launcher is.
    report_to: names of Accelerate trackers, such as "tensorboard". TensorBoard writes to directory/tensorboard.
    unit: what `log` is told the number of: tokens, or images.
    """

    def __init__(
        self,
        directory: Path,
        *,
        total_steps: int,
        start_step: int = 0,
        accelerator: Any = None,
        report_to: Iterable[str] = (),
        description: str = "",
        unit: str = "tokens",
    ):
        self.directory, self.unit = Path(directory), unit
        self.total_steps, self.start_step, self.last_step = total_steps, start_step, start_step
        self.description = description or self.directory.name
        self.report_to = list(report_to)
        self.is_main = accelerator.is_main_process if accelerator else os.environ.get("RANK", "0") == "0"
        self.bar, self.trackers = None, []

    def __enter__(self) -> Tracker:
        self.opened = self.last_log = time.monotonic()
        self.last_line = -math.inf
        if not self.is_main:
            return self
        self.directory.mkdir(parents=True, exist_ok=True)
        kept = truncate(self.directory / "metrics.jsonl", self.start_step)
        truncate(self.directory / "samples.jsonl", self.start_step)
        self.seconds_before = kept[-1]["seconds"] if kept else 0.0
        self.trackers = start_trackers(self.report_to, self.directory, self.start_step)
        if sys.stdout.isatty():
            self.bar, self.task = progress_bar(self.description, self.total_steps, self.start_step)
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar:
            self.bar.stop()
        for tracker in self.trackers:
            tracker.finish()

    def log(self, step: int, metrics: Mapping[str, Any], tokens: int | None = None) -> None:
        """Appends one row {"step", "seconds", **metrics, UNIT_per_second} to metrics.jsonl and moves the bar.

        metrics: numbers, 0-dimensional tensors or text; the first four are shown on the progress line.
        tokens: units processed by all processes since the last call; without it the row has no UNIT_per_second.
        """
        if not self.is_main:
            return
        now = time.monotonic()
        row: dict[str, Any] = {"step": step, "seconds": round(self.seconds_before + now - self.opened, 3)}
        row |= {name: plain(value) for name, value in metrics.items()}
        if tokens is not None:
            row[f"{self.unit}_per_second"] = tokens / max(now - self.last_log, 1e-9)
        self.last_log, self.last_step = now, step
        append(self.directory / "metrics.jsonl", [row])
        for tracker in self.trackers:
            numbers = {k: v for k, v in row.items() if isinstance(v, int | float) and k not in ("step", "seconds")}
            tracker.log(numbers, step=step)
        self._show(row, [*metrics][:NUM_SHOWN], now)

    def sample(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Appends `rows`, one JSON object each with "step" in front, to samples.jsonl.

        A picture (PIL) in a row is written to samples/, the row has its path, and TensorBoard shows it.
        """
        if self.is_main:
            kept = [{"step": step, **plain(self._pictures_kept(step, n, row))} for n, row in enumerate(rows)]
            append(self.directory / "samples.jsonl", kept)

    def _pictures_kept(self, step: int, number: int, row: Mapping[str, Any]) -> dict[str, Any]:
        kept = dict(row)
        for name in (name for name, value in row.items() if callable(getattr(value, "save", None))):
            picture, kept[name] = row[name].convert("RGB"), f"samples/step-{step:06d}-{number}-{name}.png"
            (self.directory / "samples").mkdir(exist_ok=True)
            picture.save(self.directory / kept[name])
            for tracker in self.trackers:
                if tracker.name == "tensorboard":
                    import numpy as np

                    tracker.log_images({name: np.asarray(picture)[None]}, step=step, dataformats="NHWC")
        return kept

    def _show(self, row: dict[str, Any], names: list[str], now: float) -> None:
        facts = [f"{name.rsplit('/', 1)[-1]} {short(row[name])}" for name in names]
        if (rate := row.get(f"{self.unit}_per_second")) is not None:
            facts.insert(0, f"{short(rate)} {SHORT_UNITS[self.unit]}/s")
        if self.bar:
            # The facts give way on a narrow terminal: bar, count and ETA keep their places.
            room = self.bar.console.width - len(self.description) - 2 * len(str(self.total_steps)) - 40
            self.bar.update(self.task, completed=row["step"], facts="  ".join(facts)[: max(room, 0)])
        elif now - self.last_line >= LINE_SECONDS or row["step"] == self.total_steps:
            done = row["step"] - self.start_step
            left = (now - self.opened) / done * (self.total_steps - row["step"]) if done else math.nan
            where = f"{self.description}  {row['step']}/{self.total_steps}"
            print("  ".join([where, *facts, f"ETA {duration(left)}"]), flush=True)
            self.last_line = now


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: 0-dimensional tensors and numpy scalars as numbers, non-finite numbers as text.

    Zero or a dropped key would hide a divergence, and a bare NaN is not JSON.

    >>> plain({"loss": float("nan"), "kl": [float("-inf"), 0.5]})
    {'loss': 'nan', 'kl': ['-inf', 0.5]}
    """
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, int | float | str | None) else str(value)


def append(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Adds rows to a JSONL file; each is on disk, whole, when this returns."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSONL file; none when it is absent. A last line cut off by a kill is left out."""
    if not path.exists():
        return []
    rows = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                if line.endswith("\n"):
                    raise BadInput(
                        f"{path}:{number} is not JSON. The file was changed by hand; remove the line."
                    ) from None
    return rows


def truncate(path: Path, last_step: int) -> list[dict[str, Any]]:
    """Drops the rows of a JSONL file after `last_step` (all of them when it is 0) and returns those kept."""
    kept = [row for row in read_jsonl(path) if row["step"] <= last_step] if last_step else []
    if path.exists():
        fresh = path.with_suffix(".tmp")
        fresh.write_text("", encoding="utf-8")
        append(fresh, kept)
        fresh.replace(path)
    return kept


def start_trackers(names: Sequence[str], directory: Path, start_step: int) -> list[Any]:
    """Started Accelerate trackers; BadInput names an unknown one or the package that is missing."""
    if not names:
        return []
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    available = [str(name) for name in get_available_trackers()]
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise BadInput(f"report_to: unknown tracker {name!r}. Known: {', '.join(LOGGER_TYPE_TO_CLASS)}.")
        if name not in available:
            raise BadInput(f"report_to: {name} is not installed. Install it (pip install {name}) or remove it.")
    run, stage = directory.resolve().parent.name, directory.name
    options = {
        # Events of the steps that are about to be taken again are hidden by purge_step.
        "tensorboard": {"run_name": "tensorboard", "logging_dir": str(directory), "purge_step": start_step + 1},
        "wandb": {"run_name": run, "name": stage},
        "trackio": {"run_name": run, "name": stage},
    }
    trackers = [LOGGER_TYPE_TO_CLASS[name](**options.get(name, {"run_name": f"{run}-{stage}"})) for name in names]
    for tracker in trackers:
        tracker.start()
    return trackers


def progress_bar(description: str, total_steps: int, start_step: int) -> tuple[Any, Any]:
    """A rich progress bar on stdout and its one task."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[facts]}", markup=False),
        refresh_per_second=2,  # the drawing thread shares the cores with the training
        speed_estimate_period=120,
        console=Console(),
    )
    return bar, bar.add_task(description, total=total_steps, completed=start_step, facts="")


def short(value: Any) -> str:
    """A number in at most about six characters, other values as they are.

    >>> [short(v) for v in (2.13456, 13123.4, 0.0000213, 7, "nan")]
    ['2.135', '13.1k', '2.13e-05', '7', 'nan']
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if abs(value) >= 10_000:
        return f"{value / 1e6:.3g}M" if abs(value) >= 999_950 else f"{value / 1e3:.1f}k"
    return str(value) if isinstance(value, int) else f"{value:.4g}" if abs(value) >= 1e-3 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """Seconds as a clock; "-:--" when not known.

    >>> duration(75), duration(3675.4), duration(float("nan"))
    ('1:15', '1:01:15', '-:--')
    """
    if not math.isfinite(seconds):
        return "-:--"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"


def printable(text: str) -> str:
    """`text` with control characters other than line breaks and tabs shown as escapes: a model may write any byte.

    >>> printable("red \\x1b[31m" + chr(10))
    'red \\\\x1b[31m\\n'
    """
    return "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else f"\\x{ord(c):02x}" for c in text)
