"""Resumable state of a PPO run: both optimizers, the average of the weights, and the loop's own state."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_cli.ppo.models import Models
from rlhf_cli.ppo.state import PpoState
from rlhf_cli.run import Run, prune_best
from rlhf_cli.runtime import checkpoint
from rlhf_cli.runtime.distributed import broadcast_object


class Found(NamedTuple):
    """A checkpoint to continue from, and the loop state in it."""

    path: Path
    state: PpoState


def newest(run: Run) -> Found | None:
    """The newest undamaged checkpoint, the same answer on every rank."""
    path = broadcast_object(checkpoint.newest_valid(run.run_dir, run.say) if run.ranks.is_main else None)
    if path is None:
        return None
    saved: dict[str, Any] = json.loads((path / checkpoint.LOOP_STATE).read_text(encoding="utf-8"))["loop"]
    return Found(path, PpoState(**saved))


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
