"""One chart as inline SVG: axes with round ticks, thin and bold curves, standard errors, marks; colours are CSS."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from rlhf_cli.report.markup import Markup, joined, tag
from rlhf_cli.report.series import Points, stretches

WIDTH, HEIGHT = 400, 260  # of the drawing, in units that scale with the page
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 10, 40
STRETCHES = 80  # of a thin curve; more would be narrower than the line
Look = Literal["thin", "bold", "way"]
COLOURS, MARKERS = 8, 4  # before they repeat, with a dashed line


@dataclass(frozen=True)
class Curve:
    """slot: number of the run, which decides colour, marker and dash; look: a thin line (training), a bold one with a
    marker at each point (evaluations), or markers that a faint line joins (a way with no x to go by); errors: standard
    errors, one for each point or none."""

    slot: int
    label: str
    points: Points
    look: Look = "thin"
    errors: list[float] = field(default_factory=list)


class Mark(NamedTuple):
    """Something that happened at x, to the run of a slot."""

    slot: int
    x: float
    label: str


class Axis(NamedTuple):
    """low..high is drawn onto start..end; ticks lie within."""

    low: float
    high: float
    start: float
    end: float
    ticks: list[float]

    def place(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def draw(
    title: str,
    x_label: str,
    y_label: str,
    curves: Sequence[Curve],
    marks: Sequence[Mark] = (),
    *,
    whole_x: bool = False,
    diagonal: bool = False,
) -> Markup:
    """The picture, named for who cannot see it. whole_x: x are numbers of steps. diagonal: a line where y is x."""
    xs = [x for curve in curves for x, _ in curve.points] + [mark.x for mark in marks]
    ys = [y for curve in curves for _, y in curve.points]
    for curve in curves:
        ys += [y + sign * e for (_, y), e in zip(curve.points, curve.errors, strict=False) for sign in (-1, 1)]
    if not xs or not ys:
        return Markup("")
    across = make_axis(xs, LEFT, WIDTH - RIGHT, whole=whole_x)
    up = make_axis(ys, HEIGHT - BOTTOM, TOP)
    parts = [_frame(across, up, x_label, y_label)]
    if diagonal:
        parts.append(_diagonal(across, up))
    parts += [_mark(mark, across) for mark in marks]
    # thin ones first, so that they lie below the bold ones
    for curve in sorted(curves, key=lambda c: c.look != "thin"):
        parts.append((_thin if curve.look == "thin" else _marked)(curve, across, up))
    named = f"{title}: {y_label} against {x_label}; " + ", ".join(dict.fromkeys(c.label for c in curves))
    return tag("svg", *parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=named, class_="chart")


def make_axis(values: Sequence[float], start: float, end: float, *, whole: bool = False) -> Axis:
    """An axis that holds all values with a little room, and its ticks."""
    low, high = min(values), max(values)
    room = (high - low) * 0.04
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # all the same but for rounding
        room = max(abs(high) * 0.1, 1.0) if whole else abs(high) * 0.1 or 0.5
    low, high = low - room, high + room
    return Axis(low, high, start, end, nice_ticks(low, high, whole=whole))


def nice_ticks(low: float, high: float, most: int = 6, *, whole: bool = False) -> list[float]:
    """At most `most` multiples of 1, 2 or 5 times a power of ten between low and high. whole: integers only."""
    assert low < high
    power = 10.0 ** (math.floor(math.log10((high - low) / most)) - 1)
    for _ in range(4):
        for factor in (1, 2, 5):
            step = factor * power
            first, final = math.ceil(low / step), math.floor(high / step)
            if final - first < most and not (whole and step < 1):
                ticks = [i * step for i in range(first, final + 1)]
                return [tick for tick in ticks if low <= tick <= high]  # one on the edge may round to beyond it
        power *= 10
    raise AssertionError(f"no ticks between {low} and {high}")


def tick_texts(ticks: Sequence[float]) -> list[str]:
    """With as many decimals as tell neighbours apart."""
    step = ticks[1] - ticks[0] if len(ticks) > 1 else abs(ticks[0]) if ticks else 1.0
    largest = max((abs(tick) for tick in ticks), default=0.0)
    if step and (largest >= 1e6 or step < 1e-4):
        return [f"{tick:.6g}" for tick in ticks]
    decimals = max(0, -math.floor(math.log10(step) + 1e-9)) if step else 0
    return [f"{tick + 0.0:,.{decimals}f}" for tick in ticks]


def swatch(slot: int) -> Markup:
    """How the run of a slot is drawn, for a legend."""
    line = tag("line", x1=1, x2=31, y1=8, y2=8, class_=f"bold {_line(slot)}")
    return tag("svg", line, _marker(slot, 16, 8), viewBox="0 0 32 16", class_="swatch", aria_hidden="true")


def _frame(across: Axis, up: Axis, x_label: str, y_label: str) -> Markup:
    bottom, parts = up.start, []
    for tick, words in zip(up.ticks, tick_texts(up.ticks), strict=True):
        y = _round(up.place(tick))
        parts.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_="grid"))
        parts.append(tag("text", words, x=LEFT - 5, y=y, dy="0.35em", text_anchor="end"))
    for tick, words in zip(across.ticks, tick_texts(across.ticks), strict=True):
        x = _round(across.place(tick))
        parts.append(tag("line", x1=x, x2=x, y1=TOP, y2=bottom, class_="grid"))
        parts.append(tag("text", words, x=x, y=bottom + 14, text_anchor="middle"))
    parts.append(tag("path", d=f"M{LEFT} {TOP}V{bottom}H{WIDTH - RIGHT}", class_="axis"))
    middle = (TOP + bottom) / 2
    parts.append(tag("text", x_label, x=(LEFT + WIDTH - RIGHT) / 2, y=HEIGHT - 8, text_anchor="middle", class_="label"))
    turned = f"translate(11 {middle}) rotate(-90)"
    parts.append(tag("text", y_label, transform=turned, text_anchor="middle", class_="label"))
    return joined(parts)


def _thin(curve: Curve, across: Axis, up: Axis) -> Markup:
    """A line of means; where it stands for many points, a pale band from the lowest to the highest."""
    parts = stretches(curve.points, STRETCHES)
    place = lambda x, y: f"{_round(across.place(x))},{_round(up.place(y))}"
    drawn: list[Markup] = [tag("title", curve.label)]
    if len(curve.points) > len(parts):
        edge = [place(p.at, p.high) for p in parts] + [place(p.at, p.low) for p in reversed(parts)]
        drawn.append(tag("polygon", points=" ".join(edge), class_=f"band f{curve.slot % COLOURS}"))
    line = " ".join(place(p.at, p.mean) for p in parts)
    if len(parts) == 1:
        x, y = line.split(",")
        drawn.append(tag("circle", cx=x, cy=y, r=2, class_=f"f{curve.slot % COLOURS}"))
    else:
        drawn.append(tag("polyline", points=line, class_=f"thin {_line(curve.slot)}"))
    return tag("g", *drawn)


def _marked(curve: Curve, across: Axis, up: Axis) -> Markup:
    """A line with a marker, and a whisker of one standard error up and down, at each point."""
    places = [(_round(across.place(x)), _round(up.place(y))) for x, y in curve.points]
    line = tag("polyline", points=" ".join(f"{x},{y}" for x, y in places), class_=f"{curve.look} {_line(curve.slot)}")
    drawn: list[Markup] = [tag("title", curve.label), line]
    whiskers = []
    for (x, _), (_, value), error in zip(places, curve.points, curve.errors, strict=False):
        if error > 0:
            whiskers.append(f"M{x} {_round(up.place(value - error))}V{_round(up.place(value + error))}")
    if whiskers:
        drawn.append(tag("path", d="".join(whiskers), class_=f"whisker c{curve.slot % COLOURS}"))
    return tag("g", *drawn, *(_marker(curve.slot, x, y) for x, y in places))


def _mark(mark: Mark, across: Axis) -> Markup:
    """A dotted line down to a triangle on the axis."""
    x, bottom = _round(across.place(mark.x)), HEIGHT - BOTTOM
    line = tag("line", x1=x, x2=x, y1=TOP, y2=bottom, class_=f"alarm c{mark.slot % COLOURS}")
    foot = tag("path", d=f"M{x} {bottom - 7}l4 7h-8z", class_=f"f{mark.slot % COLOURS}")
    return tag("g", tag("title", mark.label), line, foot)


def _diagonal(across: Axis, up: Axis) -> Markup:
    low, high = max(across.low, up.low), min(across.high, up.high)
    if low >= high:
        return Markup("")
    x1, y1, x2, y2 = (_round(v) for v in (across.place(low), up.place(low), across.place(high), up.place(high)))
    return tag("line", x1=x1, y1=y1, x2=x2, y2=y2, class_="diagonal")


def _marker(slot: int, x: float, y: float) -> Markup:
    look = f"f{slot % COLOURS}"
    shape = slot % MARKERS
    if shape == 0:
        return tag("circle", cx=x, cy=y, r=3, class_=look)
    if shape == 1:
        return tag("path", d=f"M{_round(x - 2.8)} {_round(y - 2.8)}h5.6v5.6h-5.6z", class_=look)
    if shape == 2:
        return tag("path", d=f"M{x} {_round(y - 3.6)}l3.6 6.4h-7.2z", class_=look)
    return tag("path", d=f"M{x} {_round(y - 4)}l4 4l-4 4l-4 -4z", class_=look)


def _line(slot: int) -> str:
    return f"c{slot % COLOURS}" + (" dashed" if slot >= COLOURS else "")


def _round(value: float) -> float:
    """A tenth of a unit is less than a pixel."""
    return round(value, 1)
