"""`rlhf sft` in the ranks of a test pool that is asked to stop, or killed, at a chosen moment."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any
from unittest import mock

from rlhf_cli import training
from rlhf_cli.runtime.distributed import Ranks
from rlhf_cli.stages import sft
from tests.stage_cases import run_sft


@contextmanager
def watch_of(stage: ModuleType) -> Iterator[Callable[[], None]]:
    """A call that asks the run which this stage opens inside to stop."""
    watches: list[Any] = []
    open_run = stage.open_run

    def opened(*args: Any) -> Any:
        run = open_run(*args)
        watches.append(run.process.watch)
        return run

    def ask() -> None:
        watches[-1]._requested = signal.SIGTERM

    with mock.patch.object(stage, "open_run", opened):
        yield ask


class Killed(Exception):
    """Stands for SIGKILL: nothing of the run's own comes after it."""


def run_sft_stopping(
    ranks: Ranks, run_dir: str, overrides: list[str], step: int, evaluating: bool = False
) -> dict[str, float]:
    """Ask for a stop while step `step` (1 is the first) is at work, or evaluating: while the evaluation after it is."""
    forward, evaluate = sft.LanguageModelObjective.step_data, sft.LanguageModelObjective.evaluate

    def step_data(self: Any, number: int) -> Any:
        if number == step - 1 and not evaluating:
            ask()
        return forward(self, number)

    def evaluated(self: Any, engine: Any, number: int) -> Any:
        if number == step and evaluating:
            ask()
        return evaluate(self, engine, number)

    with (
        watch_of(sft) as ask,
        mock.patch.object(sft.LanguageModelObjective, "step_data", step_data),
        mock.patch.object(sft.LanguageModelObjective, "evaluate", evaluated),
    ):
        return run_sft(ranks, run_dir, overrides)


def run_sft_killed_at_the_end(ranks: Ranks, run_dir: str, overrides: list[str]) -> None:
    """End between the last write of the stage and the last word in the manifest."""

    def kill(*_: Any, **__: Any) -> None:
        raise Killed

    with mock.patch.object(training, "close_run", kill):
        try:
            run_sft(ranks, run_dir, overrides)
        except Killed:
            return
    raise AssertionError("close_run was not reached")
