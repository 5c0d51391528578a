"""A run's directories as plain data: records, metrics, samples, log lines. What is not there is left out."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lmkit.rounds import rounds_of, stages_of
from lmkit.stage import read_record
from lmkit.tracking import read_jsonl


@dataclass(frozen=True)
class StageData:
    """What one stage left: record and ending are None where it is not finished or has not ended."""

    record: dict[str, Any] | None
    ending: dict[str, Any] | None
    rows: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    log: list[str]

    @property
    def metrics(self) -> dict[str, Any]:
        return self.record["metrics"] if self.record else {}


@dataclass(frozen=True)
class Run:
    """A run: its stages by name, in the chain's order, what the evaluation found, and what curating its prompts did.

    The last two are empty where there is none.
    """

    path: Path
    stages: dict[str, StageData]
    evaluation: dict[str, Any]
    samples: list[dict[str, Any]]
    curation: dict[str, Any] = field(default_factory=dict)

    def rows(self, stage: str) -> list[dict[str, Any]]:
        return self.stages[stage].rows if stage in self.stages else []

    def metrics(self, stage: str) -> dict[str, Any]:
        return self.stages[stage].metrics if stage in self.stages else {}

    @property
    def unfinished(self) -> list[str]:
        names = stages_of(rounds_of(self.path))
        return [name for name in names if name not in self.stages or self.stages[name].record is None]

    @property
    def models(self) -> list[str]:
        """Names of the compared models, in the order they are made: base, sft, best_of_8, ppo."""
        names = (key.removeprefix("length/") for key in self.evaluation if key.startswith("length/"))
        order = {"base": 0, "sft": 1, "ppo": 3}
        return sorted((n for n in names if not n.endswith(("_low", "_high"))), key=lambda name: order.get(name, 2))

    @property
    def judge(self) -> str | None:
        """What judges the models: "gold", "judge" (a reward model trained on other pairs), or None."""
        name = self.evaluation.get("judge")
        return name if name in ("gold", "judge") else None

    @property
    def components(self) -> list[str]:
        """Parts of the gold score."""
        prefixes = (key.split("/")[0] for key in self.evaluation)
        return list(dict.fromkeys(p.removeprefix("gold_") for p in prefixes if p.startswith("gold_")))


def read_run(path: Path) -> Run:
    path = Path(path)
    stages = {name: _read_stage(path / name) for name in stages_of(rounds_of(path)) if (path / name).is_dir()}
    results = path / "evaluation" / "results"
    found, curation = (_json(file) or {} for file in (results / "metrics.json", path / "curation" / "clusters.json"))
    return Run(path, stages, found, read_jsonl(results / "samples.jsonl"), curation)


def series(rows: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of a metric, where it was logged; "nan" and "inf" become the numbers they stand for.

    >>> series([{"step": 1, "loss": 2.0}, {"step": 2}, {"step": 3, "loss": "nan"}], "loss")
    ([1, 3], [2.0, nan])
    """
    found = [(row["step"], float(row[key])) for row in rows if row.get(key) is not None]
    return [step for step, _ in found], [value for _, value in found]


def pretrain_lines(metrics: dict[str, Any]) -> dict[str, str]:
    """Keys of what a pretrained model is held against, and their names for a reader; the best first.

    >>> pretrain_lines({"eval/uniform_bits_per_byte": 3.0, "eval/kneser_ney_5_bits_per_byte": 2.0, "loss": 1.0})
    {'eval/kneser_ney_5_bits_per_byte': '5-gram, modified Kneser-Ney', 'eval/uniform_bits_per_byte': 'uniform'}
    """
    found = {}
    for key in metrics:
        if match := re.fullmatch(r"eval/(uniform|unigram|xz|kneser_ney_(\d+))_bits_per_byte", key):
            name, order = match.groups()
            found[key] = f"{order}-gram, modified Kneser-Ney" if order else {"xz": "xz -9"}.get(name, name)
    return dict(sorted(found.items(), key=lambda item: float(metrics[item[0]])))


def _read_stage(folder: Path) -> StageData:
    log = folder / "log.txt"
    return StageData(
        record=read_record(folder),
        ending=_json(folder / "exit.json"),
        rows=read_jsonl(folder / "metrics.jsonl"),
        samples=read_jsonl(folder / "samples.jsonl"),
        log=log.read_text(encoding="utf-8").splitlines() if log.exists() else [],
    )


def _json(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
