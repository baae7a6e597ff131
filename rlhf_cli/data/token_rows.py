"""Tokenised sequences as flat arrays, usually memory-mapped files."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from rlhf_cli.data.tokenize import Tokens


@dataclass(frozen=True)
class TokenRows:
    """N sequences, one after the other in flat arrays.

    input_ids (tokens,) int32. trained (tokens,) bool: the loss mask before the shift, never True at the first token of
    a sequence, which nothing predicts. offsets (N + 1,) int64 into both.
    row_digests (N,) uint64: digest of the row's text (windows of one row share it), by which a later stage finds rows
    that an earlier one trained on. repeats (N,) int64: how often an epoch sees each sequence (data.weights).
    """

    input_ids: np.ndarray
    trained: np.ndarray
    offsets: np.ndarray
    row_digests: np.ndarray
    repeats: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def row(self, index: int) -> Tokens:
        """One sequence: input_ids (T,) and trained (T,)."""
        start, end = self.offsets[index], self.offsets[index + 1]
        return Tokens(self.input_ids[start:end], self.trained[start:end])

    def num_trained(self, rows: Iterable[int]) -> int:
        """Trained tokens of these sequences together, which is the number of targets that `collate` makes of them."""
        return sum(int(self.row(index).trained.sum()) for index in rows)

    @cached_property
    def lengths(self) -> np.ndarray:
        """(N,) tokens of each sequence."""
        return np.diff(self.offsets)


def repeats_from_weights(weights: np.ndarray, row_digests: np.ndarray, row_numbers: np.ndarray) -> np.ndarray:
    """How often an epoch sees each sequence, (N,) int64: floor(weight), and once more for a share of the sequences.

    weights (N,): 0.5 = half of the sequences, 1.5 = all and half of them again. Which half is told by a hash of the
    sequence (its row's digest, and its number among the windows of that row), so that no order in the file matters.
    row_numbers (N,): the row each sequence comes from, ascending.
    """
    whole = np.floor(weights).astype(np.int64)
    first_of_row = np.searchsorted(row_numbers, row_numbers, side="left")
    window = (np.arange(len(row_numbers)) - first_of_row).astype(np.uint64)
    share = _mix(row_digests + window * np.uint64(0x9E3779B97F4A7C15)) / 2.0**64
    return whole + (share < weights - whole)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele et al. 2014): every input bit reaches every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
