"""The report's pictures: each a function from a run to a figure, or to None where the run has nothing to show."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lmkit.report.read import Run, pretrain_lines, series

# Colours that people with any kind of colour vision tell apart (Okabe and Ito 2008).
BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#767676"
MODEL_COLOURS = {"base": GREY, "sft": BLUE, "ppo": GREEN}
STYLE = {
    "figure.figsize": (5.0, 3.2),
    "figure.dpi": 160,
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "axes.unicode_minus": False,
}


def write_plots(run: Run, folder: Path) -> dict[str, Path]:
    """Draws every picture the run has data for into `folder` as PNG; name -> file."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()
    written = {}
    with matplotlib.rc_context(STYLE):
        for name, draw in PLOTS.items():
            if (figure := draw(run)) is not None:
                written[name] = folder / f"{name}.png"
                figure.savefig(written[name], metadata={"Software": None})
    return written


def _figure(x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure()
    axes = figure.subplots()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    return figure, axes


def _line(axes: Axes, rows: list[dict], key: str, label: str, colour: str, **style) -> bool:
    """Draws a metric if it was logged; few points get markers, or one alone would not be seen."""
    steps, values = series(rows, key)
    if steps:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        axes.plot(steps, values, label=label, color=colour, marker="o" if len(steps) < 20 else None, ms=3.5, **style)
    return bool(steps)


def _label(axes: Axes, text: str, x: float, y: float, offset: tuple[int, int], **style) -> None:
    axes.annotate(text, (x, y), textcoords="offset points", xytext=offset, fontsize=8, **style)


def _curves(rows: list[dict], x: str, y: str, *lines: tuple[str, str, str]) -> Figure | None:
    """A figure with a line for each (metric, label, colour) that was logged; None when none was."""
    figure, axes = _figure(x, y)
    drawn = [_line(axes, rows, key, label, colour) for key, label, colour in lines]
    if not any(drawn):
        return None
    if sum(drawn) > 1:
        axes.legend()
    return figure


# ------------------------------------------------------------------------------------------------- language modelling


def pretrain_loss(run: Run) -> Figure | None:
    lines = ("loss", "training", BLUE), ("eval/nats_per_token", "held out", ORANGE)
    return _curves(run.rows("pretrain"), "step", "loss (nats per token)", *lines)


def pretrain_bits_per_byte(run: Run) -> Figure | None:
    figure, axes = _figure("step", "held-out bits per byte")
    if not _line(axes, run.rows("pretrain"), "eval/bits_per_byte", "model", BLUE):
        return None
    metrics = run.metrics("pretrain")
    for key, label in list(pretrain_lines(metrics).items())[:1]:
        axes.axhline(float(metrics[key]), color=RED, ls="--", label=label)
        axes.legend()
    return figure


def pretrain_copying(run: Run) -> Figure | None:
    lines = ("first", "first time in its document", ORANGE), ("repeated", "seen before in it", BLUE)
    named = ((f"eval/rare_{name}_nats_per_token", label, colour) for name, label, colour in lines)
    return _curves(run.rows("pretrain"), "step", "loss of rare tokens (nats)", *named)


def sft_loss(run: Run) -> Figure | None:
    lines = ("loss", "training", BLUE), ("eval_loss", "held out", ORANGE)
    return _curves(run.rows("sft"), "step", "loss (nats per completion token)", *lines)


# ------------------------------------------------------------------------------------------------------ reward model


def reward_accuracy(run: Run) -> Figure | None:
    figure, axes = _figure("step", "accuracy on pairs")
    rows, metrics = run.rows("reward"), run.metrics("reward")
    drawn = _line(axes, rows, "accuracy", "training", BLUE, alpha=0.6)
    if not _line(axes, rows, "eval_accuracy", "held out", ORANGE) and not drawn:
        return None
    axes.axhline(0.5, color=GREY, ls=":", label="chance")
    if "ceiling" in metrics:
        axes.axhline(metrics["ceiling"], color=RED, ls="--", label="annotator's own consistency")
    figure.legend(fontsize=8, loc="outside lower center", ncols=2)
    return figure


def reward_calibration(run: Run) -> Figure | None:
    """Reliability diagram: how often the higher-scored completion is preferred, by how sure the reward model is."""
    bins = run.metrics("reward").get("calibration")
    if not bins:
        return None
    figure, axes = _figure("confidence of the reward model", "accuracy on held-out pairs")
    confidence, accuracy, counts = zip(*((b["confidence"], b["accuracy"], b["count"]) for b in bins))
    error = [1.96 * math.sqrt(max(a * (1 - a), 0) / n) for a, n in zip(accuracy, counts)]
    axes.plot([0.5, 1], [0.5, 1], color=GREY, ls=":", label="perfectly calibrated")
    axes.errorbar(confidence, accuracy, yerr=error, color=BLUE, marker="o", ms=4, capsize=2, label="reward model")
    for x, y, n in zip(confidence, accuracy, counts):
        _label(axes, str(n), x, y, (5, -11), color=GREY)
    axes.set_xlim(0.48, 1.02)
    axes.set_ylim(min(0.45, *(a - e for a, e in zip(accuracy, error))) - 0.02, 1.03)
    axes.legend(loc="lower right")
    return figure


# --------------------------------------------------------------------------------------------------------------- PPO


def ppo_score(run: Run) -> Figure | None:
    rows = run.rows("ppo")
    figure, axes = _figure("iteration", "score by the reward model")
    if not _line(axes, rows, "objective/scores", "training prompts", BLUE):
        return None
    steps, mean = series(rows, "objective/scores")
    _, spread = series(rows, "objective/scores_std")
    if len(spread) == len(mean):
        low, high = zip(*((m - s, m + s) for m, s in zip(mean, spread)))
        axes.fill_between(steps, low, high, color=BLUE, alpha=0.15, lw=0, label="one standard deviation")
    _line(axes, rows, "eval/score", "held-out prompts", ORANGE)
    axes.legend()
    return figure


def frontier(run: Run) -> Figure | None:
    """Gain over the SFT model by the reward model (proxy) and by the judge, against the distance from it.

    The axes of Gao, Schulman and Hilton 2022, figure 1: the square root of KL, best-of-n at its own KL. A proxy that
    goes on rising while the judge falls is over-optimisation.
    """
    rows, found = run.rows("ppo"), run.evaluation
    figure, axes = _figure("square root of KL from the SFT model (nats)", "gain over the SFT model")
    judge = run.judge or "gold"
    drawn = False
    for key, label, colour in (("eval/score", "reward model (proxy)", ORANGE), (f"eval/{judge}", judge, GREEN)):
        path = [(row["eval/kl"], row[key]) for row in rows if key in row and "eval/kl" in row]
        if len(path) > 1:
            start = float(path[0][1])
            x, y = zip(*((math.sqrt(max(float(kl), 0.0)), float(value) - start) for kl, value in path))
            axes.plot(x, y, color=colour, marker="o", ms=3.5, label=f"{label}, during PPO")
            drawn = True
    for key, colour, kind in (("score", ORANGE, "reward model"), (judge, GREEN, judge)):
        if {"kl/ppo", f"{key}/ppo", f"{key}/sft"} <= set(found):
            gain = found[f"{key}/ppo"] - found[f"{key}/sft"]
            x = math.sqrt(max(found["kl/ppo"], 0.0))
            axes.plot(x, gain, color=colour, marker="*", ms=11, ls="", label=f"{kind}, final evaluation", mec="white")
            drawn = True
    points = [(best_of_kl_key(found, n), found[f"best_of_n/{n}"]) for n in best_of_sizes(found)]
    if points and f"{judge}/sft" in found:
        start = points[0][1]
        x, y = zip(*((math.sqrt(kl), value - start) for kl, value in points))
        axes.plot(x, y, color=BLUE, marker="s", ms=4, ls="--", label=f"{judge}, best of n")
        for n, px, py in list(zip(best_of_sizes(found), x, y))[1:]:
            _label(axes, f"n={n}", px, py, (4, -10), color=BLUE)
        drawn = True
    if not drawn:
        return None
    axes.axhline(0, color=GREY, lw=0.8)
    figure.set_size_inches(5.0, 4.0)
    figure.legend(fontsize=8, loc="outside lower center", ncols=2)
    return figure


def best_of_sizes(found: dict) -> list[int]:
    return sorted(int(key.removeprefix("best_of_n/")) for key in found if key.startswith("best_of_n/"))


def best_of_kl_key(found: dict, n: int) -> float:
    return float(found.get(f"best_of_n_kl/{n}", math.log(n) - (n - 1) / n))


# -------------------------------------------------------------------------------------------------------- comparison


def _colour(model: str) -> str:
    return MODEL_COLOURS.get(model, ORANGE)


def judged(run: Run) -> Figure | None:
    """Every model's mean by the judge with its 95 % interval."""
    if run.judge is None:
        return None
    models = [m for m in run.models if f"{run.judge}/{m}" in run.evaluation]
    figure = Figure(figsize=(5.0, 0.5 * len(models) + 0.9))
    axes = figure.subplots()
    for place, model in enumerate(reversed(models)):
        value, low, high = (run.evaluation[f"{run.judge}/{model}{end}"] for end in ("", "_low", "_high"))
        axes.errorbar(value, place, xerr=[[value - low], [high - value]], color=_colour(model), marker="o", capsize=3)
        _label(axes, f"{value:.2f}", value, place, (0, 7), ha="center")
    _name_rows(axes, list(reversed(models)), f"{run.judge} score, mean and 95 % interval")
    return figure


def components(run: Run) -> Figure | None:
    """Parts of the gold score, SFT against PPO: what PPO paid for its gain shows here."""
    names = [c for c in run.components if {f"gold_{c}/sft", f"gold_{c}/ppo"} <= set(run.evaluation)]
    if not names:
        return None
    figure = Figure(figsize=(5.0, 0.36 * len(names) + 1.1))
    axes = figure.subplots()
    for place, name in enumerate(reversed(names)):
        before, after = (run.evaluation[f"gold_{name}/{model}"] for model in ("sft", "ppo"))
        axes.plot([before, after], [place, place], color=RED if after < before else GREY, lw=2, zorder=1)
        axes.scatter(before, place, color=_colour("sft"), s=28, zorder=2, label="sft" if place == 0 else None)
        axes.scatter(after, place, color=_colour("ppo"), s=28, zorder=2, label="ppo" if place == 0 else None)
    _name_rows(axes, list(reversed(names)), "mean of the component (red: PPO is worse)")
    axes.legend(loc="best", fontsize=8)
    return figure


def _name_rows(axes: Axes, names: Sequence[str], x: str) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(-0.6, len(names) - 0.3)
    axes.set_xlabel(x)


TRAINING, HELD_OUT = ("training prompts", BLUE), ("held-out prompts", ORANGE)
# name -> (y axis, metric -> (label, colour)); every axis includes 0, so that no small change looks large
PPO_PANELS = {
    "ppo_kl": ("KL from the SFT model (nats)", {"objective/kl": TRAINING, "eval/kl": HELD_OUT}),
    "ppo_gold": ("gold score", {"eval/gold": HELD_OUT}),
    "ppo_length": (
        "completion length (tokens)",
        {"rollout/completion_length_mean": TRAINING, "eval/completion_length": HELD_OUT},
    ),
    "ppo_eos_rate": ("share of completions that end", {"rollout/eos_rate": TRAINING, "eval/eos_rate": HELD_OUT}),
    "ppo_entropy": ("entropy (nats per token)", {"policy/entropy_avg": TRAINING, "eval/entropy": HELD_OUT}),
    "ppo_repetition": ("share of repeated 4-grams", {"rollout/repeat_ngram": TRAINING}),
    "ppo_clip_fraction": (
        "share of tokens clipped",
        {"policy/clipfrac_avg": ("policy", BLUE), "val/clipfrac_avg": ("value", ORANGE)},
    ),
    "ppo_explained_variance": ("explained variance of the value", {"val/explained_var": TRAINING}),
    "ppo_learning_rate": ("learning rate", {"lr": ("policy", BLUE), "critic_lr": ("critic", ORANGE)}),
}


def _panel(y: str, lines: dict[str, tuple[str, str]]) -> Callable[[Run], Figure | None]:
    def draw(run: Run) -> Figure | None:
        figure = _curves(run.rows("ppo"), "iteration", y, *((key, *style) for key, style in lines.items()))
        if figure is not None:
            low, high = figure.axes[0].get_ylim()
            figure.axes[0].set_ylim(min(low, 0), 1.03 * max(high, 0))
        return figure

    return draw


PLOTS: dict[str, Callable[[Run], Figure | None]] = {
    "frontier": frontier,
    "judged": judged,
    "components": components,
    "ppo_score": ppo_score,
    **{name: _panel(*panel) for name, panel in PPO_PANELS.items()},
    "reward_accuracy": reward_accuracy,
    "reward_calibration": reward_calibration,
    "sft_loss": sft_loss,
    "pretrain_loss": pretrain_loss,
    "pretrain_bits_per_byte": pretrain_bits_per_byte,
    "pretrain_copying": pretrain_copying,
}
