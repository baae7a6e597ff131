"""Log-probabilities and values of response tokens: shared out over the ranks, gathered on all of them.

Shapes: R responses, T tokens of the longest; see align.batch. The micro-batches depend on lengths, their size and the
number of ranks only. So policy and reference go through the very same ones, and equal weights give equal bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf_cli.align.batch import ResponseBatch, collate_responses, share_of_rank
from rlhf_cli.data.collate import IGNORED
from rlhf_cli.runtime.distributed import Ranks, sum_over_ranks

Call = Callable[..., Any]
"""Engine.forward, or a model with whole weights."""


@torch.no_grad()
def response_logprobs(
    call: Call,
    prompts: Sequence[np.ndarray],
    responses: Sequence[np.ndarray],
    pad_id: int,
    micro_batch_size: int,
    ranks: Ranks,
    *,
    temperature: float,
) -> Tensor:
    """log π(token) under softmax(logits / temperature), (R, T) fp32 on the CPU; 0 behind the end of a response.

    call: a causal LM after enable_loss. prompts[i] (P_i,), responses[i] (T_i,). All ranks call it.
    """

    def logprobs(batch: ResponseBatch) -> Tensor:
        return call(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            targets=batch.targets,
            temperature=temperature,
            logprobs=True,
        ).logprobs

    return _of_tokens(logprobs, prompts, responses, pad_id, micro_batch_size, ranks)


@torch.no_grad()
def response_values(
    call: Call,
    prompts: Sequence[np.ndarray],
    responses: Sequence[np.ndarray],
    pad_id: int,
    micro_batch_size: int,
    ranks: Ranks,
) -> Tensor:
    """The critic's value before each response token is written, (R, T) fp32 on the CPU; 0 behind the end.

    call: a sequence classifier of one score after enable_scores. All ranks call it.
    """
    return _of_tokens(lambda batch: token_values(call, batch), prompts, responses, pad_id, micro_batch_size, ranks)


def token_values(call: Call, batch: ResponseBatch) -> Tensor:
    """(N,) fp32: the value at the position that predicts each target of the batch."""
    rows, positions = (batch.targets != IGNORED).nonzero(as_tuple=True)
    values = call(input_ids=batch.input_ids, position_ids=batch.position_ids, rows=rows, last=positions)
    assert values.shape[1] == 1, f"a critic has one score, this model {values.shape[1]}"
    return values[:, 0]


def _of_tokens(
    compute: Callable[[ResponseBatch], Tensor],
    prompts: Sequence[np.ndarray],
    responses: Sequence[np.ndarray],
    pad_id: int,
    micro_batch_size: int,
    ranks: Ranks,
) -> Tensor:
    """(R, T) of what `compute` gives for the targets (N,) of each micro-batch."""
    rows = np.arange(len(responses))
    found = torch.zeros(len(responses), max(len(r) for r in responses), dtype=torch.float32)
    for micro_batch in share_of_rank(prompts, responses, rows, micro_batch_size, ranks.rank, ranks.world_size):
        batch = collate_responses(prompts, responses, micro_batch, pad_id).to(ranks.device)
        found[batch.response_rows, batch.response_columns] = compute(batch).float().cpu()
    # Every token is some rank's own and zero on the others, so the sum is exact.
    return sum_over_ranks(found.to(ranks.device)).cpu()
