"""Runs side by side: tables of what came out, and what forbids to compare it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_cli.report.curves import DISTINCT_2, HELD_OUT, KL, LENGTH, REWARD, TEXT_LOSS, alarms
from rlhf_cli.report.markup import NOTHING, Markup, duration, number, table, tag
from rlhf_cli.report.runs import Run, final_figures
from rlhf_cli.report.series import errors_of, last, series
from rlhf_cli.report.settings import as_typed

# What must be alike for the rewards of two runs to mean the same.
SHARED = (
    "model.path", "data.path", "data.eval_path", "reward.sources", "reward.normalize", "reward.clip",
    "eval.num_prompts", "eval.temperature",
)  # fmt: skip


def comparison(runs: Sequence[Run]) -> Markup:
    """A table of ppo and raft runs with notes, one of sft and rm runs, one of the others."""
    aligned = [run for run in runs if run.is_aligned]
    supervised = [run for run in runs if run.stage in ("sft", "rm")]
    others = [run for run in runs if run not in aligned and run not in supervised]
    parts = []
    if aligned:
        parts += [aligned_table(aligned), notes("Not alike", differences(aligned)), notes("Alarms", raised(aligned))]
    if supervised:
        parts += [supervised_table(supervised), notes("Rows seen before", rows_seen(supervised))]
    if others:
        parts.append(other_table(others))
    return Markup("".join(parts))


def aligned_table(runs: Sequence[Run]) -> Markup:
    head = ["run", "stage", "iterations", "held-out reward, before → after", "best", "reward in training", "KL",
            tag("span", "distinct-2", class_="together"), "length", "text loss", "time", "responses"]  # fmt: skip
    rows = [
        [run.name, run.stage, progress(run), held_out(run), best(run), number(last(run, REWARD), ".3f"),
         number(last(run, KL), ".2f"), number(last(run, DISTINCT_2), ".3f"), number(last(run, LENGTH), ".1f"),
         number(last(run, TEXT_LOSS), ".4f"), duration(last_seconds(run)), number(last(run, ("episode",)), ",.0f")]
        for run in runs
    ]  # fmt: skip
    return table(head, rows, "Policies: newest figures (± standard error; KL in nats per response)", words=3)


def supervised_table(runs: Sequence[Run]) -> Markup:
    head = ["run", "stage", "steps", "held-out loss", "perplexity", "accuracy", "margin", "calibration error",
            "longer wins", "tokens", "time"]  # fmt: skip
    rows = []
    for run in runs:
        accuracy, error = last(run, ("eval_accuracy",)), last(run, ("eval_accuracy_stderr",))
        rows.append(
            [run.name, run.stage, progress(run), number(last(run, ("eval_loss",)), ".4f"),
             number(last(run, ("eval_perplexity",)), ".3f"), with_error(accuracy, error),
             number(last(run, ("eval_margin",)), ".3f"), number(last(run, ("eval_ece",)), ".3f"),
             number(last(run, ("eval_longer_wins",)), ".3f"), number(last(run, ("num_tokens",)), ",.0f"),
             duration(last_seconds(run))]
        )  # fmt: skip
    return table(head, rows, "Supervised stages: newest figures", words=3)


def other_table(runs: Sequence[Run]) -> Markup:
    """Whatever a merge or a scoring left in its manifest."""
    figures = lambda run: ", ".join(f"{name} {value:.4g}" for name, value in final_figures(run.manifest).items())
    rows = [[run.name, run.stage, run.status, figures(run) or NOTHING] for run in runs]
    return table(["run", "stage", "status", "figures"], rows, "Other stages", words=4)


def progress(run: Run) -> str:
    """How far a run has come, and how it ended if it did not come to its end."""
    return f"{run.steps:,}" if run.status == "complete" else f"{run.steps:,} ({run.status})"


def held_out(run: Run) -> str:
    """First and newest reward on held-out prompts."""
    found = list(zip(series(run, HELD_OUT), errors_of(run, HELD_OUT), strict=True))
    if not found:
        return NOTHING
    shown = [with_error(value, error) for (_, value), error in found]
    return f"{shown[0]} → {shown[-1] if len(shown) > 1 else NOTHING}"


def best(run: Run) -> str:
    """The highest reward on held-out prompts, and after which iteration."""
    found = series(run, HELD_OUT)
    if not found:
        return NOTHING
    step, value = max(found, key=lambda point: point[1])
    return f"{value:.3f} after {step:.0f}"


def with_error(value: float | None, error: float | None) -> str:
    if value is None or error is None:
        return number(value, ".3f")
    return f"{value:.3f} ± {error:.3f}"


def last_seconds(run: Run) -> float | None:
    return last(run, ("seconds",))


def differences(runs: Sequence[Run]) -> list[str]:
    """What the runs do not have alike of what makes their rewards comparable."""
    found = []
    for key in SHARED:
        named: dict[str, list[str]] = {}
        for run in runs:
            if run.config:
                named.setdefault(as_typed(setting(run.config, key)), []).append(run.name)
        if len(named) < 2:
            continue
        if any(value.startswith("[{") for value in named):  # too long to be read here
            found.append(
                f"{key} is not the same in " + "; ".join(map(", ".join, named.values())) + " (see the settings)"
            )
        else:
            found.append(f"{key} is " + "; ".join(f"{value} in {', '.join(names)}" for value, names in named.items()))
    return found


def setting(config: Mapping[str, Any], key: str) -> Any:
    """An option of a frozen config; a temperature of evaluations that follows that of rollouts as the latter."""
    section, _, option = key.partition(".")
    options = config.get(section)
    value = options.get(option) if isinstance(options, Mapping) else None
    return setting(config, "generation.temperature") if key == "eval.temperature" and value is None else value


def raised(runs: Sequence[Run]) -> list[str]:
    marks = alarms(runs, {run.name: 0 for run in runs})
    return [f"{mark.label}, first after iteration {mark.x:.0f}" for mark in marks]


def rows_seen(runs: Sequence[Run]) -> list[str]:
    """Held-out rows that an earlier stage has trained on, as manifests tell."""
    found = []
    for run in runs:
        entries = run.manifest.get("eval_rows_seen")
        for entry in entries if isinstance(entries, list) else []:
            if isinstance(entry, dict) and entry.get("rows"):
                found.append(f"{run.name}: {entry['rows']} held-out rows were trained on in {entry.get('run_dir')}")
    return found


def notes(title: str, lines: Sequence[str]) -> Markup:
    if not lines:
        return Markup("")
    return tag("div", tag("strong", title), tag("ul", *(tag("li", line) for line in lines)), class_="notes")
