"""Some responses of an iteration as one micro-batch of tensors.

Shapes: R responses, T tokens of the longest response; b rows of a micro-batch, S positions, N response tokens in it.
A position reads the token that stands at it and predicts the next one, so the first response token is predicted at the
prompt's last position, and the last response token is predicted but never read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlhf_cli.data.collate import IGNORED
from rlhf_cli.data.plan import plan_step


class ResponseBatch(NamedTuple):
    """input_ids, position_ids, targets (b, S) int64, right padded, without attention mask as data.collate.Batch.

    targets: the response token that a position predicts, IGNORED where it predicts none that counts. response_rows,
    response_columns (N,) int64: where in (R, T) each target belongs, in the order of the targets, row by row.
    """

    input_ids: Tensor
    position_ids: Tensor
    targets: Tensor
    response_rows: Tensor
    response_columns: Tensor

    def to(self, device: torch.device) -> ResponseBatch:
        """With everything that a model reads on `device`; the last two stay where (R, T) is, on the CPU."""
        input_ids, position_ids, targets = (t.to(device, non_blocking=True) for t in self[:3])
        return ResponseBatch(input_ids, position_ids, targets, self.response_rows, self.response_columns)

    def at(self, tokens: Tensor) -> Tensor:
        """tokens (R, T) -> (N,): those of this batch, on the device of its targets."""
        return tokens[self.response_rows, self.response_columns].to(self.targets.device, non_blocking=True)


def collate_responses(
    prompts: Sequence[np.ndarray],
    responses: Sequence[np.ndarray],
    rows: Sequence[int],
    pad_id: int,
    keep_mask: Tensor | None = None,
) -> ResponseBatch:
    """Responses `rows` behind their prompts. keep_mask (R, T): tokens that count; None = all.

    No row (a rank has to take part all the same) gives one padding token that predicts nothing: b = S = 1, N = 0.
    """
    width = max((len(prompts[i]) + len(responses[i]) - 1 for i in rows), default=1)
    input_ids = np.full((max(1, len(rows)), width), pad_id, np.int64)
    targets = np.full_like(input_ids, IGNORED)
    columns = np.full_like(input_ids, -1)
    for line, i in enumerate(rows):
        prompt, response = prompts[i], responses[i]
        assert len(prompt) > 0, "something has to predict the first token"
        assert len(response) > 0, "a response has an end at least"
        first = len(prompt) - 1  # the position that predicts the first response token
        span = slice(first, first + len(response))
        input_ids[line, : span.stop] = np.concatenate([prompt, response[:-1]])
        kept = np.ones(len(response), bool) if keep_mask is None else keep_mask[i, : len(response)].numpy()
        targets[line, span] = np.where(kept, response, IGNORED)
        columns[line, span] = np.where(kept, np.arange(len(response)), -1)
    lines, positions = np.nonzero(columns >= 0)
    position_ids = np.broadcast_to(np.arange(width), input_ids.shape).copy()
    response_rows = np.asarray(rows, np.int64)[lines] if len(rows) else lines
    return ResponseBatch(
        *map(torch.from_numpy, (input_ids, position_ids, targets, response_rows, columns[lines, positions]))
    )


def share_of_rank(
    prompts: Sequence[np.ndarray],
    responses: Sequence[np.ndarray],
    rows: np.ndarray,
    micro_batch_size: int,
    rank: int,
    world_size: int,
) -> list[list[int]]:
    """The micro-batches of `rows` (B,) that a rank forwards, as row numbers: of similar length, equally many on every
    rank, some may be empty."""
    lengths = np.array([len(prompts[i]) + len(responses[i]) - 1 for i in rows])
    micro_batches = plan_step(rows, lengths, world_size, micro_batch_size).ranks[rank]
    return [[row for bin in micro_batch for row in bin] for micro_batch in micro_batches]
