"""From probes of PPO runs to their table, and whether their first iterations agree."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

from _probe import Probe
from _table import seconds

ERRORS_ALLOWED = 4  # standard errors between means that are the same: exceeded once in 16,000 comparisons
KL_ALLOWED = 1e-3  # nats per response at the start: rounding in fp32


class Row(NamedTuple):
    """One compared program: medians over its runs.

    samples: responses per second; spread: (fastest - slowest) / median; memory_mib: peak above imports; phases: seconds
    of an iteration for generating, scoring and training; steps: optimizer steps of an iteration; first: figures of the
    first iteration of the first run.
    """

    name: str
    samples: float
    spread: float
    memory_mib: float
    phases: tuple[float, float, float]
    steps: float
    first: dict[str, float]


def summarise(name: str, probes: Sequence[Probe], skip: int) -> Row:
    """Iterations after the first `skip`."""
    speeds = [sum(probe.samples[skip:]) / seconds(probe, skip) for probe in probes]
    middle = median(speeds)
    generate, score, train = (
        median(figures[phase] for probe in probes for figures in probe.figures[skip:])
        for phase in ("generate_s", "score_s", "train_s")
    )
    return Row(
        name,
        middle,
        (max(speeds) - min(speeds)) / middle,
        median(probe.peak_mib - probe.imports_mib for probe in probes),
        (generate, score, train),
        probes[0].figures[0]["optimizer_steps"],
        probes[0].figures[0],
    )


def table(rows: Sequence[Row], base: str) -> str:
    """A Markdown table; ratios are against the row called `base`, or the first one when there is none."""
    against = next((row for row in rows if row.name == base), rows[0])
    ratio = f"÷ {against.name}"
    names = ["program", "responses/s", ratio, "spread", "generate s", "score s", "train s", "optimizer steps",
             "peak MiB above imports", ratio, "first score", "KL", "nats/token", "length"]  # fmt: skip
    lines = [
        (
            row.name,
            f"{row.samples:.2f}",
            f"{row.samples / against.samples:.2f}",
            f"{row.spread:.0%}",
            *(f"{phase:.2f}" for phase in row.phases),
            f"{row.steps:.0f}",
            f"{row.memory_mib:,.0f}",
            f"{row.memory_mib / against.memory_mib:.2f}",
            f"{row.first['scores']:.3f}",
            f"{abs(row.first['kl']):.5f}",
            f"{row.first['nats_per_token']:.3f}",
            f"{row.first['length']:.1f}",
        )
        for row in rows
    ]
    shown = [f"| {' | '.join(cells)} |" for cells in (names, *lines)]
    return "\n".join([shown[0], f"|---|{'---:|' * (len(names) - 1)}", *shown[1:]])


def disagreements(rows: Sequence[Row], responses: int) -> list[str]:
    """What shows that the programs do not do the same. responses: of an iteration."""
    found = []
    for row in rows:
        if abs(row.first["kl"]) > KL_ALLOWED:
            found.append(f"{row.name} starts with KL {row.first['kl']:.5f}, not 0")
        theirs = rows[-1].first
        error = math.hypot(row.first["scores_std"], theirs["scores_std"]) / math.sqrt(responses)
        if abs(row.first["scores"] - theirs["scores"]) > ERRORS_ALLOWED * error:
            found.append(
                f"the first scores of {row.name} and {rows[-1].name} are {row.first['scores']:.4f} and"
                f" {theirs['scores']:.4f}, further apart than {ERRORS_ALLOWED} standard errors of {error:.4f}"
            )
    return found
