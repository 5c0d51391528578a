"""A run of the whole chain: where its stages lie, what in them is out of date, and how each is started."""

from __future__ import annotations

import itertools
import json
import signal
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lmkit.artifact import write_json
from lmkit.config import StageConfig
from lmkit.errors import BadInput, Interrupted
from lmkit.processes import run_group
from lmkit.rounds import in_round, recipe_of
from lmkit.stage import Stage, made_from

RUN = Path("<run>")  # stands for runs/NAME in the sections' defaults, until the name is known
CHAIN_SEED = -1  # stands for the chain's seed


def relocated(config: StageConfig, old: Path, new: Path, seed: int) -> StageConfig:
    """The configuration with every path below `old` moved below `new`, and with that seed."""

    def moved(value: Any) -> Any:
        if isinstance(value, list):
            return [moved(one) for one in value]
        if isinstance(value, Path | str) and Path(value).is_relative_to(old):
            return type(value)(new / Path(value).relative_to(old))
        return value

    values = {name: moved(value) for name, value in config.model_dump().items()}
    return type(config).model_validate(values | {"seed": seed})


def chained(cls: type[StageConfig]) -> Any:
    """A stage's defaults, which name the run `tiny`, as defaults in a run of any name."""
    return relocated(cls(), Path("runs/tiny"), RUN, CHAIN_SEED)


def repeated(config: StageConfig, stage: str, rounds: int) -> StageConfig:
    """A recipe's configuration in the chain, as that of one of its stages, with the paths of the stage's round.

    Round r samples from the policy of the round before and goes on from its reward model; its PPO starts at that policy
    and is held near it. The evaluation judges the last policy.
    """
    recipe, number = recipe_of(stage)
    if recipe == "evaluation":
        moves = {name: in_round(name, rounds) for name in ("ppo", "reward")}
    else:
        before = {"preferences": "ppo", "reward": "reward", "ppo": "ppo"}.get(recipe)
        moves = {} if number == 1 else {recipe: stage, "sft": in_round(before, number - 1)}
        moves |= {name: in_round(name, number) for name in ("preferences", "reward") if name != recipe}
    for old, new in moves.items():
        config = relocated(config, RUN / old, RUN / new, config.seed)
    # A judge that no policy climbs is trained once, in the first round.
    return config.model_copy(update={"judge_dir": None}) if recipe == "reward" and number > 1 else config


def selected(
    stages: list[str],
    first: str | None,
    last: str | None,
    only: str | None,
    redo: str | None,
    launch: Iterable[str],
) -> list[str]:
    """The stages to go through, in order; BadInput names what is none of them."""
    for name in (first, last, only, redo, *launch):
        if name not in (None, *stages):
            raise BadInput(f"{name} is not a stage. The stages are {', '.join(stages)}.")
    first, last = only or first or stages[0], only or last or stages[-1]
    chosen = stages[stages.index(first) : stages.index(last) + 1]
    if redo not in (None, *chosen):
        raise BadInput(f"--redo {redo} is not among the stages to go through: {', '.join(chosen) or 'none'}.")
    return chosen


def is_inside(source: Any, run_dir: Path) -> bool:
    """Whether an input, a path or a list of them, is of the run itself."""
    several = source if isinstance(source, list) else [source]
    return all(Path(str(one)).is_relative_to(run_dir) for one in several)


def is_stale(stage: Stage, run_dir: Path) -> bool:
    """Whether a stage has its present settings but was made from other outputs of earlier stages of the run."""
    made = made_from(stage.directory)
    changed = stage.changed_inputs(made) if made and not stage.changed_settings(made) else []
    return bool(changed) and all(is_inside(stage.inputs.get(name), run_dir) for name in changed)


def stage_command(stage: str, run_dir: Path, launcher: Path | None = None) -> list[str]:
    """The command a person would type to run one stage: plain python, or `accelerate launch` with a configuration."""
    recipe = Path(__file__).resolve().parents[1] / "recipes" / f"{recipe_of(stage)[0]}.py"
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(launcher)] if launcher else []
    return [sys.executable, *launch, str(recipe), "--config", str(run_dir / "configs" / f"{stage}.yaml")]


def move_aside(directory: Path) -> Path | None:
    """Renames a stage directory to the first free `STAGE.old-N`, for nothing is deleted; None if there is nothing."""
    if not directory.exists():
        return None
    aside = next(p for n in itertools.count(1) if not (p := directory.with_name(f"{directory.name}.old-{n}")).exists())
    return directory.rename(aside)


def run_process(command: list[str], directory: Path) -> int:
    """Runs a stage as its own process group, passing signals on; its exit code, from exit.json under a launcher.

    A stage that was killed had no time to write exit.json: it is written here, with 75, for the same command goes on.
    """
    file = directory / "exit.json"
    file.unlink(missing_ok=True)
    code = run_group(command)
    if code and file.exists():
        return json.loads(file.read_text(encoding="utf-8"))["code"]
    if code < 0:
        code, killed_by = Interrupted.exit_code, signal.Signals(-code).name
        directory.mkdir(parents=True, exist_ok=True)
        write_json(file, {"code": code, "reason": f"killed by {killed_by}; was there memory enough?"})
    return code
