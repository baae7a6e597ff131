"""Resumable state of a PPO run: both optimizers, the average of the weights, and the loop's own state."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from rlhf_cli.ppo.models import Models
from rlhf_cli.ppo.state import PpoState
from rlhf_cli.run import Run, check_best, newest_checkpoint, prune_best, saved_loop
from rlhf_cli.runtime import checkpoint


class Found(NamedTuple):
    """A checkpoint to continue from, and the loop state in it."""

    path: Path
    state: PpoState


def newest(run: Run) -> Found | None:
    """The newest undamaged checkpoint, the same answer on every rank."""
    path = newest_checkpoint(run)
    if path is None:
        return None
    state = PpoState(**saved_loop(path))
    check_best(run.run_dir, path, state.best_step)
    return Found(path, state)


def save(models: Models, state: PpoState, run: Run) -> None:
    """Write checkpoints/step_<iteration>; all ranks call it."""
    pieces = models.pieces()
    writers: dict[str, Callable[[Path], None]] = {name: piece.write for name, piece in pieces.items()}
    needed = sum(piece.num_bytes for piece in pieces.values())
    keep = run.config.train.keep_checkpoints
    checkpoint.save(run.run_dir, state.iteration, run.ranks, writers, state.as_dict(), keep, needed)
    if run.ranks.is_main:
        prune_best(run.run_dir)


def load(path: Path, models: Models, run: Run) -> None:
    """Put optimizers and averages back."""
    readers = {name: piece.read for name, piece in models.pieces().items()}
    checkpoint.load(path, readers, run.ranks, run.config.train.seed)
    run.say(f"resumed from {path.name}")
