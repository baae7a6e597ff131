#!/usr/bin/env python3
"""Runs of `rlhf ppo`, `rlhf raft` and `rlhf sft` side by side: one picture, and a Markdown table.

    python scripts/compare_runs.py runs/ppo runs/raft                     writes comparison.png
    python scripts/compare_runs.py runs/ppo runs/raft --out figures/a.png

The picture has reward, KL, distinct-2 and length against the iteration and against seconds, reward against √KL, and the
loss on held-out text where it was measured (ppo and raft: eval.tax_path). Runs that still go on, or that were stopped,
are shown as far as they came. Seconds are those that a run's metrics count; KL is in nats per response, of the policy
to its reference. Policy reward, distinct-2 and length are of the responses as the policy writes them: all of an
iteration for ppo, one to each prompt for raft. distinct-2 falls with the number of responses, so take it as a trend
where that differs. Below the table stands what ppo and raft runs do not have alike, though their rewards can only be
compared if they do.
Ends with 2 and one line when there is nothing to compare.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rlhf_cli.errors import DataError, RlhfError
from rlhf_cli.rundir import read_manifest
from rlhf_cli.runtime.curves import save_figure, series
from rlhf_cli.runtime.metrics import read_metrics


@dataclass(frozen=True)
class Names:
    """What a stage calls its figures; "" where it has none."""

    held_out: str = ""
    reward: str = ""
    kl: str = ""
    distinct_2: str = ""
    length: str = ""
    written: str = ""


STAGES = {
    "ppo": Names("eval_reward", "objective/scores", "objective/kl", "text/distinct_2", "text/length", "episode"),
    "raft": Names("raft/reward_eval", "raft/reward_policy", "raft/kl", "raft/distinct_2", "raft/length", "episode"),
    "sft": Names(),
}
TEXT_LOSS = "eval_loss"  # all stages call it so
PANELS = (("reward", "reward"), ("kl", "KL to reference (nats)"), ("distinct_2", "distinct-2"),
          ("length", "length (tokens)"))  # fmt: skip
SHARED = (
    "model.path", "data.path", "reward.sources", "reward.normalize", "reward.clip", "eval.num_prompts",
    "eval.temperature",
)  # fmt: skip
NOTHING = "–"


@dataclass(frozen=True)
class RunFigures:
    """One run: its short name, stage, manifest status, config.yaml, and the lines of metrics.jsonl."""

    name: str
    stage: str
    status: str
    config: dict[str, Any]
    lines: list[dict[str, Any]]

    @property
    def names(self) -> Names:
        return STAGES[self.stage]


def main(argv: list[str] | None = None) -> int:
    """Draw and print. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dirs", nargs="+", type=Path, metavar="RUN_DIR")
    parser.add_argument("--out", type=Path, default=Path("comparison.png"), metavar="FILE.png")
    asked = parser.parse_args(argv)
    try:
        runs = read_runs(asked.run_dirs)
        draw(runs, asked.out)
    except (RlhfError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(runs), end="")
    for difference in differences(runs):
        print(f"\n- {difference}", end="")
    print(f"\npicture: {asked.out}")
    return 0


def read_runs(run_dirs: list[Path]) -> list[RunFigures]:
    """Raises DataError for what is no run, or has nothing to show."""
    found = [path.resolve() for path in run_dirs]
    twice = [str(path) for i, path in enumerate(found) if path in found[:i]]
    if twice:
        raise DataError(f"{twice[0]} is named twice; name each run directory once")
    return [read_run(path, name) for path, name in zip(found, short_names(found), strict=True)]


def short_names(paths: list[Path]) -> list[str]:
    """As many of the last parts of the paths as tell them all apart."""
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    return ["/".join(path.parts[-depth:]) for path in paths]


def read_run(run_dir: Path, name: str) -> RunFigures:
    manifest, frozen = read_manifest(run_dir), run_dir / "config.yaml"
    if not manifest or not frozen.is_file():
        missing = "manifest.json" if not manifest else "config.yaml"
        raise DataError(
            f"{run_dir} is no run directory (it has no {missing}); name one of rlhf ppo, rlhf raft or rlhf sft"
        )
    stage = manifest.get("stage")
    if stage not in STAGES:
        raise DataError(f"{run_dir} is a run of `rlhf {stage}`; allowed: runs of {', '.join(STAGES)}")
    lines = list(read_metrics(run_dir))
    if not lines:
        raise DataError(
            f"{run_dir}/metrics.jsonl has no line yet (status: {manifest.get('status')}); come back after an iteration"
        )
    try:
        config = yaml.safe_load(frozen.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise DataError(f"{frozen} is damaged ({' '.join(str(error).split())})") from None
    return RunFigures(name, stage, manifest.get("status", "unknown"), config, lines)


def table(runs: list[RunFigures]) -> str:
    """A Markdown table, a row for each run."""
    head = ["run", "stage", "iterations", "held-out reward, before → after", "policy reward", "KL", "distinct-2",
            "length", "text loss", "seconds", "responses"]  # fmt: skip
    rows = [head, ["---"] * 3 + ["---:"] * 8, *(cells(run) for run in runs)]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |\n" for row in rows)


def cells(run: RunFigures) -> list[str]:
    names, iterations = run.names, run.lines[-1]["step"]
    figures = [
        last(run, names.reward, ".3f"), last(run, names.kl, ".2f"), last(run, names.distinct_2, ".3f"),
        last(run, names.length, ".1f"), last(run, TEXT_LOSS, ".4f"), last(run, "seconds", ",.0f"),
        last(run, names.written, ",.0f"),
    ]  # fmt: skip
    unfinished = "" if run.status == "complete" else f" ({run.status})"
    return [run.name, run.stage, f"{iterations}{unfinished}", held_out(run), *figures]


def last(run: RunFigures, name: str, form: str) -> str:
    """The newest value of a figure."""
    values = [line[name] for line in run.lines if name in line]
    return format(values[-1], form) if values else NOTHING


def held_out(run: RunFigures) -> str:
    """First and newest reward on held-out prompts, each with its standard error."""
    name = run.names.held_out
    found = [(line[name], line[f"{name}_stderr"]) for line in run.lines if name in line]
    if not found:
        return NOTHING
    after = found[-1:] if len(found) > 1 else []
    return " → ".join(f"{value:.3f} ± {error:.3f}" for value, error in found[:1] + after) + ("" if after else " → –")


def differences(runs: list[RunFigures]) -> list[str]:
    """What ppo and raft runs do not have alike of what makes their rewards comparable."""
    aligned = [run for run in runs if run.names.reward]
    found = []
    for key in SHARED:
        values = {run.name: setting(run.config, key) for run in aligned}
        first, *others = values.values() or [None]
        if any(value != first for value in others):
            many = any(isinstance(value, list) for value in values.values())
            what = ", ".join(f"{value} in {name}" for name, value in values.items())
            found.append(f"not alike: {key}, see each config.yaml" if many else f"not alike: {key} is {what}")
    return found


def setting(config: dict[str, Any], key: str) -> Any:
    """An option of a frozen config; a temperature of evaluations that follows that of rollouts as the latter."""
    section, _, option = key.partition(".")
    value = config.get(section, {}).get(option)
    return setting(config, "generation.temperature") if key == "eval.temperature" and value is None else value


def draw(runs: list[RunFigures], path: Path) -> None:
    """The picture. Raises DataError where it cannot be written, and for another kind of file."""
    if path.suffix != ".png":
        raise DataError(f"--out {path}: a PNG is written; end the name in .png")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(22, 9), layout="constrained")
    (*by_step, frontier), (*by_seconds, text_loss) = figure.subplots(2, 5)
    for i, run in enumerate(runs):
        look = {"color": f"C{i % 10}", "linestyle": "-" if i < 10 else "--"}
        for axes_of, against in ((by_step, "step"), (by_seconds, "seconds")):
            for axes, (what, _) in zip(axes_of, PANELS, strict=True):
                x, y = series(run.lines, getattr(run.names, what), against)
                axes.plot(x, y, marker=".", markersize=3, linewidth=1, **look)
            draw_held_out(axes_of[0], run, against, look)
        frontier.plot(*over_distance(run), "o-", markersize=3, linewidth=0.5, color=look["color"])
        text_loss.plot(*series(run.lines, TEXT_LOSS, "seconds"), marker="o", markersize=3, **look)
        by_step[0].plot([], [], label=f"{run.name} ({run.stage})", **look)  # named even if it has no reward to draw
    for axes_of, label in ((by_step, "iteration"), (by_seconds, "seconds")):
        for axes, (_, figure_label) in zip(axes_of, PANELS, strict=True):
            axes.set(xlabel=label, ylabel=figure_label)
    frontier.set(xlabel="√KL", ylabel="policy reward")
    text_loss.set(xlabel="seconds", ylabel="loss on held-out text (nats per token)")
    for axes in (*by_step, frontier, *by_seconds, text_loss):
        axes.grid(alpha=0.3)
    for axes in by_step:
        axes.locator_params(axis="x", integer=True)
    text_loss.set_visible(any(TEXT_LOSS in line for run in runs for line in run.lines))
    by_step[0].set(title="thin: to the run's prompts; bold: to held-out ones")
    figure.legend(loc="outside upper center", ncols=min(len(runs), 5))
    try:
        save_figure(figure, path)
    except OSError as error:
        raise DataError(f"--out {path} cannot be written ({error.strerror}); name another place") from None


def draw_held_out(axes: Any, run: RunFigures, against: str, look: dict[str, str]) -> None:
    name = run.names.held_out
    x, values = series(run.lines, name, against)
    _, errors = series(run.lines, f"{name}_stderr", against)
    if values:
        axes.errorbar(x, values, errors, fmt="o", markersize=4, capsize=2, linewidth=2, **look)


def over_distance(run: RunFigures) -> tuple[list[float], list[float]]:
    """√KL and the policy's reward, as in Gao et al., arXiv 2210.10760; an estimate of KL may be a little below 0."""
    distances, rewards = series(run.lines, run.names.reward, run.names.kl)
    return [math.sqrt(max(0.0, kl)) for kl in distances], rewards


if __name__ == "__main__":
    sys.exit(main())
