"""Curves of the report: which figures become which points, and where they are drawn."""

from __future__ import annotations

import ast
import math
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rlhf_cli.report import chart
from rlhf_cli.report.chart import Curve, Mark, draw, make_axis, nice_ticks, tick_texts
from rlhf_cli.report.cost import PARTS
from rlhf_cli.report.curves import (
    ALIGNED,
    SUPERVISED,
    alarms,
    assign_slots,
    charts,
    error_of_share,
    over_distance,
    panel_curves,
    reliability,
    source_panels,
)
from rlhf_cli.report.metrics import as_number, by_column
from rlhf_cli.report.runs import Run, read_run, read_runs
from rlhf_cli.report.series import errors_of, last, series, stretches
from tests.report_cases import PPO, RAFT, RM, SFT, cells, make_run, parsed, texts

PACKAGE = Path(chart.__file__).parent.parent
PLACES = st.floats(-1e12, 1e12) | st.integers(-50, 50).map(float) | st.floats(-1e-6, 1e-6)


@pytest.fixture
def runs(tmp_path: Path) -> list[Run]:
    made = {"sft": SFT, "rm": RM, "ppo": PPO, "raft": RAFT}
    return read_runs([make_run(tmp_path / stage, stage, lines) for stage, lines in made.items()])


# --- ticks and axes


def test_ticks_by_hand() -> None:
    assert nice_ticks(0, 100) == [0, 20, 40, 60, 80, 100]
    assert nice_ticks(-0.04, 1.04) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert nice_ticks(0.4, 2.3, whole=True) == [1, 2]
    assert nice_ticks(-1.5, -0.2, most=4) == [-1.5, -1.0, -0.5]
    assert tick_texts([0.0, 0.5, 1.0]) == ["0.0", "0.5", "1.0"]
    assert tick_texts([-0.0, 20.0]) == ["0", "20"]
    assert tick_texts([1000.0, 1500.0]) == ["1,000", "1,500"]
    assert tick_texts([0.0, 2e-5]) == ["0", "2e-05"]


@example([1e-09], False)  # 18 * 5e-11 is a rounding below its own low end
@given(st.lists(PLACES, min_size=1, max_size=5), st.booleans())
def test_an_axis_holds_its_values_and_few_round_ticks(values: list[float], whole: bool) -> None:
    if whole:  # steps
        values = [float(round(value)) for value in values]
    axis = make_axis(values, 10, 110, whole=whole)
    assert all(axis.low < value < axis.high for value in values)
    assert all(10 <= axis.place(value) <= 110 for value in values)
    assert len(axis.ticks) <= 6
    assert all(axis.low <= tick <= axis.high for tick in axis.ticks)
    if whole:
        assert all(tick == round(tick) for tick in axis.ticks)
    else:
        assert len(axis.ticks) >= 2
    steps = [b - a for a, b in zip(axis.ticks, axis.ticks[1:], strict=False)]
    if steps and max(map(abs, values)) < 1e6:
        leading = steps[0] / 10 ** math.floor(math.log10(steps[0]) + 1e-6)
        assert min(abs(leading - nice) for nice in (1, 2, 5)) < 1e-3
        assert steps == pytest.approx([steps[0]] * len(steps), rel=1e-3)
    assert len(set(tick_texts(axis.ticks))) == len(axis.ticks) or max(map(abs, values)) > 1e6


# --- series


def test_series_are_finite_points_under_the_first_name_that_a_run_has(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [
        {"step": 0, "b": 1.0},
        {"step": 2, "seconds": 3.0, "b": 2, "b_stderr": 0.5},
        {"step": 1, "seconds": 1.0, "b": "text", "c": 1.0},
        {"step": 3, "seconds": 4.0, "b": float("inf")},
        {"step": 4, "b": True},
        {"step": 5, "b": 10**400},
        {"step": 6, "b": 5.0},
    ]
    run = read_run(make_run(tmp_path / "a", "sft", lines, manifest={"metrics": {"d": 4.0, "b": 9.0}}), "a")
    assert series(run, ("a", "b", "c")) == [(0, 1.0), (2, 2.0), (6, 5.0)]
    assert errors_of(run, ("a", "b")) == [0.0, 0.5, 0.0]
    assert series(run, ("b",), "seconds") == [(0.0, 1.0), (3.0, 2.0)]  # nothing is known of when step 6 was
    assert series(run, ("a",)) == []
    assert [last(run, ("b",)), last(run, ("d",)), last(run, ("a",))] == [5.0, 4.0, None]
    assert [as_number(x) for x in (1, 1.5, True, None, "1", math.nan, -math.inf)] == [1.0, 1.5] + [None] * 5


@given(
    st.lists(
        st.fixed_dictionaries(
            {"step": st.integers(0, 9)},
            optional={
                name: st.sampled_from([0, 1.5, -2, math.nan, math.inf, 10**400, True, None, "1"])
                for name in ("a", "b", "seconds")
            },
        ),
        max_size=30,
    )
)
def test_columns_are_the_lines_by_figure(lines: list[dict[str, Any]]) -> None:
    run = Run("a", Path("a"), {}, {}, by_column(lines), [], {}, [], "")
    in_order = sorted(lines, key=lambda line: line["step"])
    assert run.metrics.steps == [line["step"] for line in in_order]
    assert run.metrics.columns.keys() == {name for line in lines for name in line}
    for name in ("a", "b"):
        found = [(line["step"], as_number(line.get(name))) for line in in_order]
        assert series(run, (name,)) == [(at, value) for at, value in found if value is not None]
        places = [0.0 if line["step"] == 0 else as_number(line.get("seconds")) for line in in_order]
        pairs = [(at, value) for at, (_, value) in zip(places, found, strict=True)]
        assert series(run, (name,), "seconds") == [p for p in pairs if None not in p]


@given(st.lists(st.floats(-1e6, 1e6), max_size=60), st.integers(1, 20))
def test_stretches_cover_every_point_once(values: list[float], most: int) -> None:
    points = [(float(i), value) for i, value in enumerate(values)]
    found = stretches(points, most)
    assert len(found) == min(most, len(values))
    if len(values) <= most:
        assert [(s.at, s.mean, s.low, s.high) for s in found] == [(x, y, y, y) for x, y in points]
        return
    # a slow reference: the stretch of each point, by where its number falls
    parts: dict[int, list[tuple[float, float]]] = {}
    for i, point in enumerate(points):
        mine = max(j for j in range(most) if j * len(points) // most <= i)
        parts.setdefault(mine, []).append(point)
    assert [s.low for s in found] == [min(y for _, y in part) for part in parts.values()]
    assert [s.high for s in found] == [max(y for _, y in part) for part in parts.values()]
    assert [s.mean for s in found] == pytest.approx([fmean(y for _, y in part) for part in parts.values()], abs=1e-6)
    assert [s.at for s in found] == pytest.approx([fmean(x for x, _ in part) for part in parts.values()])


# --- what is drawn


def test_points_lie_where_the_axes_say() -> None:
    drawn = draw("t", "x", "y", [Curve(1, "a", [(0, 0.0), (10, 4.0)], "bold", [0.0, 1.0])], [Mark(1, 5, "alarm")])
    (line,) = parsed(drawn).iter("polyline")
    # x: 0..10 with 4 % room, -0.4..10.4, on 52..388: 52 + 0.4 / 10.8 * 336 = 64.4, 388 - 12.4 = 375.6
    # y: 0..5 (4 + 1 of the error) with room, -0.2..5.2, on 220..10: 220 - 0.2 / 5.4 * 210 = 212.2,
    #    220 - 4.2 / 5.4 * 210 = 56.7
    assert line.get("points") == "64.4,212.2 375.6,56.7"
    (whisker,) = [p for p in parsed(drawn).iter("path") if "whisker" in (p.get("class") or "")]
    # 3 and 5: 220 - 3.2 / 5.4 * 210 = 95.6, 220 - 5.2 / 5.4 * 210 = 17.8
    assert whisker.get("d") == "M375.6 95.6V17.8"
    assert "alarm" in texts(drawn, "title")
    ticks = [element.text for element in parsed(drawn).iter("text")]
    assert ticks == ["0", "1", "2", "3", "4", "5", "0", "2", "4", "6", "8", "10", "x", "y"]
    (picture,) = parsed(drawn).iter("svg")
    assert picture.get("aria-label") == "t: y against x; a"
    assert draw("t", "x", "y", []) == ""


def test_a_long_curve_is_a_line_of_means_in_a_band() -> None:
    points = [(float(i), float(i % 2)) for i in range(800)]
    drawn = draw("t", "x", "y", [Curve(0, "a", points)])
    (line,) = parsed(drawn).iter("polyline")
    (band,) = parsed(drawn).iter("polygon")
    places = (line.get("points") or "").split()
    assert len(places) == chart.STRETCHES
    assert {place.split(",")[1] for place in places} == {"115.0"}  # 0.5 is in the middle of 10..220
    assert len((band.get("points") or "").split()) == 2 * chart.STRETCHES
    assert len(drawn) < 8000


def test_the_curves_of_each_stage(runs: list[Run]) -> None:
    slots = assign_slots(runs)
    assert {name for name, slot in slots.items() if slot == 0} | {n for n, s in slots.items() if s == 1} == set(slots)
    by_title = {p.title: panel_curves(p, runs, slots) for p in (*SUPERVISED, *ALIGNED)}
    shown = {title: {(c.label, c.look): c.points for c in curves} for title, curves in by_title.items() if curves}
    assert shown == {
        "Fine-tuning: loss": {("sft", "thin"): [(5, 4), (10, 3.5)], ("sft", "bold"): [(10, 3.75)]},
        "Reward model: loss": {("rm", "thin"): [(8, 0.5)]},
        "Reward model: accuracy": {("rm", "thin"): [(8, 0.75)], ("rm", "bold"): [(8, 0.875)]},
        "Reward": {
            ("ppo", "thin"): [(1, -1), (2, -0.75)],
            ("ppo", "bold"): [(0, -1.5), (2, -0.5)],
            ("raft", "thin"): [(1, -1.25)],
            ("raft", "bold"): [(0, -1.5), (1, -1)],
        },
        "Reward over time": {
            ("ppo", "thin"): [(10.5, -1), (1021, -0.75)],
            ("ppo", "bold"): [(0, -1.5), (1021, -0.5)],
            ("raft", "thin"): [(7, -1.25)],
            ("raft", "bold"): [(0, -1.5), (7, -1)],
        },
        "KL to the reference": {("ppo", "thin"): [(1, -0.5), (2, 4)], ("raft", "thin"): [(1, 0)]},
        "distinct-2": {("ppo", "thin"): [(1, 0.75), (2, 0.5)], ("raft", "thin"): [(1, 0.875)]},
        "Length": {("ppo", "thin"): [(1, 16), (2, 20)], ("raft", "thin"): [(1, 17)]},
        "Loss on held-out text": {("ppo", "bold"): [(0, 3.25), (2, 3.5)]},
        "RAFT: reward of what is selected": {("raft", "thin"): [(1, 9)]},
    }
    errors = {c.label: c.errors for c in by_title["Reward"] if c.look == "bold"}
    assert errors == {"ppo": [0.25, 0.125], "raft": [0.25, 0.25]}
    ppo, raft = (next(run for run in runs if run.name == name) for name in ("ppo", "raft"))
    assert [over_distance(ppo), over_distance(raft)] == [[(0, -1), (2, -0.75)], [(0, -1.25)]]  # √4; -0.5 counts as 0


def test_a_figure_has_its_numbers_below_and_a_legend_above(runs: list[Run]) -> None:
    drawn = charts(runs, assign_slots(runs))
    assert texts(drawn, "li") == [" sft (sft)", " rm (rm)", " ppo (ppo)", " raft (raft)"]
    rows = cells(drawn)
    assert ["ppo held-out", "2", "-1.5", "-0.5", "-1.5", "-0.5"] in rows
    assert ["ppo", "2", "-0.5", "4", "-0.5", "4"] in rows  # KL
    titles = texts(drawn, "figcaption")
    # KL of raft is 0 and ppo's is not; all of a panel must be 0 for it to be left out
    assert [titles.count(title) for title in ("Reward", "Reward against distance", "KL to the reference")] == [1, 1, 1]
    still = [{"step": 1, "raft/discarded": 0.0, "raft/kl": 1.0}]
    only = [Run("a", Path("a"), {"stage": "raft"}, {}, by_column(still), [], {}, [], "")]
    assert texts(charts(only, {"a": 0}), "figcaption") == ["KL to the reference"]


def test_several_sources_and_rules_have_panels_of_their_own(tmp_path: Path) -> None:
    lines = [{"step": 1, "reward/rm": 1.0, "reward/watched": 2.0, "rules/stray": 0.5, "rules/stray_redrawn": 0.1}]
    one = [{"step": 1, "reward/alone": 1.0, "alarm/kl": 0.0}, {"step": 2, "alarm/kl": 1.0}]
    runs = read_runs([make_run(tmp_path / "a", "ppo", lines), make_run(tmp_path / "b", "raft", one)])
    assert [panel.thin for panel in source_panels(runs)] == [("reward/rm",), ("reward/watched",), ("rules/stray",)]
    assert alarms(runs, {"a": 0, "b": 1}) == [Mark(1, 2, "b: alarm kl")]


def test_calibration_is_that_of_the_newest_evaluation(tmp_path: Path) -> None:
    run = make_run(tmp_path / "rm", "rm", RM)
    (run / "evaluation").mkdir()
    bins = '{"reliability": [{"mean_confidence": 0.5, "accuracy": %s, "num": 12}, {"accuracy": 1}, 3]}'
    (run / "evaluation" / "step_00000009.json").write_text(bins % 0.25)
    (run / "evaluation" / "step_00000010.json").write_text(bins % 0.75)
    drawn = reliability(read_runs([run]), {"rm": 0})
    assert cells(drawn)[1] == ["rm", "1", "0.75", "0.75", "0.75", "0.75"]
    # 12 rows, 9 right; with two more of each 11 of 16: sqrt(11/16 * 5/16 / 16)
    assert error_of_share(0.75, 12) == pytest.approx(math.sqrt(11 * 5) / 64)
    assert error_of_share(1.0, 1) > 0.2


# --- names


def test_the_stages_log_what_the_report_reads() -> None:
    """A figure that is renamed where it is logged must be renamed here."""
    logged: set[str] = set()
    for path in PACKAGE.rglob("*.py"):
        if path.parent.name == "report":
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        logged |= {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    panels = [name for panel in (*SUPERVISED, *ALIGNED) for name in (*panel.thin, *panel.bold)]
    tabled = [
        "eval_accuracy",
        "eval_perplexity",
        "eval_margin",
        "eval_ece",
        "eval_longer_wins",
        "num_tokens",
        "episode",
    ]
    tabled += ["seconds", "perf/tokens_per_s", "perf/mfu", "perf/peak_memory_gb"]
    for name in [*panels, *tabled]:
        assert {name, name.removeprefix("eval_")} & logged, name  # evaluations put eval_ before a figure's name
    clock = [name.removeprefix("perf/").removesuffix("_s") for name in PARTS.values()]  # perf/{phase}_s there
    assert set(clock) <= logged
