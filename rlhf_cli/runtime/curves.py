"""Curves from the lines of metrics.jsonl, and figures as PNG files: what all plots of runs are made with."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any


def save_figure(figure: Any, path: Path) -> Path:
    """Written beside and renamed, so that no reader sees half of it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    path.parent.mkdir(exist_ok=True)
    aside = path.with_name(f".{path.name}.tmp")
    FigureCanvasAgg(figure).print_png(str(aside))
    aside.rename(path)
    return path


def series(lines: list[dict[str, Any]], name: str, against: str = "step") -> tuple[list[float], list[float]]:
    """x and y of the lines that have both as finite numbers; before the first step no seconds have gone by."""
    start = {"seconds": 0.0}
    points = ((line if line["step"] else start | line) for line in lines)
    found = [(p[against], p[name]) for p in points if against in p and name in p and math.isfinite(p[name])]
    return [x for x, _ in found], [y for _, y in found]


def smooth(values: list[float], weight: float = 0.9) -> list[float]:
    """Exponential moving average without the start's bias (as Adam corrects its moments)."""
    out, total = [], 0.0
    for i, value in enumerate(values):
        total = weight * total + (1 - weight) * value
        out.append(total / (1 - weight ** (i + 1)))
    return out
