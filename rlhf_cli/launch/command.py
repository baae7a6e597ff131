"""What starts the ranks of a job, whichever launcher does it."""

from __future__ import annotations

import signal
from typing import NamedTuple

from rlhf_cli.jobfiles import COUNTED_GPUS_VARIABLE, PLANNED_RANKS_VARIABLE
from rlhf_cli.launch.devices import visible_gpus


class JobCommand(NamedTuple):
    """argv, env: the launcher's command line and what it adds to our environment.

    shares_terminal: ranks are on this machine and rank 0 writes to our terminal; else we copy its messages from a file.
    end_signal: makes the launcher end all ranks on all machines at once.
    notes: what the user should know about how it was put together.
    """

    argv: list[str]
    env: dict[str, str]
    shares_terminal: bool
    end_signal: signal.Signals
    notes: tuple[str, ...] = ()


def told_to_ranks(ranks: int) -> dict[str, str]:
    """Environment in which every rank finds what the front has reckoned with, to compare it with what is there."""
    gpus = visible_gpus()
    return {PLANNED_RANKS_VARIABLE: str(ranks), **({COUNTED_GPUS_VARIABLE: str(gpus)} if gpus else {})}
