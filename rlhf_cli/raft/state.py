"""Everything of a RAFT run that a checkpoint keeps beside weights and optimizer state."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rlhf_cli.align.state import AlignState
from rlhf_cli.loop import LoopState


@dataclass
class Tuning:
    """A fine-tuning that was interrupted. loop: where it is; losses, grad_norms: of its steps so far."""

    loop: dict[str, Any]
    losses: list[float]
    grad_norms: list[float]

    @property
    def loop_state(self) -> LoopState:
        """As loop.train takes it."""
        return LoopState(**self.loop)


@dataclass
class RaftState(AlignState):
    """tuning: of the iteration that was interrupted while it learnt, as a dict; its responses are in samples/."""

    tuning: dict[str, Any] | None = None

    @property
    def number(self) -> int:
        """Optimizer steps."""
        return self.steps + (self.tuning["loop"]["step"] if self.tuning is not None else 0)

    @property
    def unfinished(self) -> Tuning | None:
        """The interrupted fine-tuning."""
        return None if self.tuning is None else Tuning(**self.tuning)

    def interrupt(self, tuning: Tuning) -> None:
        """Note where the fine-tuning is."""
        self.tuning = asdict(tuning)
