"""When the signs of over-optimisation go off, worked out by hand."""

from __future__ import annotations

import pytest

from rlhf_cli.align.alarms import WATCHED, find_alarms, watch
from rlhf_cli.schema import AlarmConfig

KL, DISTINCT_2, SEPARATORS, LENGTH = WATCHED


def lines(kl: float = 1.0, distinct_2: float = 0.8, separators: float = 0.2, length: float = 30.0) -> dict[str, float]:
    return {KL: kl, DISTINCT_2: distinct_2, SEPARATORS: separators, LENGTH: length}


def watched(window: int, *, before: dict[str, float], after: dict[str, float]) -> list[dict[str, float]]:
    kept: list[dict[str, float]] = []
    for line in [before] * window + [lines(kl=99.0, distinct_2=0.0)] * 5 + [after] * window:
        kept = watch(kept, line, window)
    return kept


def test_only_the_first_and_the_newest_window_are_kept() -> None:
    kept = watched(2, before=lines(kl=1.0), after=lines(kl=3.0))
    assert [line[KL] for line in kept] == [1.0, 1.0, 3.0, 3.0], "what lies between is forgotten"


def test_nothing_is_said_before_two_windows_are_full() -> None:
    settings = AlarmConfig(kl_budget=0.1, window=3)
    kept: list[dict[str, float]] = []
    for number in range(1, 7):
        kept = watch(kept, lines(kl=5.0), settings.window)
        assert bool(find_alarms(kept, settings, "ppo")) == (number == 6)


@pytest.mark.parametrize(
    ("settings", "after", "expected"),
    [
        (AlarmConfig(kl_budget=10.0, window=2), lines(kl=10.0), []),
        (AlarmConfig(kl_budget=10.0, window=2), lines(kl=10.1), ["kl_budget"]),
        (AlarmConfig(window=2), lines(kl=1e6), []),  # without a budget KL may be anything
        (AlarmConfig(window=2), lines(distinct_2=0.41), []),  # 0.8 halved is 0.4
        (AlarmConfig(window=2), lines(distinct_2=0.39), ["distinct_2_drop"]),
        (AlarmConfig(window=2, distinct_2_drop=0.0), lines(distinct_2=0.0), []),
        (AlarmConfig(window=2), lines(separators=0.11), []),
        (AlarmConfig(window=2), lines(separators=0.09), ["separator_drop"]),
        (AlarmConfig(window=2), lines(length=300.0), []),  # not watched by default
        (AlarmConfig(window=2, length_drift=0.5), lines(length=44.9), []),  # 30 ± 15
        (AlarmConfig(window=2, length_drift=0.5), lines(length=45.1), ["length_drift"]),
        (AlarmConfig(window=2, length_drift=0.5), lines(length=14.9), ["length_drift"]),
        (AlarmConfig(window=2, kl_budget=1.5), lines(kl=2.0, distinct_2=0.1), ["kl_budget", "distinct_2_drop"]),
    ],
)
def test_what_goes_off(settings: AlarmConfig, after: dict[str, float], expected: list[str]) -> None:
    found = find_alarms(watched(settings.window, before=lines(), after=after), settings, "ppo")
    assert list(found) == expected
    assert all(f"ppo.alarms.{name}" in what for name, what in found.items()), "each names its option"
