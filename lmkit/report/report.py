"""The report of a run: report.html, report.md and plots/, from what the stages recorded and nothing else.

It works on any part of a run; what was not run is named, not imagined. Warnings come first, every mean over prompts has
its interval and count, and losses are shown beside gains.
"""

from __future__ import annotations

import json
import shlex
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lmkit.config import read_mapping
from lmkit.report.blocks import Answers, Block, Code, Figures, Heading, Table, Text, Warnings, to_html, to_markdown
from lmkit.report.checks import warnings
from lmkit.report.plots import best_of_kl_key, best_of_sizes, write_plots
from lmkit.report.read import Run, pretrain_lines, read_run, series
from lmkit.rounds import ROUND, in_round, recipe_of
from lmkit.tracking import duration, printable, short

NUM_PROMPTS = 12
LANGUAGE_METRICS = {"bits_per_byte": 4, "perplexity": 2}  # name -> digits shown
NUM_DISPUTED = 3
# section -> picture -> caption; pictures the run has no data for are left out
PICTURES = {
    "What the reward buys": {
        "frontier": "Gain over SFT by the reward model and by the judge, against the distance gone for it.",
        "judged": "All models by the judge.",
        "components": "Where the gold score was gained and lost.",
    },
    "PPO": {
        "ppo_score": "The number PPO climbs. It shows that PPO works, not that answers are better.",
        "ppo_kl": "How far the policy has moved from the SFT model, per completion.",
        "ppo_gold": "Watched, never learnt from. A fall while the score rises is over-optimisation.",
        "ppo_length": "A drift here can be what the reward model pays for.",
        "ppo_eos_rate": "Completions that end by themselves rather than being cut off.",
        "ppo_entropy": "Near 0 the policy always says the same.",
        "ppo_repetition": "4-grams that occurred before in the same completion.",
        "ppo_clip_fraction": "How often an update ran into its limit.",
        "ppo_explained_variance": "1: the critic foresees returns; 0: no better than their mean.",
        "ppo_learning_rate": "The schedule.",
    },
    "Reward model": {
        "reward_accuracy": "How often the preferred completion has the higher score.",
        "reward_calibration": "How sure it is against how often it is right; numbers: pairs in the bin.",
    },
    "Language modelling": {
        "pretrain_loss": "Pretraining.",
        "pretrain_bits_per_byte": "Held-out bits per byte; dashed: the best line below that has no weights.",
        "pretrain_copying": "Held-out tokens rarer than 1 in 100: where the curves part, the model learns to copy.",
        "sft_loss": "Supervised fine-tuning.",
    },
}


def write_report(run_dir: Path) -> Path:
    """Writes report.html, report.md and plots/*.png into a run directory and returns the path of the page."""
    run = read_run(run_dir)
    plots = write_plots(run, run.path / "plots")
    title = f"Run {run.path.resolve().name}"
    blocks = list(content(run, plots))
    (run.path / "report.md").write_text(to_markdown(title, blocks, run.path), encoding="utf-8")
    page = run.path / "report.html"
    page.write_text(to_html(title, blocks), encoding="utf-8")
    return page


def content(run: Run, plots: Mapping[str, Path]) -> Iterator[Block]:
    yield Text(_origin(run))
    if run.unfinished:
        yield Text(f"Not finished: {', '.join(run.unfinished)}. What follows covers the rest.", note=True)
    if run.metrics("preferences").get("given") is False:
        yield Text("Preferences here are synthetic: a program, not a person, chose between completions.", note=True)
    if found := warnings(run):
        yield Warnings(found)
    if run.evaluation:
        yield from _comparison(run)
    facts = {"Reward model": _reward_model, "Language modelling": _language_model}
    for title, captions in PICTURES.items():
        blocks = list(facts[title](run)) if title in facts else []
        if files := [(plots[name], caption) for name, caption in captions.items() if name in plots]:
            blocks.append(Figures(files))
        if blocks:
            yield Heading(title)
            yield from blocks
    yield from _rounds(run)
    if run.samples:
        yield from _samples(run)
    if run.curation:
        yield from _curation(run.curation)
    yield Heading("Time and memory")
    yield _cost(run)
    yield Heading("To reproduce")
    yield Code(_reproduce(run))


def _origin(run: Run) -> str:
    records = [stage.record for stage in run.stages.values() if stage.record]
    if not records:
        return "No stage of this run is finished."
    seconds, seeds = sum(r["seconds"] for r in records), sorted({r["seed"] for r in records})
    hardware = records[-1]["hardware"]
    processes = max(r["hardware"]["processes"] for r in records)
    return (
        f"{len(records)} stages in {duration(seconds)} on {hardware['device']} with {hardware['cpus']} CPUs, "
        f"{processes} process{'es' * (processes > 1)}, seed {', '.join(map(str, seeds))}."
    )


# -------------------------------------------------------------------------------------------------------- comparison


def _comparison(run: Run) -> Iterator[Block]:
    found, models, judge = run.evaluation, run.models, run.judge
    yield Heading("Base, SFT, best-of-n and PPO on the same held-out prompts")
    if "win_rate/ppo_vs_sft" in found:
        rate = cell(found, "win_rate/ppo_vs_sft", 3)
        yield Text(f"By {judge}, PPO is better than SFT on {rate} of the prompts, ties counted half.")
    rows = [
        ("gold score", "gold", 2),
        ("score by a judge model", "judge", 2),
        ("score by the reward model", "score", 2),
        ("length (tokens)", "length", 1),
        ("share that ends", "eos_rate", 3),
        ("KL from SFT (nats)", "kl", 2),
        ("bits per byte", "bits_per_byte", 4),
    ]
    found = found | {f"kl/best_of_{n}": best_of_kl_key(found, n) for n in best_of_sizes(found)}
    lines = [[label, *(cell(found, f"{key}/{m}", digits) for m in models)] for label, key, digits in rows]
    lines += [
        [label, *(cell(found, f"{key}/{m}_vs_sft", 3) for m in models)]
        for label, key in (
            (f"wins against SFT by {judge}", "win_rate"),
            ("wins by the reward model", "win_rate_by_score"),
            ("longer than SFT's answer", "win_rate_by_length"),
        )
    ]
    yield Table(["", *models], [line for line in lines if any(value != "-" for value in line[1:])])
    yield Text(
        f"n = {found['num_prompts']} prompts, one sample each at temperature 1, one training run. Brackets: 95 % "
        "bootstrap intervals over prompts; what another seed would change is not in them. The reward model is what PPO "
        "climbed and best-of-n chose by: its scores are no evidence of quality."
    )
    yield from _headroom(found, judge)
    if run.components:
        yield from _components(run)


def _headroom(found: Mapping[str, Any], judge: str | None) -> Iterator[Block]:
    if "headroom/by_reward_model" not in found:
        return
    largest = best_of_sizes(found)[-1]
    yield Text(
        f"Headroom before PPO: over one sample, the best of {largest} SFT samples gains "
        f"{cell(found, 'headroom/by_reward_model', 2)} when the reward model chooses, and "
        f"{cell(found, 'headroom/by_judge', 2)} when {judge} itself does."
    )
    sizes = best_of_sizes(found)
    yield Table(
        ["best of n", *map(str, sizes)],
        [
            [f"mean by {judge}", *(f"{found[f'best_of_n/{n}']:.2f}" for n in sizes)],
            ["KL from SFT (nats)", *(f"{best_of_kl_key(found, n):.2f}" for n in sizes)],
        ],
    )


def _components(run: Run) -> Iterator[Block]:
    found, models = run.evaluation, run.models
    rows = []
    for name in run.components:
        change = found.get(f"gold_{name}/ppo", 0.0) - found.get(f"gold_{name}/sft", 0.0)
        worse = " (worse)" if change < -0.005 else ""
        rows.append([name, *(cell(found, f"gold_{name}/{m}", 3) for m in models), f"{change:+.3f}{worse}"])
    yield Text("Components of the gold score, means over the prompts:")
    yield Table(["component", *models, "PPO - SFT"], rows)


def cell(found: Mapping[str, Any], key: str, digits: int) -> str:
    """A number with its interval if it has one, "-" if it is not there.

    >>> cell({"gold/ppo": 5.4, "gold/ppo_low": 5.25, "gold/ppo_high": 5.5}, "gold/ppo", 2), cell({}, "gold/sft", 2)
    ('5.40 [5.25, 5.50]', '-')
    """
    if found.get(key) is None:
        return "-"
    low, high = found.get(f"{key}_low"), found.get(f"{key}_high")
    interval = "" if low is None else f" [{low:.{digits}f}, {high:.{digits}f}]"
    return f"{float(found[key]):.{digits}f}{interval}"


def _rounds(run: Run) -> Iterator[Block]:
    """What each round of a chain reached; the pictures above are of the first."""
    numbers = sorted({recipe_of(name)[1] for name in run.stages})
    if len(numbers) < 2:
        return
    rows = []
    for number in numbers:
        pairs, reward, ppo = (run.metrics(in_round(name, number)) for name in ROUND)
        after = [cell(ppo, f"eval/{key}", digits) for key, digits in (("score", 2), ("kl", 2), ("gold", 2))]
        rows.append([str(number), str(pairs.get("num_train", "-")), cell(reward, "accuracy", 3), *after])
    yield Heading("Rounds")
    yield Table(["round", "pairs", "reward model's accuracy", "score by it", "KL of the round (nats)", "gold"], rows)
    yield Text(
        "A round's scores are its own reward model's and not to be held against another's; its KL counts from where it "
        "started. Pictures of reward model and PPO are of the first round."
    )


def _samples(run: Run) -> Iterator[Block]:
    models, judge = run.models, run.judge
    columns = {name: digits for name, digits in ((judge, 2), ("score", 2), ("length", 0)) if name in run.samples[0]}

    def block(row: dict[str, Any], opened: bool) -> Answers:
        answers = [
            (model, ", ".join(f"{c} {row[c][model]:.{d}f}" for c, d in columns.items()), printable(row[model]))
            for model in models
            if model in row
        ]
        return Answers(printable(prompt_text(row["prompt"])), answers, opened)

    yield Heading("The same prompts side by side")
    yield Text(f"The first {min(NUM_PROMPTS, len(run.samples))} of {len(run.samples)} prompts, not chosen.")
    yield from (block(row, number < 3) for number, row in enumerate(run.samples[:NUM_PROMPTS]))
    if judge and "ppo" in models and len(run.samples) > NUM_PROMPTS:
        yield Text(f"Where the reward model and {judge} disagree most about PPO's answer (by rank):")
        yield from (block(row, False) for row in disputed(run.samples, judge))


def disputed(samples: list[dict[str, Any]], judge: str) -> list[dict[str, Any]]:
    """The rows whose PPO answer the reward model ranks furthest above or below the judge."""
    by_score, by_judge = (_ranks([row[name]["ppo"] for row in samples]) for name in ("score", judge))
    order = sorted(range(len(samples)), key=lambda i: -abs(by_score[i] - by_judge[i]))
    return [samples[i] for i in order[:NUM_DISPUTED]]


def _ranks(values: list[float]) -> list[float]:
    """Mean rank of each value among all, equal values sharing theirs."""
    return [sum(v < value for v in values) + (sum(v == value for v in values) - 1) / 2 for value in values]


def prompt_text(prompt: str | list[dict[str, str]]) -> str:
    """A prompt on one line, its roles named where it is a conversation."""
    if isinstance(prompt, str):
        return prompt
    return " / ".join(f"{message['role']}: {message['content']}" for message in prompt)


# ------------------------------------------------------------------------------------------------- models one by one


def _reward_model(run: Run) -> Iterator[Block]:
    found = run.metrics("reward")
    if "accuracy" not in found:
        return
    ceiling = f"; labels as noisy as these allow {found['ceiling']:.3f}" if "ceiling" in found else ""
    length = cell(found, "length_correlation", 2)
    yield Text(
        f"Held-out accuracy {cell(found, 'accuracy', 3)} on {found['num_heldout']} pairs{ceiling}. On the half "
        f"closest in length: {cell(found, 'accuracy_like_length', 3)}. Calibration error "
        f"{cell(found, 'calibration_error', 3)}, correlation of score and length {length}."
    )
    if "accuracy_noiseless" in found:
        yield Text(f"It orders a pair as the labeler's scores without noise do in {found['accuracy_noiseless']:.3f}.")
    if "member_agreement" in found:
        yield Text(
            f"Two members of the ensemble order a pair alike in {found['member_agreement']:.3f}; the mean of all their "
            f"scores has the accuracy {cell(found, 'accuracy_members_mean', 3)}."
        )
    if wrong := found.get("most_wrong"):
        yield Text("The held-out pairs that it gets most wrong:")
        for row in wrong:
            answers = [(s, f"score {row['score'][s]:.2f}", printable(row[s])) for s in ("chosen", "rejected")]
            yield Answers(printable(prompt_text(row["prompt"])), answers, opened=False)


def _curation(found: Mapping[str, Any]) -> Iterator[Block]:
    yield Heading("Curated prompts")
    yield Text(
        f"Of {found['num_prompts']} prompts in {found['source']}, {found['num_exact_duplicates']} were exact and "
        f"{found['num_near_duplicates']} near duplicates; {found['num_chosen']} were chosen, evenly from the clusters."
    )
    columns = {"cluster": "", "size": "", "chosen": "", "distance": ".2f", "typical": ""}
    rows = [[printable(format(row[name], spec)) for name, spec in columns.items()] for row in found["clusters"]]
    yield Table([*columns], rows)


def _language_model(run: Run) -> Iterator[Block]:
    found = run.metrics("pretrain")
    if "eval/bits_per_byte" not in found:
        return
    rows = [["this model", cell(found, "eval/bits_per_byte", 4), cell(found, "eval/perplexity", 2)]]
    if "eval/stride" in found:
        rows[0][0] += f" ({found['eval/context_length']} tokens of context, stride {found['eval/stride']})"
        unstrided = [cell(found, f"eval/unstrided_{name}", digits) for name, digits in LANGUAGE_METRICS.items()]
        rows.append([f"this model (stride {found['eval/context_length']}: no overlap)", *unstrided])
    for key, label in pretrain_lines(found).items():
        rows.append([label, cell(found, key, 4), "-"])
    yield Table(["after pretraining, on held-out text", "bits per byte", "perplexity per token"], rows)


# ---------------------------------------------------------------------------------------------------- cost, provenance


def _cost(run: Run) -> Table:
    rows, total = [], 0.0
    for name, stage in run.stages.items():
        _, speeds = series(stage.rows, "tokens_per_second")
        speed = short(statistics.median(speeds)) if speeds else "-"
        if stage.record is None:
            steps = stage.rows[-1]["step"] if stage.rows else 0
            rows.append([name, f"not finished, {steps} steps", speed, "-", "-"])
            continue
        total += stage.record["seconds"]
        memory = f"{stage.record['peak_memory_bytes'] / 1e9:.2f} GB"
        rows.append([name, duration(stage.record["seconds"]), speed, memory, stage.record["fingerprint"][:12]])
    rows.append(["together", duration(total), "", "", ""])
    return Table(["stage", "time", "tokens/s (median)", "peak memory", "fingerprint"], rows)


def _reproduce(run: Run) -> str:
    """Commit, one command a stage, versions: what somebody else needs to run the same again."""
    records = {name: stage.record for name, stage in run.stages.items() if stage.record}
    commits = dict.fromkeys(record["git_commit"] for record in records.values() if record["git_commit"])
    lines = [f"git checkout {commit}" for commit in commits]
    lines += [f"python recipes/{name}.py {_flags(run, name, record)}" for name, record in records.items()]
    versions = list(records.values())[-1]["versions"] if records else {}
    return "\n".join([*lines, "", *(f"{package} {version}" for package, version in versions.items())]).strip()


def _flags(run: Run, name: str, record: dict[str, Any]) -> str:
    """The stage's configuration file when it still says what the record says, else every value as a flag."""
    file, config = run.path / "configs" / f"{name}.yaml", record["full_config"]
    if file.exists() and read_mapping(file) == config:
        return f"--config {shlex.quote(str(file))}"
    return " ".join(f"--{key} {shlex.quote(json.dumps(value))}" for key, value in config.items())
