"""Resumable state of an aligning run: what its models hold, and the loop's own state."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

from rlhf_cli.align.models import Models
from rlhf_cli.align.state import AlignState
from rlhf_cli.run import Run, check_best, newest_checkpoint, prune_best, saved_loop
from rlhf_cli.runtime import checkpoint

StateT = TypeVar("StateT", bound=AlignState)


class Found(NamedTuple, Generic[StateT]):
    """A checkpoint to continue from, and the loop state in it."""

    path: Path
    state: StateT


def newest(run: Run, state_type: type[StateT]) -> Found[StateT] | None:
    """The newest undamaged checkpoint, the same answer on every rank."""
    path = newest_checkpoint(run)
    if path is None:
        return None
    state = state_type(**saved_loop(path))
    check_best(run.run_dir, path, state.best_step)
    return Found(path, state)


def save(models: Models, state: AlignState, run: Run) -> None:
    """Write checkpoints/step_<state.number>; all ranks call it."""
    pieces = models.pieces()
    writers: dict[str, Callable[[Path], None]] = {name: piece.write for name, piece in pieces.items()}
    needed = sum(piece.num_bytes for piece in pieces.values())
    keep = run.config.train.keep_checkpoints
    checkpoint.save(run.run_dir, state.number, run.ranks, writers, state.as_dict(), keep, needed)
    if run.ranks.is_main:
        prune_best(run.run_dir)


def load(path: Path, models: Models, run: Run) -> None:
    """Put optimizers and averages back."""
    readers = {name: piece.read for name, piece in models.pieces().items()}
    checkpoint.load(path, readers, run.ranks, run.config.train.seed)
    run.say(f"resumed from {path.name}")
