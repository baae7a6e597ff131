"""Where time and memory went."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import NamedTuple

from rlhf_cli.report.markup import NOTHING, Markup, duration, number, table, tag
from rlhf_cli.report.metrics import as_number
from rlhf_cli.report.runs import Run, final_figures
from rlhf_cli.report.series import last, series

PARTS = {"writing": "perf/generate_s", "scoring": "perf/score_s", "learning": "perf/train_s"}
REST = "rest"  # evaluations and saving
BAR_WIDTH, BAR_HEIGHT = 600, 16


class Cost(NamedTuple):
    """parts: seconds by part, {} where a stage has none; seconds: counted in steps; memory_gb: the most of any rank."""

    run: Run
    parts: dict[str, float]
    seconds: float | None
    memory_gb: float | None


def cost_of(run: Run) -> Cost:
    sums = {part: sum(value for _, value in series(run, (name,))) for part, name in PARTS.items()}
    seconds = last(run, ("seconds",))
    parts = sums if any(sums.values()) else {}
    if parts and seconds is not None:
        parts = {**parts, REST: max(0.0, seconds - sum(parts.values()))}
    logged = [value for _, value in series(run, ("perf/peak_memory_gb",))]
    final = final_figures(run.manifest)
    logged += [final[name] for name in ("perf/peak_memory_gb", "peak_memory_gb") if name in final]
    return Cost(run, parts, seconds, max(logged, default=None))


def cost(runs: Sequence[Run]) -> Markup:
    """Bars for the runs with parts, and a table of all."""
    costs = [cost_of(run) for run in runs]
    rows = []
    for run, parts, seconds, memory in costs:
        shares = [duration(parts.get(part)) for part in (*PARTS, REST)]
        speed = number(_mean(run, "perf/tokens_per_s"), ",.0f")
        share_of_peak = number(_mean(run, "perf/mfu"), ".3f")
        rows.append(
            [run.name, run.stage, _wall_clock(run), duration(seconds), *shares, speed, share_of_peak,
             number(memory, ".2f"), run.manifest.get("world_size") or NOTHING]
        )  # fmt: skip
    head = ["run", "stage", "first start to end", "time in steps", *PARTS, REST, "tokens/s", "MFU", "peak memory (GB)",
            "ranks"]  # fmt: skip
    drawn = bars([c for c in costs if c.parts])
    caption = "Time and memory (means over steps; pauses count between first start and end only)"
    return Markup(drawn + table(head, rows, caption, words=2))


def bars(costs: Sequence[Cost]) -> Markup:
    """A bar for each run, to scale, its parts side by side."""
    longest = max((sum(c.parts.values()) for c in costs), default=0.0)
    if not longest:
        return Markup("")
    legend = tag("ul", *(tag("li", _key(i), " ", part) for i, part in enumerate((*PARTS, REST))), class_="legend")
    entries = []
    for one in costs:
        x, pieces, words = 0.0, [], []
        for i, (part, seconds) in enumerate(one.parts.items()):
            width = seconds / longest * BAR_WIDTH
            title = tag("title", f"{part}: {duration(seconds)}")
            pieces.append(
                tag("rect", title, x=round(x, 1), y=0, width=round(width, 1), height=BAR_HEIGHT, class_=f"f{i}")
            )
            words.append(f"{part} {duration(seconds)}")
            x += width
        named = f"{one.run.name}: {', '.join(words)}"
        drawn = tag("svg", *pieces, viewBox=f"0 0 {BAR_WIDTH} {BAR_HEIGHT}", role="img", aria_label=named)
        entries += [tag("dt", one.run.name), tag("dd", drawn)]
    return Markup(legend + tag("dl", *entries, class_="bars"))


def _key(slot: int) -> Markup:
    box = tag("rect", x=0, y=2, width=12, height=12, class_=f"f{slot}")
    return tag("svg", box, viewBox="0 0 12 16", class_="key", aria_hidden="true")


def _mean(run: Run, name: str) -> float | None:
    """Over the steps, or the one that the manifest has."""
    values = [value for _, value in series(run, (name,))]
    return sum(values) / len(values) if values else as_number(final_figures(run.manifest).get(name))


def _wall_clock(run: Run) -> str:
    started, finished = run.manifest.get("started"), run.manifest.get("finished")
    try:
        passed = datetime.fromisoformat(str(finished)) - datetime.fromisoformat(str(started))
    except (ValueError, TypeError):
        return NOTHING  # not at its end yet, or no times
    return duration(passed.total_seconds())
