"""The whole chain: raw text to an RLHF-trained model, each stage its own process.

Reads   a chain file: `name`, `seed` and a section per stage, each exactly that stage's configuration
Writes  runs/NAME/{tokenizer,pretrain,sft,preferences,reward,ppo,evaluation}/, configs/, report.html, report.md, plots/
Run     python recipes/rlhf.py --config recipes/configs/tiny/rlhf.yaml [--from S] [--to S] [--only S] [--redo S]
        [--dry-run] [--ppo.train.kl_coef 0.1]
"""

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
from lmkit.chain import CHAIN_SEED, RUN, chained, is_stale, move_aside, relocated, run_process, stage_command
from lmkit.config import Config, StageConfig, knob, setting, to_yaml
from lmkit.errors import BadInput
from lmkit.processes import require_one
from lmkit.stage import CHAIN, Stage, inputs_of, made_from, run


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
    stages = list(CHAIN[CHAIN.index(first) : CHAIN.index(last) + 1])
    if config.redo not in (None, *stages):
        raise BadInput(f"--redo {config.redo} is not among the stages to go through: {', '.join(stages) or 'none'}.")
    return stages


def check_outside(stage: str, section: StageConfig, run_dir: Path) -> None:
    """BadInput unless what the chain does not make itself is there, and has the rows that the stage reads."""
    for field, path in inputs_of(section).items():
        if not Path(str(path)).is_relative_to(run_dir):
            require(path, f"{stage}.{field}")
    if made_from(section.output_dir) is None:
        from lmkit.data.sources import check_rows

        check_rows(stage, section)


def main(config: RLHFConfig) -> Path:
    require_one("rlhf.py, which starts each stage itself with the launcher named under `launch`,")
    began, ran = time.time(), []
    sections = {name: config.section(name) for name in selected(config)}
    for name, section in sections.items():
        check_outside(name, section, config.output_dir)
    for name, section in sections.items():
        redo = config.redo == name
        command = shlex.join(words := stage_command(name, config.output_dir, config.launch.get(name)))
        if config.dry_run and ran:
            print(f"{name}: would run, unless what it reads comes out unchanged")
            continue
        if redo or is_stale(stage := Stage(name, section), config.output_dir):
            why = "asked for" if redo else "what it reads has changed"
            print(f"{name}: to be made again ({why}); the old one {'would be' if config.dry_run else 'is'} kept")
            if not config.dry_run:
                move_aside(section.output_dir)
        elif stage.finished:
            continue
        ran.append(name)
        if config.dry_run:
            print(f"{name}: would run {command}")
            continue
        (config.output_dir / "configs").mkdir(parents=True, exist_ok=True)
        (config.output_dir / "configs" / f"{name}.yaml").write_text(to_yaml(section), encoding="utf-8")
        print(f"\n[{CHAIN.index(name) + 1}/{len(CHAIN)}] {command}", flush=True)
        if code := run_process(words, section.output_dir):
            print(f"The chain stopped at {name}. To go on: {shlex.join([sys.executable, *sys.argv])}", file=sys.stderr)
            sys.exit(code)
    if ran and not config.dry_run:
        from lmkit.report.report import write_report

        print(f"\n{write_report(config.output_dir)} written; {(time.time() - began) / 60:.1f} minutes in all.")
    return config.output_dir


if __name__ == "__main__":
    run(main, RLHFConfig, __doc__)
