"""From probes to the tables that docs/benchmarks.md shows."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

from _probe import Probe

LOSSES_SHOWN = 3


class Row(NamedTuple):
    """One compared program over all its runs. speed: real tokens per second; memory_mib: peak above imports; samples:
    documents or pairs per second."""

    name: str
    speed: float
    spread: float
    memory_mib: float
    losses: list[float]
    samples: float


def speed(probe: Probe, skip: int) -> float:
    """Real tokens per second after the first `skip` steps."""
    return sum(probe.tokens[skip:]) / seconds(probe, skip)


def seconds(probe: Probe, skip: int) -> float:
    """Wall clock of the steps after the first `skip`."""
    assert 0 < skip < len(probe.times), f"{len(probe.times)} steps leave none after {skip}"
    return probe.times[-1] - probe.times[skip - 1]


def summarise(name: str, probes: Sequence[Probe], skip: int) -> Row:
    """Medians over runs. spread: (fastest - slowest) / median."""
    speeds = [speed(probe, skip) for probe in probes]
    middle = median(speeds)
    memory = median(probe.peak_mib - probe.imports_mib for probe in probes)
    samples = median(sum(probe.samples[skip:]) / seconds(probe, skip) for probe in probes)
    return Row(name, middle, (max(speeds) - min(speeds)) / middle, memory, probes[0].losses[:LOSSES_SHOWN], samples)


def comparison(rows: Sequence[Row], base: str, parameters: int, samples: str | None = None) -> str:
    """A Markdown table; ratios are against the row called `base`, and memory also against 16 bytes per parameter.
    samples: what they are called in a column of their own, None = without."""
    against = next((row for row in rows if row.name == base), rows[0])
    least = 16 * parameters / 2**20
    lines = [
        (
            row.name,
            *([] if samples is None else [f"{row.samples:,.2f}"]),
            f"{row.speed:,.0f}",
            f"{row.spread:.0%}",
            f"{row.speed / against.speed:.2f}",
            f"{row.memory_mib:,.0f}",
            f"{row.memory_mib / against.memory_mib:.2f}",
            f"{row.memory_mib / least:.2f}",
            shown(row.losses),
        )
        for row in rows
    ]
    ratio = f"÷ {against.name}"
    names = ["program", *([] if samples is None else [f"{samples}/s"]), "tokens/s", "spread", ratio,
             "peak MiB above imports", ratio, "÷ 16 B/param", "first losses"]  # fmt: skip
    table = [f"| {' | '.join(cells)} |" for cells in (names, *lines)]
    return "\n".join([table[0], f"|---|{'---:|' * (len(names) - 2)}---|", *table[1:]])


def scaling(one: Row, two: Row) -> str:
    """A Markdown table of one against two ranks."""
    return "\n".join(
        [
            "| ranks | tokens/s | spread | × 1 rank | peak MiB above imports of rank 0 | first losses |",
            "|---:|---:|---:|---:|---:|---|",
            *(
                f"| {ranks} | {row.speed:,.0f} | {row.spread:.0%} | {row.speed / one.speed:.2f}"
                f" | {row.memory_mib:,.0f} | {shown(row.losses)} |"
                for ranks, row in ((1, one), (2, two))
            ),
        ]
    )


def shown(losses: Sequence[float]) -> str:
    return ", ".join(f"{loss:.5f}" for loss in losses)
