"""Language-model loss on pretraining text beside the policy's (PPO-ptx, InstructGPT arXiv 2203.02155, eq. 2)."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_cli.data.collate import collate
from rlhf_cli.data.plan import Course, plan_step
from rlhf_cli.data.token_rows import TokenRows
from rlhf_cli.runtime.engine import Engine
from rlhf_cli.schema import PtxConfig


class PtxTerm:
    """coef x the loss of some rows of text, which are a function of (seed, step)."""

    def __init__(self, rows: TokenRows, settings: PtxConfig, seed: int, flatten: bool = False):
        """flatten: packed rows in one line, for attention kernels that know document bounds (data.collate)."""
        self.rows, self.settings, self.flatten = rows, settings, flatten
        self.course = Course(len(rows), rows.repeats, settings.batch_size, seed)

    def backward(self, engine: Engine, step: int, micro_batch_size: int, pad_id: int) -> Tensor:
        """Add the gradient of coef x loss of step `step` (0 is the first) to the engine's, on every rank.

        Returns this rank's share of the loss without coef, a scalar: summed over ranks, the mean over all trained
        tokens of the step (token_mean), or over its rows of the sum of their token losses (row_mean).
        """
        data, ranks, packed = self.settings.data, engine.ranks, self.settings.data.packing
        rows = self.course.rows(step)
        by_tokens = self.settings.reduction == "token_mean"
        normaliser = max(1, self.rows.num_trained(rows)) if by_tokens else len(rows)
        plan = plan_step(
            rows, self.rows.lengths[rows], ranks.world_size, micro_batch_size, data.max_length if packed else None
        )
        total = torch.zeros((), device=ranks.device, dtype=torch.float64)
        for micro_batch in plan.ranks[ranks.rank]:
            batch = collate(self.rows, micro_batch, pad_id, packed=packed, flatten=self.flatten)
            loss = engine.forward(
                input_ids=batch.input_ids.to(ranks.device, non_blocking=True),
                position_ids=batch.position_ids.to(ranks.device, non_blocking=True),
                targets=batch.targets.to(ranks.device, non_blocking=True),
            ).loss_sum
            engine.backward(loss * (self.settings.coef / normaliser))
            total += loss.detach().double() / normaliser
        return total
