"""Curves of a run as PNG, from metrics.jsonl."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_cli.runtime.curves import save_figure, series, smooth
from rlhf_cli.runtime.metrics import read_metrics


def plot_training(run_dir: Path, title: str) -> Path | None:
    """plots/loss.png: train and evaluation loss by step, the lowest evaluation loss marked; below, where it was logged,
    the accuracy with its standard error; and the learning rate. Returns None when nothing was logged.
    """
    lines = list(read_metrics(run_dir))
    if not lines:
        return None
    # Imported late and drawn without pyplot: no display, no global state.
    from matplotlib.figure import Figure

    with_accuracy = any("accuracy" in line or "eval_accuracy" in line for line in lines)
    figure = Figure(figsize=(8, 8 if with_accuracy else 6), layout="constrained")
    heights = [4, 3, 1] if with_accuracy else [4, 1]
    loss, *middle, rate = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    _draw_loss(loss, lines)
    loss.set(title=title, ylabel="loss (nats)")
    loss.grid(alpha=0.3)
    loss.legend()
    for accuracy in middle:
        _draw_accuracy(accuracy, lines)
    rate.plot(*series(lines, "learning_rate"), color="#636363")
    rate.set(xlabel="step", ylabel="lr")
    rate.grid(alpha=0.3)
    return save_figure(figure, run_dir / "plots" / "loss.png")


def plot_judgement(run_dir: Path, title: str, report: dict[str, Any]) -> Path:
    """plots/scores.png: how the scores of held-out rows spread, and how often the model is right when it says it is.

    report: histogram {edges, side: counts} and reliability, as an evaluation writes them.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    spread, trust = figure.subplots(1, 2, width_ratios=[3, 2])
    edges = report["histogram"]["edges"]
    for name, counts in report["histogram"].items():
        if name != "edges":
            spread.stairs(counts, edges, fill=True, alpha=0.5, label=name)
    labelled = report["reward"]["type"] == "labels"
    spread.set(title=title, xlabel="probability of the row's own label" if labelled else "score", ylabel="texts")
    spread.legend()
    bins = report["reliability"]
    trust.plot([b["mean_confidence"] for b in bins], [b["accuracy"] for b in bins], "o-", color="#d94801")
    low = min(b["low"] for b in bins)
    trust.plot([low, 1], [low, 1], color="#636363", linewidth=0.8, linestyle="--")
    for b in bins:
        trust.annotate(str(b["num"]), (b["mean_confidence"], b["accuracy"]), fontsize=7, ha="left", va="top")
    trust.set(title=f"ECE {report['figures']['ece']:.3f}", xlabel="confidence", ylabel="right", ylim=(-0.02, 1.02))
    trust.grid(alpha=0.3)
    return save_figure(figure, run_dir / "plots" / "scores.png")


POLICY_PANELS = (
    ("objective/kl", "KL to reference (nats)"),
    ("policy/clipfrac_avg", "clip fraction"),
    ("text/length", "length (tokens)"),
    ("policy/entropy_avg", "entropy (nats per token)"),
    ("text/distinct_2", "distinct-2"),
    ("text/separator_ratio", "separator ratio"),
)


def plot_policy(run_dir: Path, title: str) -> Path | None:
    """plots/policy.png: reward of rollouts and of held-out prompts, reward over √KL (Gao et al. 2210.10760), and the
    figures by which over-optimisation shows. Returns None when nothing was logged."""
    lines = list(read_metrics(run_dir))
    if not any("objective/scores" in line for line in lines):
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 10), layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(3, 3).flatten()
    _draw_rewards(panels[0], lines)
    _draw_frontier(panels[1], lines)
    for axes, (name, label) in zip(panels[2:], POLICY_PANELS, strict=False):
        axes.plot(*series(lines, name), color="#2171b5", linewidth=1)
        axes.set(xlabel="iteration", ylabel=label)
        axes.grid(alpha=0.3)
    _draw_losses(panels[8], lines)
    _mark_alarms([panels[0], *panels[2:]], lines)  # all that have iterations on the x axis
    return save_figure(figure, run_dir / "plots" / "policy.png")


RANKING_PANELS = {
    "d": ({"raft/distinct_1": "distinct-1", "raft/distinct_2": "distinct-2"}, "distinct n-grams (share)"),
    "k": ({"raft/kl": "kl"}, "KL to reference (nats)"),
    "n": ({"raft/length": "length"}, "length (tokens)"),
    "x": ({"raft/discarded": "discarded"}, "discarded (share)"),
    "l": ({"loss": "loss"}, "loss (nats)"),
}


def plot_ranking(run_dir: Path, title: str) -> Path | None:
    """plots/raft.png: reward of the policy's responses, of the selected ones and of those to held-out prompts, by
    iteration; below, how varied and how long responses are, how far from the reference, how many are discarded, and the
    loss. Returns None when nothing was logged.
    """
    lines = list(read_metrics(run_dir))
    if not lines:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 10), layout="constrained")
    panels = figure.subplot_mosaic("rrrrrr;ddkknn;xxxlll", height_ratios=[3, 2, 2])
    _draw_ranked_rewards(panels["r"], lines)
    panels["r"].set(title=title)
    for key, (names, label) in RANKING_PANELS.items():
        for (name, short), color in zip(names.items(), ("#2171b5", "#31a354"), strict=False):
            panels[key].plot(*series(lines, name), "o-", markersize=3, color=color, linewidth=1, label=short)
        if len(names) > 1:
            panels[key].legend()
        panels[key].set(ylabel=label)
    for axes in panels.values():
        axes.set(xlabel="iteration")
        axes.grid(alpha=0.3)
        axes.set_xlim(-0.5, max(1, lines[-1]["step"]) + 0.5)  # the same everywhere, with room for a single point
        axes.locator_params(axis="x", integer=True)
    _mark_alarms(list(panels.values()), lines)
    return save_figure(figure, run_dir / "plots" / "raft.png")


def _draw_ranked_rewards(axes: Any, lines: list[dict[str, Any]]) -> None:
    for name, color, label in (
        ("raft/reward_policy", "#2171b5", "policy"), ("raft/reward_selected", "#31a354", "selected"),
    ):  # fmt: skip
        axes.plot(*series(lines, name), "o-", markersize=3, color=color, label=label)
    _draw_held_out(axes, lines, "raft/reward_eval")
    axes.set(ylabel="reward")
    axes.legend()


def _draw_held_out(axes: Any, lines: list[dict[str, Any]], name: str) -> None:
    """name: a figure whose standard error is logged beside it."""
    steps, values = series(lines, name)
    known = dict(zip(*series(lines, f"{name}_stderr"), strict=True))
    errors = [known.get(step, 0.0) for step in steps]  # that of huge rewards is infinite, and no bar
    if values:
        axes.errorbar(steps, values, errors, fmt="o-", color="#d94801", markersize=3, capsize=2, label="held-out")


def _mark_alarms(panels: Sequence[Any], lines: list[dict[str, Any]]) -> None:
    """A dotted line where an alarm was first raised, in all panels; their names stand in the first one."""
    raised: dict[int, list[str]] = {}
    seen: set[str] = set()
    for line in lines:
        new = sorted({name.removeprefix("alarm/") for name in line if name.startswith("alarm/")} - seen)
        if new:
            raised[line["step"]] = new
            seen |= set(new)
    for step, names in raised.items():
        for axes in panels:
            axes.axvline(step, color="#cb181d", linestyle=":", linewidth=1)
        panels[0].annotate(
            "alarm " + ", ".join(names), (step, 0.02), xycoords=("data", "axes fraction"), xytext=(-3, 0),
            textcoords="offset points", rotation=90, ha="right", va="bottom", fontsize=7, color="#cb181d",
        )  # fmt: skip


def _draw_rewards(axes: Any, lines: list[dict[str, Any]]) -> None:
    steps, values = series(lines, "objective/scores")
    axes.plot(steps, values, color="#9ecae1", linewidth=0.8, label="rollouts")
    if len(values) >= 20:
        axes.plot(steps, smooth(values), color="#2171b5", label="rollouts, smoothed")
    _draw_held_out(axes, lines, "eval_reward")
    axes.set(xlabel="iteration", ylabel="reward")
    axes.legend()
    axes.grid(alpha=0.3)


def _draw_frontier(axes: Any, lines: list[dict[str, Any]]) -> None:
    """Each source's reward over √KL, so that a proxy that goes on rising while another falls is seen."""
    names = sorted({name for line in lines for name in line if name.startswith("reward/")})
    for name in ["objective/scores"] if len(names) < 2 else names:
        points = [(line["objective/kl"], line[name]) for line in lines if name in line and "objective/kl" in line]
        axes.scatter([math.sqrt(max(0.0, kl)) for kl, _ in points], [v for _, v in points], s=8, label=name)
    axes.set(xlabel="√KL", ylabel="reward")
    axes.legend()
    axes.grid(alpha=0.3)


def _draw_losses(axes: Any, lines: list[dict[str, Any]]) -> None:
    for name, color in (("loss/policy_avg", "#2171b5"), ("loss/value_avg", "#d94801"), ("loss/ptx", "#31a354")):
        steps, values = series(lines, name)
        if values:
            axes.plot(steps, values, color=color, linewidth=1, label=name)
    axes.set(xlabel="iteration", ylabel="loss")
    axes.legend()
    axes.grid(alpha=0.3)


def _draw_loss(axes: Any, lines: list[dict[str, Any]]) -> None:
    axes.plot(*series(lines, "loss"), color="#9ecae1", linewidth=0.8, label="train")
    steps, values = series(lines, "loss")
    if len(values) >= 20:
        axes.plot(steps, smooth(values), color="#2171b5", label="train, smoothed")
    steps, values = series(lines, "eval_loss")
    if values:
        axes.plot(steps, values, "o-", color="#d94801", markersize=3, label="evaluation")
        best = min(range(len(values)), key=values.__getitem__)
        side = "right" if steps[best] > (steps[0] + steps[-1]) / 2 else "left"  # the words stay inside the frame
        axes.annotate(
            f"lowest {values[best]:.4f} at step {steps[best]}", (steps[best], values[best]), xytext=(0, 28),
            textcoords="offset points", ha=side, arrowprops={"arrowstyle": "->"},
        )  # fmt: skip


def _draw_accuracy(axes: Any, lines: list[dict[str, Any]]) -> None:
    steps, values = series(lines, "accuracy")
    axes.plot(steps, values, color="#9ecae1", linewidth=0.8)
    if len(values) >= 20:
        axes.plot(steps, smooth(values), color="#2171b5")
    steps, values = series(lines, "eval_accuracy")
    _, errors = series(lines, "eval_accuracy_stderr")
    if values:
        axes.errorbar(steps, values, errors, fmt="o-", color="#d94801", markersize=3, capsize=2)
    axes.set(ylabel="accuracy", ylim=(None, 1.02))
    axes.grid(alpha=0.3)
