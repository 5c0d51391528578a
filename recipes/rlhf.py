"""The whole chain: raw text to an RLHF-trained model, each stage its own process.

Reads   a chain file: `name`, `seed` and a section per stage, each exactly that stage's configuration
Writes  runs/NAME/{tokenizer,pretrain,sft,preferences,reward,ppo,evaluation}/, configs/, report.html, report.md, plots/
Run     python recipes/rlhf.py --config recipes/configs/tiny/rlhf.yaml [--from S] [--to S] [--only S] [--redo S]
        [--dry-run] [--ppo.train.kl_coef 0.1]
"""

import os
import shlex
import sys
import time
from pathlib import Path

from evaluation import EvaluationConfig
from ppo import PPOStageConfig
from preferences import PreferencesConfig
from pretrain import PretrainConfig
from pydantic import Field
from reward import RewardStageConfig
from sft import SFTStageConfig
from tokenizer import TokenizerConfig

from lmkit.artifact import require
from lmkit.config import Config, StageConfig, knob, setting, to_yaml
from lmkit.errors import BadInput
from lmkit.stage import CHAIN, Stage, inputs_of, made_from, move_aside, run, run_process

RUN = Path("<run>")  # stands for runs/NAME in the sections' defaults, until the name is known
CHAIN_SEED = -1  # stands for the chain's seed


def relocated(config: StageConfig, old: Path, new: Path, seed: int) -> StageConfig:
    """The configuration with every path below `old` moved below `new`, and with that seed."""
    values = config.model_dump() | {"seed": seed}
    inside = {k: v for k, v in values.items() if isinstance(v, Path | str) and Path(v).is_relative_to(old)}
    moved = {k: type(v)(new / Path(v).relative_to(old)) for k, v in inside.items()}
    return type(config).model_validate(values | moved)


def chained(cls: type[StageConfig]) -> StageConfig:
    return relocated(cls(), Path("runs/tiny"), RUN, CHAIN_SEED)


class RLHFConfig(Config):
    name: str = setting("tiny", "the run's name; everything is written below runs/NAME", pattern=r"^\w[\w.-]{0,63}$")
    seed: int = setting(0, "seed of every stage whose section gives none")
    runs_dir: Path = knob(Path("runs"), "where runs are kept")
    launch: dict[str, Path] = knob({}, "stages to start by `accelerate launch`: {ppo: accelerate_configs/ddp.yaml}")
    first: str | None = Field(None, alias="from", description="the first stage to run")
    to: str | None = knob(None, "the last stage to run")
    only: str | None = knob(None, "the one stage to run")
    redo: str | None = knob(None, "a stage to make again; the old one is moved aside")
    dry_run: bool = knob(False, "print what would run, and why")
    tokenizer: TokenizerConfig = chained(TokenizerConfig)
    pretrain: PretrainConfig = chained(PretrainConfig)
    sft: SFTStageConfig = chained(SFTStageConfig)
    preferences: PreferencesConfig = chained(PreferencesConfig)
    reward: RewardStageConfig = chained(RewardStageConfig)
    ppo: PPOStageConfig = chained(PPOStageConfig)
    evaluation: EvaluationConfig = chained(EvaluationConfig)

    @property
    def output_dir(self) -> Path:
        return self.runs_dir / self.name

    def section(self, stage: str) -> StageConfig:
        """The stage's configuration with this run's paths and seed."""
        config = getattr(self, stage)
        return relocated(config, RUN, self.output_dir, self.seed if config.seed == CHAIN_SEED else config.seed)


def selected(config: RLHFConfig) -> list[str]:
    """The stages to go through, in order."""
    for name in (config.first, config.to, config.only, config.redo, *config.launch):
        if name not in (None, *CHAIN):
            raise BadInput(f"{name} is not a stage. The stages are {', '.join(CHAIN)}.")
    first, last = config.only or config.first or CHAIN[0], config.only or config.to or CHAIN[-1]
    return list(CHAIN[CHAIN.index(first) : CHAIN.index(last) + 1])


def command_of(stage: str, config: RLHFConfig) -> list[str]:
    """The command a person would type to run this one stage."""
    file = config.output_dir / "configs" / f"{stage}.yaml"
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(config.launch.get(stage))]
    recipe = [str(Path(__file__).parent / f"{stage}.py"), "--config", str(file)]
    return [sys.executable, *(launcher if stage in config.launch else []), *recipe]


def main(config: RLHFConfig) -> Path:
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise BadInput("rlhf.py starts each stage itself: run it with plain python, and name launchers under `launch`.")
    began, ran = time.time(), []
    sections = {name: config.section(name) for name in selected(config)}
    for name, section in sections.items():  # what the chain does not make itself must be there before it starts
        for field, path in inputs_of(section).items():
            if not Path(str(path)).is_relative_to(config.output_dir):
                require(path, f"{name}.{field}")
    if config.redo in sections and not config.dry_run:
        print(f"{config.redo}: the old one is kept as {move_aside(sections[config.redo].output_dir)}")
    for name, section in sections.items():
        if config.dry_run and (ran or config.redo == name):
            print(f"{name}: would run, unless what it reads comes out unchanged")
            continue
        stage, made = Stage(name, section), made_from(section.output_dir)
        if made and ran and stage.changed_inputs(made) and not stage.changed_settings(made):
            print(f"{name}: what it reads has changed, the old one is kept as {move_aside(stage.directory)}")
        if stage.finished:
            continue
        ran.append(name)
        command = command_of(name, config)
        if config.dry_run:
            print(f"{name}: would run {shlex.join(command)}")
            continue
        (config.output_dir / "configs").mkdir(parents=True, exist_ok=True)
        (config.output_dir / "configs" / f"{name}.yaml").write_text(to_yaml(section), encoding="utf-8")
        print(f"\n[{CHAIN.index(name) + 1}/{len(CHAIN)}] {shlex.join(command)}", flush=True)
        if code := run_process(command, section.output_dir):
            print(f"The chain stopped at {name}. To go on: {shlex.join([sys.executable, *sys.argv])}", file=sys.stderr)
            sys.exit(code)
    if ran and not config.dry_run:
        from lmkit.report.report import write_report

        print(f"\n{write_report(config.output_dir)} written; {(time.time() - began) / 60:.1f} minutes in all.")
    return config.output_dir


if __name__ == "__main__":
    run(main, RLHFConfig, __doc__)
