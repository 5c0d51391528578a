"""Gold and proxy score against the KL: what the price of KL and an ensemble of reward models change in PPO.

    python benchmarks/beta_sweep.py --run runs/tiny --output runs/beta_sweep      # about 4 minutes a curve on 2 cores
    python benchmarks/beta_sweep.py --betas 0 --iterations 4 --members 0 --output /tmp/s --figure /tmp/s.png   # to try

One curve for each kl_coef with the run's reward model, and one for an ensemble, taken by --aggregation, at
--ensemble-beta. A curve is the PPO recipe in a folder of its own: run the same command again and it goes on where it
stopped. The members beside the run's reward model are trained first, by the reward recipe with other seeds, or given by
--rewards. Draws docs/ppo_beta_sweep.png, and prints one JSON line for each curve: its highest and its last gold score.

Over-optimisation is a proxy that rises while gold turns down (Gao et al., arXiv:2210.10760; with ensembles: Coste et
al., arXiv:2310.02743). Gold is the tales' own score, which PPO never sees.
"""

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path

RECIPES = Path(__file__).parents[1] / "recipes"
COLORS = ["#c0392b", "#e67e22", "#2980b9", "#16a085", "#8e44ad", "#2c3e50"]


def recipe(name: str, **flags: object) -> None:
    """Runs a recipe with the flags; what it says goes to stderr. Ends this program when it fails."""
    words = [word for key, value in flags.items() for word in (f"--{key}", str(value))]
    done = subprocess.run([sys.executable, str(RECIPES / f"{name}.py"), *words], stdout=sys.stderr, check=False)
    if done.returncode:
        sys.exit(done.returncode)


def reward_models(args: argparse.Namespace) -> list[Path]:
    """The members of the ensemble: given, or the run's own and others trained beside it."""
    if args.rewards:
        return args.rewards
    members = [args.run / "reward" / "model"]
    for seed in range(1, args.members):
        folder = args.output / f"reward-{seed}"
        recipe("reward", model=args.run / "sft/model", data=args.run / "preferences/data", output_dir=folder, seed=seed)
        members.append(folder / "model")
    return members


def train(args: argparse.Namespace, name: str, reward: str, flags: dict[str, object]) -> Path:
    """One PPO run with no guards, evaluated every few iterations; its folder."""
    common = {f"train.guard_{guard}": "null" for guard in ("max_kl", "min_eos_rate", "min_entropy")}
    common |= {"train.total_episodes": 64 * args.iterations, "train.eval_steps": args.eval_steps, "seed": args.seed}
    common |= {"train.learning_rate": args.learning_rate, "train.lr_scheduler_type": "constant"}
    common["num_eval_prompts"] = 128
    folder = args.output / name
    recipe("ppo", model=args.run / "sft/model", reward=reward, output_dir=folder, **common, **flags)
    return folder


def curve(folder: Path) -> list[tuple[float, float, float]]:
    """(sqrt of the KL, gold, proxy) at each evaluation of a run."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = [row for row in rows if "eval/gold" in row]
    return [(math.sqrt(max(row["eval/kl"], 0.0)), row["eval/gold"], row["eval/score"]) for row in found]


def draw(curves: dict[str, list[tuple[float, float, float]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharex=True, layout="constrained")
    for axis, column, title in zip(axes, (1, 2), ("gold: what is wanted", "proxy: what PPO sees")):
        for color, (name, points) in zip(COLORS, curves.items()):
            axis.plot([p[0] for p in points], [p[column] for p in points], "o-", ms=3, color=color, label=name)
        axis.set_title(title)
        axis.set_xlabel("square root of the KL from SFT, nats")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("mean score of held-out prompts")
    axes[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--run", type=Path, default=Path("runs/tiny"), help="a finished chain: sft, preferences, reward"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/beta_sweep"))
    parser.add_argument("--figure", type=Path, default=Path("docs/ppo_beta_sweep.png"))
    parser.add_argument("--betas", type=float, nargs="*", default=[0.0, 0.01, 0.05, 0.2])
    parser.add_argument("--members", type=int, default=4, help="reward models of the ensemble; 0: no ensemble")
    parser.add_argument("--rewards", type=Path, nargs="*", default=[], help="their directories, where they exist")
    parser.add_argument("--aggregation", default="mean_minus_variance")
    parser.add_argument("--ensemble-beta", type=float, default=0.0)
    parser.add_argument("--iterations", type=int, default=80)
    parser.add_argument("--eval-steps", type=int, default=5)
    parser.add_argument("--learning-rate", type=float, default=6e-4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    single = str(args.run / "reward" / "model")
    folders = {
        f"kl_coef {beta:g}": train(args, f"beta-{beta:g}", single, {"train.kl_coef": beta}) for beta in args.betas
    }
    if args.members or args.rewards:
        members = reward_models(args)
        flags = {"train.kl_coef": args.ensemble_beta, "train.reward_aggregation": args.aggregation}
        name = f"{len(members)} reward models, kl_coef {args.ensemble_beta:g}"
        folders[name] = train(args, "ensemble", json.dumps([str(member) for member in members]), flags)
    curves = {name: curve(folder) for name, folder in folders.items()}
    draw(curves, args.figure)
    for name, points in curves.items():
        best = max(points, key=lambda point: point[1])
        (kl, gold, proxy), config = points[-1], {"run": str(args.run), "iterations": args.iterations, "seed": args.seed}
        found = {"best": best[1], "best_at_kl": best[0] ** 2, "last": gold, "last_kl": kl**2, "last_proxy": proxy}
        print(json.dumps({"name": "ppo_gold", "curve": name, **found, "unit": "gold score", "config": config}))


if __name__ == "__main__":
    main()
