"""One Markdown table over runs of the same chain with different seeds, from what their evaluations wrote.

python benchmarks/seeds.py runs/seed0 runs/seed1 runs/seed2
"""

import json
import sys
from pathlib import Path

from lmkit.report.read import pretrain_lines
from lmkit.rounds import CHAIN
from lmkit.stage import read_record

ROWS = {
    "gold, base": "gold/base",
    "gold, SFT": "gold/sft",
    "gold, best of 8 by the reward model": "gold/best_of_8",
    "gold, PPO": "gold/ppo",
    "PPO beats SFT by gold": "win_rate/ppo_vs_sft",
    "KL of PPO from SFT, nats": "kl/ppo",
    "length in tokens, SFT": "length/sft",
    "length in tokens, PPO": "length/ppo",
    "ended, SFT": "eos_rate/sft",
    "ended, PPO": "eos_rate/ppo",
    "bits per byte, base": "bits_per_byte/base",
    "bits per byte, SFT": "bits_per_byte/sft",
    "bits per byte, PPO": "bits_per_byte/ppo",
}
COMPONENTS = ["animal", "object", "hero", "kindness", "ending", "grammar", "repetition", "length"]


def cell(metrics: dict, key: str) -> str:
    low, high = metrics.get(f"{key}_low"), metrics.get(f"{key}_high")
    interval = f" [{low:.2f}, {high:.2f}]" if low is not None else ""
    return f"{metrics[key]:.3f}{interval}" if key in metrics else "-"


def table(runs: list[Path]) -> list[str]:
    """Lines of Markdown: a column a run, brackets are 95 % bootstrap intervals over prompts."""
    results = [json.loads((run / "evaluation" / "results" / "metrics.json").read_text()) for run in runs]
    records = [{stage: read_record(run / stage) for stage in CHAIN} for run in runs]
    seeds = [record["evaluation"]["seed"] for record in records]
    lines = ["| | " + " | ".join(f"seed {seed}" for seed in seeds) + " |", "|---|" + "---:|" * len(runs)]

    def row(name: str, cells: list[str]) -> None:
        lines.append(f"| {name} | " + " | ".join(cells) + " |")

    row("held-out prompts", [str(result["num_prompts"]) for result in results])
    for name, key in ROWS.items():
        row(name, [cell(result, key) for result in results])
    row("gold, PPO minus SFT", [f"{result['gold/ppo'] - result['gold/sft']:+.3f}" for result in results])
    for component in COMPONENTS:
        key = f"gold_{component}"
        row(f"{component}: SFT, PPO", [f"{r[f'{key}/sft']:.3f}, {r[f'{key}/ppo']:.3f}" for r in results])
    for name in ("accuracy", "ceiling", "calibration_error", "length_correlation"):
        row(f"reward model: {name}", [f"{record['reward']['metrics'][name]:.3f}" for record in records])
    found = [record["pretrain"]["metrics"] for record in records]
    row("best line without weights, bits per byte", [f"{f[next(iter(pretrain_lines(f)))]:.3f}" for f in found])
    row("seconds in the stages", [f"{sum(record[stage]['seconds'] for stage in CHAIN):.0f}" for record in records])
    return lines


if __name__ == "__main__":
    print("\n".join(table([Path(run) for run in sys.argv[1:]])))
