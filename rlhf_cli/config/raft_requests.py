"""What can be known to be wrong with `rlhf raft` before any process starts. Standard library only."""

from __future__ import annotations

from collections.abc import Iterator

from rlhf_cli.config.align_requests import check_aligned
from rlhf_cli.errors import Problem
from rlhf_cli.schema import RaftConfig
from rlhf_cli.schema.stages import grad_accum_steps


def check_raft(config: RaftConfig, world_size: int, has_gpu: bool, weights_needed: bool) -> Iterator[Problem]:
    """Batch arithmetic of the fine-tuning, data, every model and how they fit together."""
    steps = grad_accum_steps(config.train.global_batch_size, config.train.micro_batch_size, world_size)
    if isinstance(steps, Problem):
        yield steps
    found, _ = check_aligned(config, has_gpu, weights_needed)
    yield from found
