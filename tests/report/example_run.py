"""A run directory with plausible numbers, as the stages write one, without training anything.

python tests/report/example_run.py /tmp/runs/example [--without-gold] [--stages 2]
"""

import argparse
import json
import math
import random
from pathlib import Path

from lmkit.rounds import CHAIN

MODELS = ("base", "sft", "ppo", "best_of_8")
GOLD = {"base": 1.2, "sft": 3.29, "best_of_8": 5.08, "ppo": 5.42}
SCORE = {"base": -1.4, "sft": 0.02, "best_of_8": 1.5, "ppo": 2.24}
COMPONENTS = {
    "animal": (0.64, 0.78), "object": (0.88, 0.72), "kindness": (0.05, 0.97), "ending": (0.04, 0.99),
    "hero": (0.93, 0.98), "grammar": (0.94, 0.99), "repetition": (-0.15, -0.01), "length": (-0.04, 0.0),
}  # fmt: skip
STORY = (
    "Long ago, a shy squirrel called Jack lived by the market. One foggy day, Jack wanted a flute more than anything."
)
PARTS = (
    "From that day on, Leo and Rosa were the best of friends.",
    "Hugo and Yara never spoke again.",
    "A clever frog came by.",
)


def write_run(run: Path, *, stages: int = 7, gold: bool = True, seed: int = 0) -> Path:
    """Writes the first `stages` of the chain; gold: with the gold score of tales, else without any judge."""
    draw = random.Random(seed)
    for name in CHAIN[:stages]:
        folder = run / name
        folder.mkdir(parents=True, exist_ok=True)
        rows, metrics = {
            "tokenizer": lambda: ([], {"num_tokens": 1024}),
            "pretrain": lambda: pretrain(draw),
            "sft": lambda: sft(draw),
            "preferences": lambda: ([], {"given": not gold, "ties": 274, "ceiling": 0.801}),
            "reward": lambda: reward(draw),
            "ppo": lambda: ppo(draw, gold),
            "evaluation": lambda: ([], {}),
        }[name]()
        write_jsonl(folder / "metrics.jsonl", rows)
        (folder / "stage.json").write_text(json.dumps(record(name, metrics, seed)))
        (folder / "log.txt").write_text(f"{name}: some facts\n")
    if stages == len(CHAIN):
        evaluation(run / "evaluation" / "results", draw, gold)
    return run


def record(name, metrics, seed):
    return {
        "stage": name, "fingerprint": f"{hash_of(name)}", "config": {}, "full_config": {"seed": seed, "max_steps": 3},
        "inputs": {}, "artifacts": {}, "metrics": metrics, "seed": seed, "seconds": 30.0 + 40 * CHAIN.index(name),
        "peak_memory_bytes": 700_000_000, "git_commit": "0123456789abcdef0123456789abcdef01234567",
        "versions": {"python": "3.11.7", "lmkit": "0.1.0", "torch": "2.13.0"},
        "hardware": {"device": "x86_64", "cpus": 2, "processes": 1},
    }  # fmt: skip


def hash_of(name):
    return name.encode().hex().ljust(64, "0")


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def pretrain(draw):
    rows = []
    for step in range(10, 1001, 10):
        loss = 0.6 + 5.5 * math.exp(-step / 120) + draw.gauss(0, 0.02)
        row = {"step": step, "seconds": step / 5, "loss": loss, "learning_rate": 1e-3, "tokens_per_second": 13_000.0}
        if step % 100 == 0:
            row |= {"eval/nats_per_token": loss + 0.03, "eval/bits_per_byte": (loss + 0.03) / 2.7}
            row |= {"eval/rare_first_nats_per_token": 2 + loss, "eval/rare_repeated_nats_per_token": 2 * loss}
        rows.append(row)
    lines = {
        "kneser_ney_5": 0.263,
        "kneser_ney_7": 0.271,
        "xz": 0.6,
        "unigram": 1.92,
        "uniform": 2.9,
        "unstrided": 0.24,
    }
    found = {"eval/perplexity": 1.87, "eval/unstrided_perplexity": 1.9, "eval/context_length": 256, "eval/stride": 128}
    return rows, rows[-1] | found | {f"eval/{name}_bits_per_byte": value for name, value in lines.items()}


def sft(draw):
    rows = []
    for step in range(10, 301, 10):
        loss = 0.8 + 0.9 * math.exp(-step / 60) + draw.gauss(0, 0.03)
        rows.append({"step": step, "seconds": step, "loss": loss, "tokens_per_second": 9_000.0})
        if step % 100 == 0:
            rows.append({"step": step, "seconds": step, "eval_loss": loss + 0.05})
    return rows, {"eval_loss": 0.86}


def reward(draw):
    rows = []
    for step in range(10, 221, 10):
        rows.append({"step": step, "seconds": step, "loss": 0.5, "accuracy": 0.78 - 0.2 * math.exp(-step / 60)})
        if step % 50 == 0:
            rows.append({"step": step, "seconds": step, "eval_accuracy": 0.75 - 0.15 * math.exp(-step / 60)})
    bins = [
        {"confidence": 0.55 + 0.1 * n, "accuracy": 0.53 + 0.095 * n + draw.gauss(0, 0.01), "count": 120 - 20 * n}
        for n in range(5)
    ]
    return rows, {
        "accuracy": 0.742, "accuracy_low": 0.696, "accuracy_high": 0.787, "accuracy_like_length": 0.731,
        "calibration_error": 0.031, "length_correlation": 0.2, "num_heldout": 380, "ceiling": 0.801,
        "calibration": bins,
    }  # fmt: skip


def ppo(draw, gold):
    rows = []
    for step in range(51):
        done = 1 - math.exp(-step / 14)
        row = {"step": step, "seconds": 7.0 * step}
        if step:
            row |= {
                "objective/scores": 2.24 * done + draw.gauss(0, 0.08), "objective/scores_std": 1.1 - 0.5 * done,
                "objective/kl": 8.4 * done, "rollout/completion_length_mean": 68 + 8 * done + draw.gauss(0, 1),
                "rollout/eos_rate": min(1.0, 0.92 + 0.09 * done), "policy/entropy_avg": 0.62 - 0.3 * done,
                "rollout/repeat_ngram": 0.08 - 0.05 * done, "policy/clipfrac_avg": 0.1 * math.exp(-step / 30),
                "val/clipfrac_avg": 0.02, "val/explained_var": -0.4 + 1.1 * done, "lr": 3e-4 * (1 - step / 50),
                "critic_lr": 9e-4 * (1 - step / 50), "tokens_per_second": 900.0,
            }  # fmt: skip
        if step % 10 == 0:
            row |= {"eval/score": 2.2 * done, "eval/kl": 8.2 * done, "eval/completion_length": 68 + 8 * done}
            row |= {"eval/eos_rate": min(1.0, 0.92 + 0.09 * done), "eval/entropy": 0.62 - 0.3 * done}
            row |= {"eval/gold": 3.29 + 2.1 * done} if gold else {}
        rows.append(row)
    return rows, {}


def evaluation(folder, draw, gold):
    found = {"num_prompts": 192, "judge": "gold" if gold else "none", **interval("kl/ppo", 8.4, 0.3)}
    for model in MODELS:
        found |= interval(f"length/{model}", 75.0 if model == "ppo" else 69.0, 2.0)
        found |= {f"eos_rate/{model}": 1.0 if model == "ppo" else 0.93} | interval(f"score/{model}", SCORE[model], 0.12)
    found |= {"bits_per_byte/base": 0.2210, "bits_per_byte/sft": 0.2432, "bits_per_byte/ppo": 0.2391}
    for judge, rate in (("win_rate", 0.87), ("win_rate_by_score", 0.93), ("win_rate_by_length", 0.61)):
        if gold or judge != "win_rate":
            found |= interval(f"{judge}/ppo_vs_sft", rate, 0.045) | interval(
                f"{judge}/best_of_8_vs_sft", rate - 0.04, 0.05
            )
            found |= interval(f"{judge}/base_vs_sft", 0.14, 0.04)
    if gold:
        for model in MODELS:
            found |= interval(f"gold/{model}", GOLD[model], 0.2)
            for name, (before, after) in COMPONENTS.items():
                share = (GOLD[model] - 3.29) / 2.13
                found[f"gold_{name}/{model}"] = before + (after - before) * share
        for n, value in ((1, 3.29), (2, 4.02), (4, 4.63), (8, 5.08)):
            found |= {f"best_of_n/{n}": value, f"best_of_n_kl/{n}": math.log(n) - (n - 1) / n}
        found |= {"headroom/by_reward_model": 1.79, "headroom/by_judge": 2.11}
    rows = []
    for number in range(24):
        row = {"prompt": f"Tell me a story about a squirrel and a flute, number {number}."}
        row |= {model: f"{STORY} {draw.choice(PARTS)}" for model in MODELS}
        columns = {"score": SCORE, "length": dict.fromkeys(MODELS, 70.0)} | ({"gold": GOLD} if gold else {})
        for name, means in columns.items():
            row[name] = {model: means[model] + draw.gauss(0, 0.8) for model in MODELS}
        rows.append(row)
    write_jsonl(folder / "samples.jsonl", rows)
    (folder / "metrics.json").write_text(json.dumps(found))


def interval(name, value, half):
    return {name: value, f"{name}_low": value - half, f"{name}_high": value + half}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--without-gold", action="store_true")
    parser.add_argument("--stages", type=int, default=len(CHAIN))
    given = parser.parse_args()
    write_run(given.run, stages=given.stages, gold=not given.without_gold)
