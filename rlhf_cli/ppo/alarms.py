"""Signs of over-optimisation: figures of the newest iterations against those of the first (Gao et al. 2210.10760)."""

from __future__ import annotations

from collections.abc import Sequence

from rlhf_cli.schema import AlarmConfig

KL, DISTINCT_2, SEPARATORS, LENGTH = "objective/kl", "text/distinct_2", "text/separator_ratio", "text/length"
WATCHED = (KL, DISTINCT_2, SEPARATORS, LENGTH)


def watch(watched: Sequence[dict[str, float]], line: dict[str, float], window: int) -> list[dict[str, float]]:
    """What is known after another iteration: the first `window` of the run and the newest `window`."""
    grown = [*watched, {name: line[name] for name in WATCHED}]
    return grown if len(grown) <= 2 * window else [*grown[:window], *grown[-window:]]


def find_alarms(watched: Sequence[dict[str, float]], settings: AlarmConfig) -> dict[str, str]:
    """Alarm -> what is wrong, of everything that is out of bounds now; nothing before two windows are full."""
    window = settings.window
    if len(watched) < 2 * window:
        return {}
    before = {name: sum(line[name] for line in watched[:window]) / window for name in WATCHED}
    now = {name: sum(line[name] for line in watched[-window:]) / window for name in WATCHED}
    found = {}
    if settings.kl_budget is not None and now[KL] > settings.kl_budget:
        found["kl_budget"] = (
            f"KL to the reference is {now[KL]:.2f} nats per response (ppo.alarms.kl_budget = {settings.kl_budget:g})"
        )
    for name, figure, share in (
        ("distinct_2_drop", DISTINCT_2, settings.distinct_2_drop),
        ("separator_drop", SEPARATORS, settings.separator_drop),
    ):
        if share and before[figure] > 0 and now[figure] < (1 - share) * before[figure]:
            fall = f"from {before[figure]:.3f} to {now[figure]:.3f}"
            found[name] = f"{figure} fell {fall} (ppo.alarms.{name} = {share:g})"
    drift = abs(now[LENGTH] - before[LENGTH]) / max(before[LENGTH], 1e-9)
    if settings.length_drift and drift > settings.length_drift:
        found["length_drift"] = (
            f"mean length went from {before[LENGTH]:.1f} to {now[LENGTH]:.1f} tokens"
            f" (ppo.alarms.length_drift = {settings.length_drift:g})"
        )
    return found


def explain(name: str, what: str) -> str:
    """A line for the user."""
    return (
        f"alarm {name}: {what}. The policy may be over-optimising the reward: read samples/, and raise ppo.kl_coef,"
        " lower optim.lr or stop earlier"
    )
