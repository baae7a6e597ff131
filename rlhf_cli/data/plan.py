"""Which rows make which step, and how a step's rows are spread over ranks and micro-batches. Pure functions of numbers.

A micro-batch is a list of bins, a bin a list of rows: one row without packing, several with it.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left, insort
from collections.abc import Iterator
from itertools import accumulate
from typing import NamedTuple

import numpy as np

Bin = list[int]
MicroBatch = list[Bin]
Run = tuple[int, int]  # items start to end - 1 of a sorted list
WINDOW_MICRO_BATCHES = 16


class Position(NamedTuple):
    """epoch, and the slice of that epoch's order that a step takes."""

    epoch: int
    rows: slice


class StepPlan(NamedTuple):
    """ranks[r] = the micro-batches of rank r; every rank has equally many, some may be empty."""

    ranks: list[list[MicroBatch]]


def epoch_rows(num_rows: int, repeats: np.ndarray | None) -> int:
    """Rows that an epoch sees, repeats counted."""
    return num_rows if repeats is None else int(repeats.sum())


def epoch_order(num_rows: int, repeats: np.ndarray | None, seed: int, epoch: int) -> np.ndarray:
    """Row numbers of one epoch in their order, (rows,) int64; depends on the data, the seed and the epoch only.

    repeats (num_rows,): how often each row is seen, None = once.
    """
    rows = np.arange(num_rows) if repeats is None else np.repeat(np.arange(num_rows), repeats)
    return np.random.default_rng([seed, epoch]).permutation(rows)


def steps_per_epoch(rows: int, global_batch_size: int) -> int:
    """The last, smaller batch counts too."""
    return math.ceil(rows / global_batch_size)


def num_steps(rows: int, global_batch_size: int, epochs: float, max_steps: int | None) -> int:
    """Optimizer steps of a run, at least one. rows: of one epoch. max_steps overrides epochs: the data repeats."""
    if max_steps is not None:
        return max_steps
    # rounded first: 0.1 x 30 is a little more than 3
    return max(1, math.ceil(round(epochs * steps_per_epoch(rows, global_batch_size), 6)))


def locate(step: int, rows: int, global_batch_size: int) -> Position:
    """Where in the data step `step` (from 0) is, so that a resumed run needs nothing but its step."""
    epoch, batch = divmod(step, steps_per_epoch(rows, global_batch_size))
    start = batch * global_batch_size
    return Position(epoch, slice(start, min(start + global_batch_size, rows)))


class Course:
    """The rows that each step of a training takes. Steps may be asked for in any order."""

    def __init__(self, num_rows: int, repeats: np.ndarray | None, global_batch_size: int, seed: int):
        self.num_rows, self.repeats = num_rows, repeats
        self.global_batch_size, self.seed = global_batch_size, seed
        self.per_epoch = epoch_rows(num_rows, repeats)
        self._order: tuple[int, np.ndarray] = (-1, np.zeros(0, np.int64))  # of the epoch that was asked for last

    def epoch(self, step: int) -> float:
        """Passes over the data after `step` steps."""
        return step / steps_per_epoch(self.per_epoch, self.global_batch_size)

    def rows(self, step: int) -> np.ndarray:
        """Rows (B,) of the global batch of step `step`, 0 is the first."""
        position = locate(step, self.per_epoch, self.global_batch_size)
        if self._order[0] != position.epoch:
            self._order = position.epoch, epoch_order(self.num_rows, self.repeats, self.seed, position.epoch)
        return self._order[1][position.rows]


def windows(num_rows: int, micro_batch_size: int, world_size: int) -> Iterator[np.ndarray]:
    """All rows in file order, as many at a time that sorting them by length saves padding."""
    size = micro_batch_size * world_size * WINDOW_MICRO_BATCHES
    for start in range(0, num_rows, size):
        yield np.arange(start, min(start + size, num_rows))


def plan_step(
    rows: np.ndarray, lengths: np.ndarray, world_size: int, micro_batch_size: int, pack_length: int | None = None
) -> StepPlan:
    """Spread one global batch over ranks and micro-batches: each row once, equal work for the ranks.

    There are as many micro-batches as runs of micro_batch_size bins would make, but they are cut by what they cost:
    those of long rows hold fewer bins and those of short rows more, so that none costs more than an even cut's largest.

    rows (B,): row numbers; lengths (B,): their tokens. pack_length: capacity of a bin, None = one row each.
    """
    if pack_length is None:
        bins = [[int(i)] for i in np.argsort(-lengths, kind="stable")]
    else:
        bins = _pack(lengths, pack_length, world_size)
        bins.sort(key=lambda b: -int(lengths[b].sum()))
    per_rank = max(1, math.ceil(len(bins) / (micro_batch_size * world_size)))
    runs = _deal([int(lengths[b].sum()) for b in bins], [1] * len(bins), per_rank, world_size)
    return StepPlan([[[[int(rows[i]) for i in b] for b in bins[start:end]] for start, end in rank] for rank in runs])


def plan_groups(
    groups: np.ndarray,
    counts: np.ndarray,
    longest: np.ndarray,
    world_size: int,
    micro_batch_size: int,
    sequences_per_row: int,
    shared_lengths: np.ndarray | None = None,
) -> list[list[list[int]]]:
    """As plan_step, for rows that are groups of sequences which stay together: [rank][micro-batch] = group numbers.

    A micro-batch holds micro_batch_size * sequences_per_row sequences on average, so that a ranking of nine answers
    counts for what it costs; there are never more micro-batches than it takes to give each group its own.

    groups (B,): group numbers; counts (B,): their sequences; longest (B,): tokens of their longest sequence.
    shared_lengths (B,): tokens of each group where a group is one row that holds its prompt once.
    """
    sizes, widths = (longest, counts) if shared_lengths is None else (shared_lengths, np.ones_like(counts))
    order = np.argsort(-sizes, kind="stable")
    fits = math.ceil(int(counts.sum()) / (sequences_per_row * micro_batch_size * world_size))
    per_rank = max(1, min(fits, math.ceil(len(groups) / world_size)))
    runs = _deal(sizes[order].tolist(), widths[order].tolist(), per_rank, world_size)
    return [[groups[order[start:end]].tolist() for start, end in rank] for rank in runs]


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> list[Bin]:
    """Longest first, each into the fullest bin that still holds it (at most 11/9 of the fewest + 1: Johnson 1973)."""
    bins: list[Bin] = []
    room: list[tuple[int, int]] = []  # (tokens left, bin), ascending
    for i in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[i])
        assert length <= capacity, f"row of {length} tokens in bins of {capacity}"
        at = bisect_left(room, (length, -1))
        if at < len(room):
            left, number = room.pop(at)
        else:
            left, number = capacity, len(bins)
            bins.append([])
        bins[number].append(i)
        insort(room, (left - length, number))
    return bins


def _pack(lengths: np.ndarray, capacity: int, world_size: int) -> list[Bin]:
    """As few bins as best-fit-decreasing finds; where these cannot be dealt out evenly, the next number that can,
    equally full: a rank without a bin would only wait."""
    bins = best_fit_decreasing(lengths, capacity)
    even = math.ceil(len(bins) / world_size) * world_size
    if even == len(bins) or even > len(lengths):
        return bins
    return _spread(lengths, capacity, even) or bins


def _spread(lengths: np.ndarray, capacity: int, num_bins: int) -> list[Bin] | None:
    """Longest first, each into the emptiest bin; None if one overflows."""
    bins: list[Bin] = [[] for _ in range(num_bins)]
    loads = [(0, number) for number in range(num_bins)]
    for i in np.argsort(-lengths, kind="stable").tolist():
        load, number = heapq.heappop(loads)
        if load + int(lengths[i]) > capacity:
            return None
        bins[number].append(i)
        heapq.heappush(loads, (load + int(lengths[i]), number))
    return bins


def _deal(sizes: list[int], counts: list[int], per_rank: int, world_size: int) -> list[list[Run]]:
    """Items of descending size, each of `counts` sequences, as `per_rank` runs for each rank, of equal work."""
    runs = _cut(sizes, counts, per_rank * world_size)
    costs = [sum(counts[start:end]) * sizes[start] if end > start else 0 for start, end in runs]
    ranks: list[list[Run]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    for first in range(0, len(runs), world_size):
        # Neighbours in size run at the same time (ranks wait for each other); the largest goes to the least loaded.
        group = sorted(range(first, first + world_size), key=lambda m: -costs[m])
        for m, rank in zip(group, sorted(range(world_size), key=lambda r: (loads[r], r)), strict=True):
            ranks[rank].append(runs[m])
            loads[rank] += costs[m]
    return ranks


def _cut(sizes: list[int], counts: list[int], parts: int) -> list[Run]:
    """`parts` runs of items of descending size whose padded cost, sequences x largest, has the lowest maximum."""
    num_items = len(sizes)
    if num_items <= parts:
        return [(min(i, num_items), min(i + 1, num_items)) for i in range(parts)]
    before = [0, *accumulate(counts)]  # sequences in front of each item
    low = max(size * count for size, count in zip(sizes, counts, strict=True))
    high = before[-1] * sizes[0]
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(_runs(sizes, before, middle)) <= parts else (middle + 1, high)
    runs = _runs(sizes, before, low)
    while len(runs) < parts:
        start, end = max(
            (r for r in runs if r[1] - r[0] > 1), key=lambda r: (before[r[1]] - before[r[0]]) * sizes[r[0]]
        )
        runs.remove((start, end))
        runs += [(start, (start + end) // 2), ((start + end) // 2, end)]
    return sorted(runs)


def _runs(sizes: list[int], before: list[int], most: int) -> list[Run]:
    """Greedy runs of descending sizes, each with a padded cost of at most `most`."""
    runs, start = [], 0
    for i in range(1, len(sizes) + 1):
        if i == len(sizes) or (before[i + 1] - before[start]) * sizes[start] > most:
            runs.append((start, i))
            start = i
    return runs
