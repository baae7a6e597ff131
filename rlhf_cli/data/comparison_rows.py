"""Tokenised pairs, rankings and labelled texts as flat arrays, usually memory-mapped files."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from rlhf_cli.data.cache import Columns
from rlhf_cli.data.token_rows import repeats_from_weights

COMPARED_GROUPS = 128  # at a time, so that the arrays of positions stay small


@dataclass(frozen=True)
class ComparisonRows:
    """G groups of S sequences: a pair is a group of 2 (chosen first), a ranking of K, a labelled text of 1.

    input_ids (tokens,) int32; offsets (S + 1,) int64 into it. groups (G + 1,) int64: bounds of each group among the
    sequences. ranks (S,) float64: smaller is better (a pair has 0 and 1). margins (G,) float64: 0 where none was given.
    labels (G,) int64: number of the label, -1 where there is none. sequence_digests (S,) uint64: row_digest of what
    supervised training would have learnt from that text, so that rows which an earlier stage trained on are found.
    row_numbers (G,) int64, ascending: number of the row among those read. sources (G,) int32: which entry of data.path.
    repeats (G,) int64: how often an epoch sees each group (data.weights). lines (G,) int64: where the row stands in its
    file. paths: the entries of data.path (or data.eval_path) that sources numbers.
    """

    input_ids: np.ndarray
    offsets: np.ndarray
    groups: np.ndarray
    ranks: np.ndarray
    margins: np.ndarray
    labels: np.ndarray
    sequence_digests: np.ndarray
    row_numbers: np.ndarray
    sources: np.ndarray
    repeats: np.ndarray
    lines: np.ndarray
    paths: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.groups) - 1

    def sequences(self, group: int) -> range:
        """Numbers of the sequences of a group."""
        return range(int(self.groups[group]), int(self.groups[group + 1]))

    def ids(self, sequence: int) -> np.ndarray:
        """Tokens (T,) of one sequence."""
        found: np.ndarray = self.input_ids[self.offsets[sequence] : self.offsets[sequence + 1]]
        return found

    def first(self, count: int) -> ComparisonRows:
        """The first groups, as rows of their own."""
        end = int(self.groups[min(count, len(self))])
        return ComparisonRows(
            input_ids=self.input_ids,
            offsets=self.offsets[: end + 1],
            groups=self.groups[: count + 1],
            ranks=self.ranks[:end],
            margins=self.margins[:count],
            labels=self.labels[:count],
            sequence_digests=self.sequence_digests[:end],
            row_numbers=self.row_numbers[:count],
            sources=self.sources[:count],
            repeats=self.repeats[:count],
            lines=self.lines[:count],
            paths=self.paths,
        )

    def place(self, group: int) -> dict[str, str | int]:
        """Where a row comes from: an entry of data.path, and the number of its line (or row) in the file."""
        return {"path": self.paths[self.sources[group]], "line": int(self.lines[group])}

    def tokens(self, groups: np.ndarray) -> int:
        """Tokens of these groups together."""
        starts, ends = self.offsets[self.groups[groups]], self.offsets[self.groups[groups + 1]]
        return int((ends - starts).sum())

    @cached_property
    def lengths(self) -> np.ndarray:
        """(S,) tokens of each sequence."""
        return np.diff(self.offsets)

    @cached_property
    def counts(self) -> np.ndarray:
        """(G,) sequences of each group."""
        return np.diff(self.groups)

    @cached_property
    def owners(self) -> np.ndarray:
        """(S,) group of each sequence."""
        return np.repeat(np.arange(len(self)), self.counts)

    @cached_property
    def common_starts(self) -> np.ndarray:
        """(G,) tokens that all sequences of a group begin with: of comparisons their prompt."""
        common = np.minimum.reduceat(self.lengths, self.groups[:-1]) if len(self) else np.zeros(0, np.int64)
        for start in range(0, len(self), COMPARED_GROUPS):
            common[start : start + COMPARED_GROUPS] = self._common(common, start)
        return common

    @cached_property
    def shared_lengths(self) -> np.ndarray:
        """(G,) tokens of each group when its common start is counted once."""
        total = np.add.reduceat(self.lengths, self.groups[:-1]) if len(self) else np.zeros(0, np.int64)
        return total - (self.counts - 1) * self.common_starts

    def _common(self, shortest: np.ndarray, start: int) -> np.ndarray:
        """common_starts of the groups from `start` on, each at most as long as its shortest sequence."""
        end = min(start + COMPARED_GROUPS, len(self))
        sequences = np.arange(self.groups[start], self.groups[end])
        owners = self.owners[sequences]
        widths = shortest[owners]
        ends = np.cumsum(widths)
        within = np.arange(ends[-1]) - np.repeat(ends - widths, widths)  # positions in every sequence's first tokens
        mine, first = (np.repeat(self.offsets[of], widths) + within for of in (sequences, self.groups[owners]))
        same = np.where(self.input_ids[mine] == self.input_ids[first], np.iinfo(np.int64).max, within)
        of_sequences = np.minimum(np.minimum.reduceat(same, ends - widths), widths)
        found: np.ndarray = np.minimum.reduceat(of_sequences, self.groups[start:end] - self.groups[start])
        return found

    @cached_property
    def longest(self) -> np.ndarray:
        """(G,) tokens of the longest sequence of each group."""
        return np.maximum.reduceat(self.lengths, self.groups[:-1]) if len(self) else np.zeros(0, np.int64)


def comparison_rows(
    columns: Columns, start: int, end: int, path_weights: list[float] | None, paths: tuple[str, ...]
) -> ComparisonRows:
    """Groups start to end - 1 of a cached part. path_weights: data.weights, None = each group once."""
    first, last = columns["groups"][start], columns["groups"][end]
    bounds = np.asarray(columns["groups"][start : end + 1]) - first
    digests = columns["sequence_digests"][first:last]
    row_numbers, sources = columns["row_numbers"][start:end], columns["sources"][start:end]
    repeats = np.ones(end - start, np.int64)
    if path_weights is not None and len(repeats):
        of_groups = np.add.reduceat(digests, bounds[:-1])  # wraps around
        repeats = repeats_from_weights(np.array(path_weights)[sources], of_groups, row_numbers)
    return ComparisonRows(
        input_ids=columns["input_ids"],
        offsets=columns["offsets"][first : last + 1],
        groups=bounds,
        ranks=columns["ranks"][first:last],
        margins=columns["margins"][start:end],
        labels=columns["labels"][start:end],
        sequence_digests=digests,
        row_numbers=row_numbers,
        sources=sources,
        repeats=repeats,
        lines=columns["lines"][start:end],
        paths=paths,
    )
