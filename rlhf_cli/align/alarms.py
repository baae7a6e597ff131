"""Signs of over-optimisation: figures of the newest iterations against those of the first (Gao et al. 2210.10760)."""

from __future__ import annotations

from collections.abc import Sequence

from rlhf_cli.schema import AlarmConfig

KL, DISTINCT_2, SEPARATORS, LENGTH = "KL", "distinct-2", "separator ratio", "length"
WATCHED = (KL, DISTINCT_2, SEPARATORS, LENGTH)


def watch(watched: Sequence[dict[str, float]], figures: dict[str, float], window: int) -> list[dict[str, float]]:
    """What is known after another iteration: the first `window` of the run and the newest `window`.

    figures: those of WATCHED.
    """
    grown = [*watched, figures]
    return grown if len(grown) <= 2 * window else [*grown[:window], *grown[-window:]]


def find_alarms(watched: Sequence[dict[str, float]], settings: AlarmConfig, stage: str) -> dict[str, str]:
    """Alarm -> what is wrong, of everything that is out of bounds now; nothing before two windows are full."""
    window = settings.window
    if len(watched) < 2 * window:
        return {}
    before = {name: sum(line[name] for line in watched[:window]) / window for name in WATCHED}
    now = {name: sum(line[name] for line in watched[-window:]) / window for name in WATCHED}
    limit = lambda name: f"({stage}.alarms.{name} = {getattr(settings, name):g})"
    found = {}
    if settings.kl_budget is not None and now[KL] > settings.kl_budget:
        found["kl_budget"] = f"KL to the reference is {now[KL]:.2f} nats per response {limit('kl_budget')}"
    for name, figure, share in (
        ("distinct_2_drop", DISTINCT_2, settings.distinct_2_drop),
        ("separator_drop", SEPARATORS, settings.separator_drop),
    ):
        if share and before[figure] > 0 and now[figure] < (1 - share) * before[figure]:
            found[name] = f"{figure} fell from {before[figure]:.3f} to {now[figure]:.3f} {limit(name)}"
    drift = abs(now[LENGTH] - before[LENGTH]) / max(before[LENGTH], 1e-9)
    if settings.length_drift and drift > settings.length_drift:
        found["length_drift"] = (
            f"mean length went from {before[LENGTH]:.1f} to {now[LENGTH]:.1f} tokens {limit('length_drift')}"
        )
    return found


def explain(what: str, stage: str) -> str:
    """For the user: what is wrong, and what to do."""
    return (
        f"{what}. The policy may be over-optimising the reward: read samples/, and raise {stage}.kl_coef,"
        " lower optim.lr or stop earlier"
    )
