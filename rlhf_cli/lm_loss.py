"""Token loss of a causal LM on held-out rows: evaluation of sft, alignment tax of ppo and raft."""

from __future__ import annotations

import torch

from rlhf_cli.data import plan
from rlhf_cli.data.collate import collate
from rlhf_cli.data.token_rows import TokenRows
from rlhf_cli.loop import heed_stop
from rlhf_cli.runtime.distributed import Ranks, sum_over_ranks
from rlhf_cli.runtime.engine import Engine
from rlhf_cli.runtime.stop import StopWatch


@torch.no_grad()
def mean_token_loss(
    engine: Engine,
    rows: TokenRows,
    pad_id: int,
    micro_batch_size: int,
    ranks: Ranks,
    watch: StopWatch,
    pack_length: int | None = None,
    flatten: bool = False,
) -> float:
    """Mean loss over all trained tokens of `rows`, the same on every rank. All ranks call it; raises StopAsked.

    pack_length: several rows in one sequence of so many tokens (see collate), None = one row each.
    """
    was_training = engine.module.training
    engine.eval()
    total = torch.zeros((), device=ranks.device, dtype=torch.float64)
    for window in plan.windows(len(rows), micro_batch_size, ranks.world_size):
        heed_stop(watch)
        spread = plan.plan_step(window, rows.lengths[window], ranks.world_size, micro_batch_size, pack_length)
        for micro_batch in spread.ranks[ranks.rank]:
            batch = collate(rows, micro_batch, pad_id, packed=pack_length is not None, flatten=flatten)
            total += engine.forward(
                input_ids=batch.input_ids.to(ranks.device, non_blocking=True),
                position_ids=batch.position_ids.to(ranks.device, non_blocking=True),
                targets=batch.targets.to(ranks.device, non_blocking=True),
            ).loss_sum.double()
    engine.module.train(was_training)
    return sum_over_ranks(total).item() / rows.num_trained(range(len(rows)))
