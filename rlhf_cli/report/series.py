"""Series of figures from a run's lines: what curves and tables are made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from rlhf_cli.report.runs import Run, final_figures

Points = list[tuple[float, float]]


def name_in(run: Run, names: Sequence[str]) -> str | None:
    """The first of some names that a run has figures under; stages call the same thing differently."""
    return next((name for name in names if run.metrics.column(name).values), None)


def series(run: Run, names: Sequence[str], against: str = "step") -> Points:
    """(x, y) of the lines that have both as finite numbers; before the first step no seconds have gone by."""
    name = name_in(run, names)
    if name is None:
        return []
    lines, values = run.metrics.column(name)
    steps, places = run.metrics.steps, dict(zip(*run.metrics.column(against), strict=True))
    at = lambda line: 0.0 if against == "seconds" and steps[line] == 0 else places.get(line)
    return [(place, value) for line, value in zip(lines, values, strict=True) if (place := at(line)) is not None]


def errors_of(run: Run, names: Sequence[str], against: str = "step") -> list[float]:
    """The standard errors of `series`, which stand beside a figure as NAME_stderr; 0 where there is none."""
    name = name_in(run, names)
    by_place = dict(series(run, [f"{name}_stderr"], against)) if name is not None else {}
    return [by_place.get(at, 0.0) for at, _ in series(run, names, against)]


def last(run: Run, names: Sequence[str]) -> float | None:
    """The newest value, else the one that the manifest has."""
    found = series(run, names)
    if found:
        return found[-1][1]
    final = final_figures(run.manifest)
    return next((final[name] for name in names if name in final), None)


class Stretch(NamedTuple):
    """Neighbouring points as one: mean place, mean, lowest and highest value."""

    at: float
    mean: float
    low: float
    high: float


def stretches(points: Points, most: int) -> list[Stretch]:
    """A long series in `most` stretches of about the same number of points; a short one point by point."""
    count = min(most, len(points))
    found = []
    for i in range(count):
        part = points[i * len(points) // count : (i + 1) * len(points) // count]
        values = [value for _, value in part]
        found.append(Stretch(sum(at for at, _ in part) / len(part), sum(values) / len(part), min(values), max(values)))
    return found
