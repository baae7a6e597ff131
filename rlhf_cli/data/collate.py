"""Token sequences -> one micro-batch of tensors.

B rows of the batch, T positions. Position t predicts the token at t + 1, so targets[t] is input_ids[t + 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch

IGNORED = -100  # torch's default ignore_index


class SequenceSource(Protocol):
    """Anything that gives a sequence by number: (input_ids (T,), trained (T,) bool)."""

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]: ...


class Batch(NamedTuple):
    """input_ids, position_ids, targets (B, T) int64; targets are shifted, IGNORED where nothing is learned.

    There is no attention mask. Padding stands behind the tokens, where causal attention never looks, and without a mask
    the kernels that need none can run. In packed batches position_ids that start again at 0 part the documents
    (transformers keeps attention inside them with use_cache=False and no mask). num_targets: targets that count, in the
    whole batch.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    targets: torch.Tensor
    num_targets: int


def collate(
    source: SequenceSource,
    micro_batch: Sequence[Sequence[int]],
    pad_id: int,
    *,
    packed: bool = False,
    flatten: bool = False,
) -> Batch:
    """One micro-batch. packed: the rows of a bin stand one after the other, the padding behind is one more document.
    flatten: all bins in one row (1, T), for attention kernels that know document bounds.

    An empty micro-batch (its rank has to take part all the same) gives one padding token that counts nothing.
    """
    assert packed or all(len(rows) == 1 for rows in micro_batch), "several rows in a bin need packed=True"
    assert packed or not flatten, "flatten needs packed=True"
    bins = [list(rows) for rows in micro_batch]
    if flatten:
        bins = [[row for rows in bins for row in rows]]
    if not any(bins):
        return _empty(pad_id)
    lines = [[source.row(index) for index in rows] for rows in bins]
    lengths = [sum(len(ids) for ids, _ in line) for line in lines]
    shape = (len(lines), max(lengths))
    input_ids = np.full(shape, pad_id, np.int64)
    position_ids = np.zeros(shape, np.int64)
    targets = np.full(shape, IGNORED, np.int64)
    for i, line in enumerate(lines):
        start = 0
        for ids, trained in line:
            end = start + len(ids)
            input_ids[i, start:end] = ids
            position_ids[i, start:end] = np.arange(len(ids))
            # The last token of a document predicts nothing: the next one belongs to another document.
            targets[i, start : end - 1] = np.where(trained[1:], ids[1:], IGNORED)
            start = end
        position_ids[i, start:] = np.arange(shape[1] - start)
    if not packed:
        position_ids[:] = np.arange(shape[1])
    num_targets = int((targets != IGNORED).sum())
    tensor = torch.from_numpy
    return Batch(tensor(input_ids), tensor(position_ids), tensor(targets), num_targets)


def _empty(pad_id: int) -> Batch:
    one = torch.ones(1, 1, dtype=torch.int64)
    return Batch(one * pad_id, one * 0, one * IGNORED, 0)
