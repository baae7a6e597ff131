"""Token sequences -> one micro-batch of tensors.

B rows of the batch, T positions. Position t predicts the token at t + 1, so targets[t] is input_ids[t + 1].
Comparisons: n groups of together N sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch

from rlhf_cli.data.comparison_rows import ComparisonRows

PADDING = -1  # segment of a token that belongs to nothing (models.prompt_sharing)
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


class ComparisonBatch(NamedTuple):
    """input_ids, position_ids (N, T) int64, right padded, without attention mask as in Batch; last (N,) int64: position
    of each sequence's last token, where its score is read.

    ranks (N,) float64, prompt_ids (N,) int64: number of the group in this batch; the sequences of a group stand next to
    each other, those of a pair chosen first. margins (n,) float64, labels (n,) int64. num_groups: n.

    A batch without groups still has one row, of one padding token: N = 1 for input_ids, position_ids and last, but
    ranks and prompt_ids are empty. So scores[: len(ranks)] are the scores that count, in every batch.

    rows (N,), segments (R, T): None, or R rows that hold a group each, its common start once: the row of each sequence,
    and to which sequence a token belongs (0 = to all, 1 = to the first of its group ..., -1 = padding). input_ids and
    position_ids are (R, T) then, and `last` counts within the row.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    last: torch.Tensor
    ranks: torch.Tensor
    prompt_ids: torch.Tensor
    margins: torch.Tensor
    labels: torch.Tensor
    num_groups: int
    rows: torch.Tensor | None = None
    segments: torch.Tensor | None = None


def collate_sharing(rows: ComparisonRows, groups: Sequence[int], pad_id: int) -> ComparisonBatch:
    """As collate_comparisons, with one row per group that holds what all its sequences begin with only once."""
    shape = (max(1, len(groups)), int(rows.shared_lengths[np.array(groups, np.int64)].max(initial=1)))
    input_ids, position_ids = np.full(shape, pad_id, np.int64), np.zeros(shape, np.int64)
    segments = np.full(shape, PADDING, np.int64)
    last, row_of = [], []
    for row, group in enumerate(groups):
        end = common = int(rows.common_starts[group])
        for number, sequence in enumerate(rows.sequences(group), start=1):
            ids = rows.ids(sequence)
            start, end = end, end + len(ids) - common
            input_ids[row, :common], input_ids[row, start:end] = ids[:common], ids[common:]
            position_ids[row, :common], position_ids[row, start:end] = np.arange(common), np.arange(common, len(ids))
            segments[row, :common], segments[row, start:end] = 0, number
            last.append(end - 1 if end > start else common - 1)
            row_of.append(row)
    apart = _told(rows, groups)
    tensor = torch.from_numpy
    return ComparisonBatch(
        tensor(input_ids), tensor(position_ids), tensor(np.array(last or [0], np.int64)), *apart,
        rows=tensor(np.array(row_of or [0], np.int64)), segments=tensor(segments),
    )  # fmt: skip


def collate_comparisons(rows: ComparisonRows, groups: Sequence[int], pad_id: int) -> ComparisonBatch:
    """All sequences of these groups in one batch, in their order."""
    sequences = [sequence for group in groups for sequence in rows.sequences(group)]
    lines = [rows.ids(sequence) for sequence in sequences] or [np.array([pad_id])]
    shape = (len(lines), max(map(len, lines)))
    input_ids = np.full(shape, pad_id, np.int64)
    for i, ids in enumerate(lines):
        input_ids[i, : len(ids)] = ids
    position_ids = np.broadcast_to(np.arange(shape[1]), shape).copy()
    last = np.array([len(ids) - 1 for ids in lines], np.int64)
    tensor = torch.from_numpy
    return ComparisonBatch(tensor(input_ids), tensor(position_ids), tensor(last), *_told(rows, groups))


def _told(
    rows: ComparisonRows, groups: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """ranks, prompt_ids, margins, labels, num_groups of a ComparisonBatch."""
    chosen = np.array(groups, np.int64)
    sequences = np.array([sequence for group in groups for sequence in rows.sequences(group)], np.int64)
    prompt_ids = np.repeat(np.arange(len(groups)), rows.counts[chosen])
    arrays = (rows.ranks[sequences], prompt_ids, rows.margins[chosen], rows.labels[chosen])
    ranks, prompts, margins, labels = (torch.from_numpy(array) for array in arrays)
    return ranks, prompts, margins, labels, len(groups)


def _empty(pad_id: int) -> Batch:
    one = torch.ones(1, 1, dtype=torch.int64)
    return Batch(one * pad_id, one * 0, one * IGNORED, 0)
