"""`rlhf ppo` in the ranks of a test pool that is asked to stop in a chosen phase of an iteration."""

from __future__ import annotations

from typing import Any
from unittest import mock

from rlhf_cli.align import collect, loop, saving
from rlhf_cli.ppo import iteration as ppo_iteration
from rlhf_cli.runtime import checkpoint
from rlhf_cli.runtime.distributed import Ranks
from rlhf_cli.stages import ppo
from tests.stage_cases import run_ppo
from tests.stop_cases import Killed, watch_of

PLACES = {
    "generate": (collect, "generate"),
    "judge": (collect.Collector, "judge"),
    "measure": (ppo_iteration, "response_logprobs"),
    "update": (ppo_iteration, "update"),
    "evaluate": (loop, "evaluate"),
}


def run_ppo_stopping(ranks: Ranks, run_dir: str, overrides: list[str], phase: str, iteration: int) -> dict[str, float]:
    """Ask for a stop when this phase begins in iteration `iteration` (0 is the first), or its evaluation does."""
    owner, name = PLACES[phase]
    original, done = getattr(owner, name), -1
    draw = ppo_iteration.draw

    def drawing(collector: Any, config: Any, number: int, cursor: int) -> Any:
        nonlocal done
        done = number
        return draw(collector, config, number, cursor)

    def stopping(*args: Any, **kwargs: Any) -> Any:
        if done == iteration or (phase == "evaluate" and done == iteration - 1):
            ask()
        return original(*args, **kwargs)

    with (
        watch_of(ppo) as ask,
        mock.patch.object(ppo_iteration, "draw", drawing),
        mock.patch.object(owner, name, stopping),
    ):
        return run_ppo(ranks, run_dir, overrides)


def run_ppo_without_room(ranks: Ranks, run_dir: str, overrides: list[str]) -> None:
    """Nothing of the final models can be written."""
    with mock.patch.object(saving, "save_model", side_effect=OSError("File too large")):
        run_ppo(ranks, run_dir, overrides)


KILLS = PLACES | {"saving": (checkpoint, "_publish"), "ending": (ppo, "close_run")}


def run_ppo_killed(ranks: Ranks, run_dir: str, overrides: list[str], phase: str, iteration: int) -> None:
    """End in this phase of iteration `iteration` or later; updating: when the weights have changed, saving: when a
    checkpoint is written and has not got its name yet, ending: when all is done but for the manifest's last word."""
    owner, name = KILLS[phase]
    original, draw, done = getattr(owner, name), ppo_iteration.draw, -1

    def drawing(collector: Any, config: Any, number: int, cursor: int) -> Any:
        nonlocal done
        done = number
        return draw(collector, config, number, cursor)

    def killing(*args: Any, **kwargs: Any) -> Any:
        if done < iteration:
            return original(*args, **kwargs)
        if phase == "update":
            original(*args, **kwargs)
        raise Killed

    with mock.patch.object(ppo_iteration, "draw", drawing), mock.patch.object(owner, name, killing):
        try:
            run_ppo(ranks, run_dir, overrides)
        except Killed:
            return
    raise AssertionError(f"the run never came to {phase} in iteration {iteration}")
