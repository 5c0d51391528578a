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
from pydantic import Field, model_validator
from reward import RewardStageConfig
from sft import SFTStageConfig
from tokenizer import TokenizerConfig

from lmkit import chain
from lmkit.artifact import require
from lmkit.config import Config, StageConfig, knob, setting, to_yaml
from lmkit.processes import require_one
from lmkit.rounds import recipe_of, stages_of
from lmkit.stage import Stage, inputs_of, made_from, run


class RLHFConfig(Config):
    name: str = setting("tiny", "the run's name; everything is written below runs/NAME", pattern=r"^\w[\w.-]{0,63}$")
    seed: int = setting(0, "seed of every stage whose section gives none")
    runs_dir: Path = knob(Path("runs"), "where runs are kept")
    rounds: int = setting(1, "how often preferences, reward and ppo are done, each time from the last policy", gt=0)
    launch: dict[str, Path] = knob({}, "stages to start by `accelerate launch`: {ppo: accelerate_configs/ddp.yaml}")
    first: str | None = Field(None, alias="from", description="the first stage to run")
    to: str | None = knob(None, "the last stage to run")
    only: str | None = knob(None, "the one stage to run")
    redo: str | None = knob(None, "a stage to make again; the old one is moved aside")
    dry_run: bool = knob(False, "print what would run, and why")
    tokenizer: TokenizerConfig = chain.chained(TokenizerConfig)
    pretrain: PretrainConfig = chain.chained(PretrainConfig)
    sft: SFTStageConfig = chain.chained(SFTStageConfig)
    preferences: PreferencesConfig = chain.chained(PreferencesConfig)
    reward: RewardStageConfig = chain.chained(RewardStageConfig)
    ppo: PPOStageConfig = chain.chained(PPOStageConfig)
    evaluation: EvaluationConfig = chain.chained(EvaluationConfig)

    @property
    def output_dir(self) -> Path:
        return self.runs_dir / self.name

    @model_validator(mode="after")
    def _can_be_repeated(self) -> "RLHFConfig":
        given = {"preferences.data": self.preferences.data, "center_on": self.reward.center_on == "samples"}
        if self.rounds > 1 and (found := [name for name, value in given.items() if value]):
            raise ValueError(f"rounds {self.rounds} and {found[0]}: a later round samples its pairs; leave one out")
        return self

    def section(self, stage: str) -> StageConfig:
        """The stage's configuration with this run's paths and seed."""
        config = chain.repeated(getattr(self, recipe_of(stage)[0]), stage, self.rounds)
        seed = self.seed if config.seed == chain.CHAIN_SEED else config.seed
        return chain.relocated(config, chain.RUN, self.output_dir, seed)


def check_outside(stage: str, section: StageConfig, run_dir: Path) -> None:
    """BadInput unless what the chain does not make itself is there, and has the rows that the stage reads."""
    for field, source in inputs_of(section).items():
        for path in source if isinstance(source, list) else [source]:
            if not chain.is_inside(path, run_dir):
                require(path, f"{stage}.{field}")
    if made_from(section.output_dir) is None:
        from lmkit.data.sources import check_rows

        check_rows(recipe_of(stage)[0], section)


def main(config: RLHFConfig) -> Path:
    require_one("rlhf.py, which starts each stage itself with the launcher named under `launch`,")
    began, ran = time.time(), []
    stages = stages_of(config.rounds)
    names = chain.selected(stages, config.first, config.to, config.only, config.redo, config.launch)
    sections = {name: config.section(name) for name in names}
    for name, section in sections.items():
        check_outside(name, section, config.output_dir)
    for name, section in sections.items():
        redo, (recipe, _) = config.redo == name, recipe_of(name)
        command = shlex.join(words := chain.stage_command(name, config.output_dir, config.launch.get(recipe)))
        if config.dry_run and ran:
            print(f"{name}: would run, unless what it reads comes out unchanged")
            continue
        if redo or chain.is_stale(stage := Stage(recipe, section), config.output_dir):
            why = "asked for" if redo else "what it reads has changed"
            print(f"{name}: to be made again ({why}); the old one {'would be' if config.dry_run else 'is'} kept")
            if not config.dry_run:
                chain.move_aside(section.output_dir)
        elif stage.finished:
            continue
        ran.append(name)
        if config.dry_run:
            print(f"{name}: would run {command}")
            continue
        (config.output_dir / "configs").mkdir(parents=True, exist_ok=True)
        (config.output_dir / "configs" / f"{name}.yaml").write_text(to_yaml(section), encoding="utf-8")
        print(f"\n[{stages.index(name) + 1}/{len(stages)}] {command}", flush=True)
        if code := chain.run_process(words, section.output_dir):
            print(f"The chain stopped at {name}. To go on: {shlex.join([sys.executable, *sys.argv])}", file=sys.stderr)
            sys.exit(code)
    if ran and not config.dry_run:
        from lmkit.report.report import write_report

        print(f"\n{write_report(config.output_dir)} written; {(time.time() - began) / 60:.1f} minutes in all.")
    return config.output_dir


if __name__ == "__main__":
    run(main, RLHFConfig, __doc__)
