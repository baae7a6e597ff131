"""Curves of a run as PNG, from metrics.jsonl."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from rlhf_cli.runtime.metrics import read_metrics


def plot_losses(run_dir: Path, title: str) -> Path | None:
    """plots/loss.png: train and evaluation loss by step, the lowest evaluation loss marked, learning rate below.

    Returns None when nothing was logged.
    """
    lines = list(read_metrics(run_dir))
    if not lines:
        return None
    # Imported late and drawn without pyplot: no display, no global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    loss, rate = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    loss.plot(*_series(lines, "loss"), color="#9ecae1", linewidth=0.8, label="train")
    steps, values = _series(lines, "loss")
    if len(values) >= 20:
        loss.plot(steps, _smooth(values), color="#2171b5", label="train, smoothed")
    steps, values = _series(lines, "eval_loss")
    if values:
        loss.plot(steps, values, "o-", color="#d94801", markersize=3, label="evaluation")
        best = min(range(len(values)), key=values.__getitem__)
        side = "right" if steps[best] > (steps[0] + steps[-1]) / 2 else "left"  # the words stay inside the frame
        loss.annotate(
            f"lowest {values[best]:.4f} at step {steps[best]}", (steps[best], values[best]), xytext=(0, 28),
            textcoords="offset points", ha=side, arrowprops={"arrowstyle": "->"},
        )  # fmt: skip
    loss.set(title=title, ylabel="loss (nats per token)")
    loss.grid(alpha=0.3)
    loss.legend()
    rate.plot(*_series(lines, "learning_rate"), color="#636363")
    rate.set(xlabel="step", ylabel="lr")
    rate.grid(alpha=0.3)
    path = run_dir / "plots" / "loss.png"
    path.parent.mkdir(exist_ok=True)
    aside = path.with_name(".loss.png.tmp")
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
