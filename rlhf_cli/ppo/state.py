"""Everything of a PPO run that a checkpoint keeps beside weights and optimizer state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rlhf_cli.align.state import AlignState


@dataclass
class PpoState(AlignState):
    """kl_coef: of the next iteration. moments: of the rewards so far, where they are running."""

    kl_coef: float = 0.0
    moments: dict[str, Any] | None = None
