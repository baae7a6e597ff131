"""What a checkpoint keeps of a run that aligns a policy, beside weights and optimizer state."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class AlignState:
    """After `iteration` whole iterations. AlignState(**d) brings back what as_dict made; so do the stages' own.

    steps: optimizer steps; cursor: prompts handed out; episodes: responses written; tokens: of these. watched: the
    figures that alarms look at, by iteration: the first ones of the run and the newest. raised: alarms that have gone
    off. halted: one of them ended the run. line: figures of the last iteration that still wait for its evaluation.
    best_step: the iteration with the highest eval_reward.
    """

    data_digest: str
    iteration: int = 0
    steps: int = 0
    cursor: int = 0
    episodes: int = 0
    tokens: int = 0
    seconds: float = 0.0
    watched: list[dict[str, float]] = field(default_factory=list)
    raised: list[str] = field(default_factory=list)
    halted: bool = False
    line: dict[str, Any] | None = None
    evaluated: int = -1
    first_eval: dict[str, float] = field(default_factory=dict)
    last_eval: dict[str, float] = field(default_factory=dict)
    best_eval: dict[str, float] = field(default_factory=dict)
    best_step: int | None = None

    @property
    def number(self) -> int:
        """Under which a checkpoint is kept; it never falls."""
        return self.iteration

    def counters(self, num_prompts: int) -> dict[str, float]:
        """How far the run has come, for every line of metrics.jsonl. num_prompts: that it trains on."""
        return {
            "epoch": round(self.cursor / num_prompts, 6),
            "tokens": self.tokens,
            "num_tokens": self.tokens,
            "samples": self.episodes,
            "seconds": round(self.seconds, 3),
        }

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)
