"""metrics.jsonl by figure instead of by line: a long run has many lines, and each figure is asked for many times."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

LARGEST = 1e100


class Column(NamedTuple):
    """lines: numbers of the lines that have a figure as a finite number, ascending; values: in each of them."""

    lines: array[int]
    values: array[float]


@dataclass(frozen=True)
class Metrics:
    """steps: of each line, ascending; columns: by name, also of figures that no line has as a finite number."""

    steps: list[int] = field(default_factory=list)
    columns: dict[str, Column] = field(default_factory=dict)

    def column(self, name: str) -> Column:
        """An empty one where there is no such figure."""
        return self.columns.get(name, Column(array("L"), array("d")))


def by_column(rows: Iterable[Mapping[str, Any]]) -> Metrics:
    """Rows with a whole `step`, in any order; of equal steps the first comes first."""
    made = Metrics()
    for number, row in enumerate(rows):
        made.steps.append(row["step"])
        for name, found in row.items():
            column = made.columns.get(name)
            if column is None:
                column = made.columns[name] = Column(array("L"), array("d"))
            value = found if type(found) is float and abs(found) < LARGEST else as_number(found)
            if value is not None:
                column.lines.append(number)
                column.values.append(value)
    order = sorted(range(len(made.steps)), key=made.steps.__getitem__)
    return made if order == list(range(len(order))) else _ordered(made, order)


def _ordered(made: Metrics, order: list[int]) -> Metrics:
    place = {number: at for at, number in enumerate(order)}
    columns = {}
    for name, (lines, values) in made.columns.items():
        pairs = sorted((place[number], value) for number, value in zip(lines, values, strict=True))
        columns[name] = Column(array("L", (at for at, _ in pairs)), array("d", (value for _, value in pairs)))
    return Metrics([made.steps[number] for number in order], columns)


def as_number(value: object) -> float | None:
    """A finite number, or None for whatever else a file may hold; beyond LARGEST nothing can be drawn to scale."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if abs(found) < LARGEST else None  # not true of nan either
