"""Which figures are drawn, and under which names the stages log them. Runs are overlaid."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from rlhf_cli.report.chart import Curve, Look, Mark, draw, swatch
from rlhf_cli.report.markup import Markup, number, table, tag
from rlhf_cli.report.metrics import as_number
from rlhf_cli.report.runs import Run
from rlhf_cli.report.series import Points, errors_of, series

HELD_OUT = ("eval_reward", "raft/reward_eval")
REWARD = ("objective/scores", "raft/reward_policy")
KL = ("objective/kl", "raft/kl")
DISTINCT_2 = ("text/distinct_2", "raft/distinct_2")
LENGTH = ("text/length", "raft/length")
TEXT_LOSS = ("eval_loss",)


@dataclass(frozen=True)
class Panel:
    """thin: names of the figure in training or of the run's own prompts; bold: on held-out data."""

    title: str
    unit: str
    thin: tuple[str, ...] = ()
    bold: tuple[str, ...] = ()
    stages: tuple[str, ...] = ("ppo", "raft")
    against: Literal["step", "seconds"] = "step"

    @property
    def x_label(self) -> str:
        """A step of ppo and raft is an iteration."""
        return (
            "iteration"
            if self.against == "step" and "sft" not in self.stages and "rm" not in self.stages
            else self.against
        )


SUPERVISED = (
    Panel("Fine-tuning: loss", "nats per token", ("loss",), ("eval_loss",), ("sft",)),
    Panel("Reward model: loss", "loss", ("loss",), ("eval_loss",), ("rm",)),
    Panel("Reward model: accuracy", "share that is right", ("accuracy",), ("eval_accuracy",), ("rm",)),
    Panel("Reward model: margin", "score of better − worse", ("margin",), ("eval_margin",), ("rm",)),
)
ALIGNED = (
    Panel("Reward", "reward", REWARD, HELD_OUT),
    Panel("Reward over time", "reward", REWARD, HELD_OUT, against="seconds"),
    Panel("KL to the reference", "nats per response", KL),
    Panel("distinct-2", "different bigrams / all", DISTINCT_2, ("eval_distinct_2",)),
    Panel("Length", "tokens", LENGTH, ("eval_length",)),
    Panel("Responses that end with EOS", "share", ("text/eos_rate",)),
    Panel("Separator ratio", "share of tokens", ("text/separator_ratio",)),
    Panel("Loss on held-out text", "nats per token", bold=TEXT_LOSS),
    Panel("PPO: entropy", "nats per token", ("policy/entropy_avg",), stages=("ppo",)),
    Panel("PPO: clip fraction", "share of tokens", ("policy/clipfrac_avg",), stages=("ppo",)),
    Panel("PPO: loss of the critic", "loss", ("loss/value_avg",), stages=("ppo",)),
    Panel("RAFT: reward of what is selected", "reward", ("raft/reward_selected",), stages=("raft",)),
    Panel("RAFT: discarded by rules", "share", ("raft/discarded",), stages=("raft",)),
    Panel("RAFT: loss", "nats per token", ("loss",), stages=("raft",)),
)


def charts(runs: Sequence[Run], slots: dict[str, int]) -> Markup:
    """Every panel for which some run has figures, in two groups with a legend each. slots: of each run's name."""
    groups = []
    supervised = [run for run in runs if run.stage in ("sft", "rm") and run.metrics.steps]
    if supervised:
        figures = [panel_figure(panel, supervised, slots) for panel in SUPERVISED]
        figures.append(reliability(supervised, slots))
        groups.append(_group("Supervised stages", "thin: training; bold: held-out rows", supervised, figures, slots))
    aligned = [run for run in runs if run.is_aligned and run.metrics.steps]
    if aligned:
        first, *others = (panel_figure(p, aligned, slots) for p in (*ALIGNED, *source_panels(aligned)))
        figures = [first, frontier(aligned, slots), *others]
        note = (
            "thin: responses in training, as the policy writes them; bold: to held-out prompts, with standard errors"
            " (distinct-2 falls with the number of responses, so thin and bold are not on one scale);"
            " ▲ with a dotted line: an alarm was first raised"
        )
        groups.append(_group("Alignment", note, aligned, figures, slots))
    return Markup("".join(groups))


def assign_slots(runs: Sequence[Run]) -> dict[str, int]:
    """A slot for each run that has curves; the two groups count apart, so that colours last longer."""
    aligned = [run.name for run in runs if run.is_aligned and run.metrics.steps]
    others = [run.name for run in runs if not run.is_aligned and run.metrics.steps]
    return {name: slot for names in (aligned, others) for slot, name in enumerate(names)}


def panel_curves(panel: Panel, runs: Sequence[Run], slots: dict[str, int]) -> list[Curve]:
    """The thin and the bold curve of each run, where it has points."""
    found = []
    for run in runs:
        if run.stage not in panel.stages:
            continue
        looks: tuple[tuple[tuple[str, ...], Look], ...] = ((panel.thin, "thin"), (panel.bold, "bold"))
        for names, look in looks:
            points = series(run, names, panel.against)
            if points:
                errors = errors_of(run, names, panel.against) if look == "bold" else []
                found.append(Curve(slots[run.name], run.name, points, look, errors))
    return found


def panel_figure(panel: Panel, runs: Sequence[Run], slots: dict[str, int]) -> Markup:
    """A chart with its numbers below, or nothing when no run has the figure or it is 0 throughout."""
    curves = panel_curves(panel, runs, slots)
    concerned = [run for run in runs if run.stage in panel.stages]
    marks = alarms(concerned, slots) if curves and panel.against == "step" else []
    if not any(value for curve in curves for _, value in curve.points):
        return Markup("")  # such as a rule that is never hit
    drawn = draw(panel.title, panel.x_label, panel.unit, curves, marks, whole_x=panel.against == "step")
    return _figure(panel.title, drawn, curves, panel.x_label)


def frontier(runs: Sequence[Run], slots: dict[str, int]) -> Markup:
    """Reward of the policy's responses against √KL, as in Gao et al., arXiv 2210.10760."""
    curves = [Curve(slots[run.name], run.name, over_distance(run), "way") for run in runs]
    curves = [curve for curve in curves if curve.points]
    title = "Reward against distance"
    return _figure(title, draw(title, "√KL (KL in nats)", "reward in training", curves), curves, "√KL")


def over_distance(run: Run) -> Points:
    """(√KL, reward) of the same responses; an estimate of KL may be a little below 0."""
    rewards = dict(series(run, REWARD))
    return [(math.sqrt(max(0.0, kl)), rewards[step]) for step, kl in series(run, KL) if step in rewards]


def reliability(runs: Sequence[Run], slots: dict[str, int]) -> Markup:
    """How often a reward model is right when it says that it is, at its newest evaluation."""
    curves = []
    for run in runs:
        bins = run.judgement.get("reliability")
        entries = [entry for entry in bins if isinstance(entry, dict)] if isinstance(bins, list) else []
        points, errors = [], []
        for entry in entries:
            sure, right, count = (as_number(entry.get(key)) for key in ("mean_confidence", "accuracy", "num"))
            if sure is not None and right is not None and 0 <= right <= 1 and count is not None and count > 0:
                points.append((sure, right))
                errors.append(error_of_share(right, count))
        if points:
            curves.append(Curve(slots[run.name], run.name, points, "bold", errors))
    title = "Reward model: calibration"
    drawn = draw(title, "how sure it is", "share that is right", curves, diagonal=True)
    return _figure(title, drawn, curves, "how sure it is")


def error_of_share(share: float, count: float) -> float:
    """The standard error of a share of `count` rows, that of few rows not 0 when all are alike (Agresti and Coull,
    "Approximate is better than exact", 1998: as if two more were right, and two more wrong)."""
    better = (share * count + 2) / (count + 4)
    return math.sqrt(better * (1 - better) / (count + 4))


def source_panels(runs: Sequence[Run]) -> Iterator[Panel]:
    """One for each source where a run has several (such as a watched one), and for each rule."""
    names = {run.name: sorted(run.metrics.columns) for run in runs}
    sources = [[key for key in keys if key.startswith("reward/")] for keys in names.values()]
    for key in sorted({key for found in sources if len(found) > 1 for key in found}):
        yield Panel(f"Reward source: {key.removeprefix('reward/')}", "reward", (key,), (f"eval_{key}",))
    rules = {key for keys in names.values() for key in keys if key.startswith("rules/")}
    for key in sorted(key for key in rules if not key.endswith("_redrawn")):
        yield Panel(f"Rule: {key.removeprefix('rules/')}", "share of responses", (key,), (f"eval_{key}",))


def alarms(runs: Sequence[Run], slots: dict[str, int]) -> list[Mark]:
    """Where each alarm of a run was first raised."""
    found = []
    for run in runs:
        for name in sorted(key for key in run.metrics.columns if key.startswith("alarm/")):
            raised = [at for at, value in series(run, (name,)) if value]
            if raised:
                found.append(Mark(slots[run.name], raised[0], f"{run.name}: alarm {name.removeprefix('alarm/')}"))
    return found


def legend(runs: Sequence[Run], slots: dict[str, int]) -> Markup:
    entries = (tag("li", swatch(slots[run.name]), " ", f"{run.name} ({run.stage})") for run in runs)
    return tag("ul", *entries, class_="legend")


def _group(title: str, note: str, runs: Sequence[Run], figures: Sequence[Markup], slots: dict[str, int]) -> Markup:
    shown = [figure for figure in figures if figure]
    parts = [tag("h3", title), legend(runs, slots), tag("p", note, class_="note")]
    return Markup("".join([*parts, tag("div", *shown, class_="charts")]))


def _figure(title: str, drawn: Markup, curves: Sequence[Curve], x_label: str) -> Markup:
    if not drawn:
        return drawn
    rows = []
    for curve in curves:
        values = [y for _, y in curve.points]
        which = "held-out" if curve.look == "bold" and any(c.look == "thin" for c in curves) else ""
        cells = [number(v, ".4g") for v in (values[0], values[-1], min(values), max(values))]
        rows.append([f"{curve.label} {which}".strip(), f"{len(values):,}", *cells])
    head = ["run", "points", "first", "last", "lowest", "highest"]
    numbers = tag("details", tag("summary", "numbers"), table(head, rows, f"{title}, by {x_label}"))
    return tag("figure", tag("figcaption", title), drawn, numbers)
