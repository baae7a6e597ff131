"""Learning rate by step: a pure function, so that resuming needs no scheduler state."""

from __future__ import annotations

import math

from rlhf_cli.schema import OptimConfig


def warmup_steps(optim: OptimConfig, total_steps: int) -> int:
    """Steps of linear warm-up: warmup_ratio of all steps, but at least min_warmup_steps (Llama 2: 3 %, at least 5)."""
    if optim.warmup_ratio == 0:
        return 0
    return min(total_steps, max(math.ceil(optim.warmup_ratio * total_steps), optim.min_warmup_steps))


def learning_rate(optim: OptimConfig, step: int, total_steps: int) -> float:
    """The rate of optimizer step `step` (0 is the first) out of `total_steps`.

    Warm-up reaches `lr` with its last step. inverse_sqrt is Noam's schedule (Vaswani et al. 1706.03762, eq. 3) with
    its peak set to `lr`.
    """
    warmup = warmup_steps(optim, total_steps)
    if step < warmup:
        return optim.lr * (step + 1) / warmup
    if optim.schedule == "constant":
        return optim.lr
    if optim.schedule == "inverse_sqrt":
        return optim.lr * math.sqrt(max(warmup, 1) / (step + 1))
    done = (step - warmup) / max(1, total_steps - warmup)
    if optim.schedule == "linear":
        share = 1 - done
    else:
        share = (1 + math.cos(math.pi * done)) / 2
    return optim.lr * (optim.last_ratio + (1 - optim.last_ratio) * share)
