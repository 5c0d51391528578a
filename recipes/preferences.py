"""Preferences: pairs of completions sampled from the SFT model and labelled, or pairs that people gave.

Reads   --model and --prompts, completions of each, labelled by --labeler; or --data, pairs that are given
Writes  output_dir/data: a DatasetDict (train, heldout; no prompt in both) of prompt, chosen, rejected

A labeler scores completions; a simulated annotator prefers one of two with probability sigmoid(gap of scores /
temperature) and errs in a share `flip` of the labels; score_chosen and score_rejected are for the record alone. With
`--labeler people` the stage writes output_dir/pairs.jsonl, stops for `lmkit label`, and goes on once all are answered.

    python recipes/preferences.py --num_pairs 50 --labeler people
"""

import shutil
from functools import partial
from pathlib import Path
from typing import Literal

from pydantic import field_validator

from lmkit import processes
from lmkit.config import StageConfig, knob, setting, source
from lmkit.errors import Interrupted
from lmkit.stage import Stage, is_main, run

GOLD = "lmkit.evaluation.label:gold"


class PreferencesConfig(StageConfig):
    output_dir: Path = knob(Path("runs/tiny/preferences"), "where the stage writes")
    data: str | list[str] | None = source(None, "given pairs (prompt, chosen, rejected); empty: sample and label")
    mapping: dict[str, str] = setting({}, "columns of data or prompts to prompt, chosen, rejected, if not recognised")
    on_bad: Literal["error", "skip"] = setting("error", "bad rows of data or prompts: an error above 1 %, or skipped")
    model: Path | None = source(Path("runs/tiny/sft/model"), "model whose completions are compared")
    prompts: str | list[str] = source("data/tales/prompts.train.jsonl.gz", "prompts to sample for")
    num_pairs: int = setting(5300, "pairs to sample, ties included; prompts are used again when they run out", gt=1)
    num_generations: int = setting(2, "completions of each prompt; each two of them are a pair", gt=1)
    max_new_tokens: int = setting(128, "longest completion in tokens", gt=0)
    temperature: float = setting(1.0, "temperature of sampling", gt=0)
    batch_size: int = knob(256, "completions sampled at a time", gt=1)
    labeler: str | None = source(GOLD, "gold, people, module:function, or the directory of a reward model")
    annotator_temperature: float = setting(1.0, "temperature of the annotator; 0 always takes the better", ge=0)
    flip: float = setting(0.05, "share of labels turned round", ge=0, lt=0.5)
    heldout_fraction: float = setting(0.1, "share of prompts whose pairs are held out", gt=0, lt=1)

    @field_validator("labeler")
    @classmethod
    def _by_name(cls, labeler: str | None) -> str | None:
        return {"gold": GOLD, "people": None}.get(labeler, labeler)


def main(config: PreferencesConfig) -> Path:
    stage = Stage("preferences", config)
    if stage.finished:
        return stage.directory
    from datasets import DatasetDict

    from lmkit.data.formats import inspect_rows
    from lmkit.data.sources import load_pairs
    from lmkit.evaluation.label import heldout_rows

    with stage:
        if config.data is not None:
            rows, facts = load_pairs(config.data, config.mapping, config.on_bad), {}
        else:
            rows, facts = sample_pairs(config, stage, processes.join())
        held = heldout_rows([str(prompt) for prompt in rows["prompt"]], config.heldout_fraction, config.seed)
        pairs = DatasetDict(train=rows.select((~held).nonzero()[0]), heldout=rows.select(held.nonzero()[0]))
        facts |= {f"num_{name}": len(pairs[name]) for name in pairs} | inspect_rows(pairs["train"], pairs["heldout"])
        stage.say("preferences: " + ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in facts.items()))
        first = pairs["train"][0]
        stage.say(f"sample: {first['prompt']}\n  chosen:   {first['chosen']}\n  rejected: {first['rejected']}")
        if is_main():
            with stage.seal("data") as folder:
                pairs.save_to_disk(folder)
            shutil.rmtree(stage.directory / "completions", ignore_errors=True)
        stage.finish(facts | {"given": config.data is not None})
    return stage.directory


def sample_pairs(config: PreferencesConfig, stage: Stage, state):
    """Rows of labelled pairs sampled from the model, and facts about them."""
    from lmkit.data.sources import load_prompts
    from lmkit.evaluation.label import label_pairs, pairs_of, people_labelled, scorer, write_pairs
    from lmkit.generation.complete import complete_shared
    from lmkit.models.load import load_language_model
    from lmkit.tracking import Tracker

    to_label = stage.directory / "pairs.jsonl"
    if config.labeler is None and to_label.exists():
        return people_labelled(to_label, stage.say)
    score = scorer(config.labeler, state.device) if config.labeler else None
    model, tokenizer = load_language_model(config.model, state.device)
    available, k = load_prompts(config.prompts, config.mapping, config.on_bad)["prompt"], config.num_generations
    num_prompts = -(-config.num_pairs // (k * (k - 1) // 2))
    prompts = [available[i % len(available)] for i in range(num_prompts) for _ in range(k)]
    kept, total = stage.directory / "completions", len(prompts)
    with Tracker(stage.directory, total_steps=total, report_to=config.report_to, description=stage.name) as tracker:

        def progress(done: int, tokens: int) -> None:
            tracker.log(done, {"completions": done}, tokens=tokens)
            if stage.stop_requested():
                raise Interrupted(f"stopped after {done} of {total} completions, which are kept.")

        options = config.model_dump(include={"max_new_tokens", "temperature", "batch_size", "seed"})
        completions = complete_shared(model, tokenizer, prompts, state=state, progress=progress, keep=kept, **options)
    texts, pairs = [completion.text for completion in completions], pairs_of(num_prompts, k, config.num_pairs)
    cut = {completion.text for completion in completions if not completion.finished}
    if score is None:
        if is_main():
            write_pairs(to_label, prompts, texts, pairs, cut)
            shutil.rmtree(kept)
        raise Interrupted(f"{to_label} is ready. Label its pairs: `lmkit label {to_label} --annotator NAME`.")
    score = partial(score, cut_off=cut) if Path(config.labeler).is_dir() else score
    rows, facts = label_pairs(prompts, texts, pairs, score, config.annotator_temperature, config.flip, config.seed, cut)
    means = {"eos_rate": [c.finished for c in completions], "completion_tokens": [len(c.ids) for c in completions]}
    return rows, facts | {name: sum(values) / len(values) for name, values in means.items()}


if __name__ == "__main__":
    run(main, PreferencesConfig, __doc__)
