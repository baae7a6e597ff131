"""Figures of an iteration that do not depend on how the policy learns."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from rlhf_cli.align.alarms import DISTINCT_2, KL, LENGTH, SEPARATORS
from rlhf_cli.align.collect import Judged
from rlhf_cli.ops.diversity import distinct_n, expectation_adjusted_distinct, repetition, separator_ratio
from rlhf_cli.rollout.pieces import token_pieces
from rlhf_cli.rollout.sampler import Response


def reward_figures(judged: Judged) -> dict[str, float]:
    """Means of each source and hit rates of each rule."""
    figures = {f"reward/{name}": values.mean().item() for name, values in judged.by_source.items()}
    return figures | {f"rules/{name}": hit.double().mean().item() for name, hit in judged.rules.hits.items()}


def text_figures(responses: Sequence[Response], tokenizer: Any, vocab_size: int) -> dict[str, float]:
    """text/...: length in tokens, how responses end, diversity, separators, repetition; ends are not counted."""
    tokens = [r.token_ids[: r.num_text_tokens].tolist() for r in responses]
    pieces = [piece.decode(errors="replace") for piece in token_pieces(tokenizer, vocab_size)]
    count = len(responses)
    return {
        "text/length": sum(len(r.token_ids) for r in responses) / count,
        "val/num_eos_tokens": float(sum(r.ending == "eos" for r in responses)),
        "text/eos_rate": sum(r.ending == "eos" for r in responses) / count,
        "text/stop_rate": sum(r.ending == "stop" for r in responses) / count,
        "text/distinct_1": distinct_n(tokens, 1),
        "text/distinct_2": distinct_n(tokens, 2),
        "text/adjusted_distinct_1": expectation_adjusted_distinct(tokens, 1, vocab_size),
        "text/separator_ratio": separator_ratio([[pieces[t] for t in row] for row in tokens]),
        "text/repetition": repetition(tokens),
    }


def watched_figures(kl: float, text: dict[str, float]) -> dict[str, float]:
    """What alarms look at. text: of text_figures."""
    return {
        KL: kl,
        DISTINCT_2: text["text/distinct_2"],
        SEPARATORS: text["text/separator_ratio"],
        LENGTH: text["text/length"],
    }


class Clock:
    """Seconds of each phase of an iteration."""

    def __init__(self) -> None:
        self._last, self.seconds = time.monotonic(), {"generate": 0.0, "score": 0.0, "train": 0.0}

    def lap(self, phase: str) -> None:
        """What has passed since the last lap was this."""
        now = time.monotonic()
        self.seconds[phase] += now - self._last
        self._last = now

    @property
    def total(self) -> float:
        """Of all phases."""
        return sum(self.seconds.values())

    def figures(self, samples: float, tokens: float, work: float) -> dict[str, float]:
        """perf/...; samples, tokens: those written; work: the ideal seconds of this iteration; nan makes
        nan of the speeds."""
        total = max(self.total, 1e-9)
        return {
            "perf/samples_per_s": samples / total,
            "perf/tokens_per_s": tokens / total,
            "perf/rollout_tokens_per_s": tokens / max(self.seconds["generate"], 1e-9),
            **{f"perf/{name}_s": seconds for name, seconds in self.seconds.items()},
            "perf/mfu": work / total,
        }


def shares(line: dict[str, Any]) -> str:
    """Of an iteration's time, for the bar."""
    seconds = [line[f"perf/{phase}_s"] for phase in ("generate", "score", "train")]
    total = sum(seconds) or 1.0
    return "/".join(f"{100 * part / total:.0f}" for part in seconds) + " %"
