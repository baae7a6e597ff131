"""Curves of a run as PNG, from metrics.jsonl."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

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
    rate.plot(*_series(lines, "learning_rate"), color="#636363")
    rate.set(xlabel="step", ylabel="lr")
    rate.grid(alpha=0.3)
    return _save(figure, run_dir / "plots" / "loss.png")


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
    return _save(figure, run_dir / "plots" / "scores.png")


def _draw_loss(axes: Any, lines: list[dict[str, Any]]) -> None:
    axes.plot(*_series(lines, "loss"), color="#9ecae1", linewidth=0.8, label="train")
    steps, values = _series(lines, "loss")
    if len(values) >= 20:
        axes.plot(steps, _smooth(values), color="#2171b5", label="train, smoothed")
    steps, values = _series(lines, "eval_loss")
    if values:
        axes.plot(steps, values, "o-", color="#d94801", markersize=3, label="evaluation")
        best = min(range(len(values)), key=values.__getitem__)
        side = "right" if steps[best] > (steps[0] + steps[-1]) / 2 else "left"  # the words stay inside the frame
        axes.annotate(
            f"lowest {values[best]:.4f} at step {steps[best]}", (steps[best], values[best]), xytext=(0, 28),
            textcoords="offset points", ha=side, arrowprops={"arrowstyle": "->"},
        )  # fmt: skip


def _draw_accuracy(axes: Any, lines: list[dict[str, Any]]) -> None:
    steps, values = _series(lines, "accuracy")
    axes.plot(steps, values, color="#9ecae1", linewidth=0.8)
    if len(values) >= 20:
        axes.plot(steps, _smooth(values), color="#2171b5")
    steps, values = _series(lines, "eval_accuracy")
    _, errors = _series(lines, "eval_accuracy_stderr")
    if values:
        axes.errorbar(steps, values, errors, fmt="o-", color="#d94801", markersize=3, capsize=2)
    axes.set(ylabel="accuracy", ylim=(None, 1.02))
    axes.grid(alpha=0.3)


def _save(figure: Any, path: Path) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    path.parent.mkdir(exist_ok=True)
    aside = path.with_name(f".{path.name}.tmp")
    FigureCanvasAgg(figure).print_png(str(aside))
    aside.rename(path)
    return path


def _series(lines: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    found = [(line["step"], line[name]) for line in lines if name in line and math.isfinite(line[name])]
    return [s for s, _ in found], [v for _, v in found]


def _smooth(values: list[float], weight: float = 0.9) -> list[float]:
    """Exponential moving average without the start's bias (as Adam corrects its moments)."""
    out, total = [], 0.0
    for i, value in enumerate(values):
        total = weight * total + (1 - weight) * value
        out.append(total / (1 - weight ** (i + 1)))
    return out
