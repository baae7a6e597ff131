"""Groups of sequences -> micro-batches of ranks, and tensors."""

from __future__ import annotations

import itertools
import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_cli.data.collate import collate_comparisons
from rlhf_cli.data.comparison_rows import ComparisonRows
from rlhf_cli.data.plan import plan_groups, plan_step

GROUPS = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 32)), min_size=1, max_size=40)


def costs(plan: list[list[list[int]]], counts: list[int], longest: list[int]) -> list[list[int]]:
    """Padded tokens of each micro-batch."""
    return [[sum(counts[g] for g in m) * max((longest[g] for g in m), default=0) for m in rank] for rank in plan]


@given(GROUPS, st.integers(1, 5), st.integers(1, 6), st.sampled_from([1, 2]))
@settings(max_examples=300, deadline=None)
def test_a_plan_is_complete(
    groups: list[tuple[int, int]], world_size: int, micro_batch_size: int, sequences_per_row: int
) -> None:
    counts, longest = [c for c, _ in groups], [t for _, t in groups]
    numbers = np.arange(len(groups)) + 100  # group numbers are not positions
    plan = plan_groups(numbers, np.array(counts), np.array(longest), world_size, micro_batch_size, sequences_per_row)
    assert sorted(g for rank in plan for micro in rank for g in micro) == numbers.tolist()
    assert len(plan) == world_size
    (per_rank,) = {len(rank) for rank in plan}
    wanted = math.ceil(sum(counts) / (sequences_per_row * micro_batch_size * world_size))
    assert per_rank == max(1, min(wanted, math.ceil(len(groups) / world_size)))
    if len(groups) >= world_size:
        assert all(any(rank) for rank in plan)


def cheapest_cut(groups: list[tuple[int, int]], parts: int) -> int:
    """The lowest maximum of padded costs over all cuts of the sorted groups."""
    ordered = sorted(groups, key=lambda g: -g[1])
    best = math.inf
    for edges in itertools.combinations(range(1, len(ordered)), parts - 1):
        bounds = [0, *edges, len(ordered)]
        runs = [ordered[a:b] for a, b in itertools.pairwise(bounds)]
        best = min(best, max(sum(c for c, _ in run) * run[0][1] for run in runs))
    return int(best)


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 32)), min_size=2, max_size=9), st.integers(1, 3))
@settings(max_examples=150, deadline=None)
def test_the_cut_is_the_cheapest(groups: list[tuple[int, int]], micro_batch_size: int) -> None:
    counts, longest = [c for c, _ in groups], [t for _, t in groups]
    plan = plan_groups(np.arange(len(groups)), np.array(counts), np.array(longest), 1, micro_batch_size, 2)
    # equal lengths may be cut anywhere, in the order in which they came
    assert max(costs(plan, counts, longest)[0]) == cheapest_cut(groups, len(plan[0]))


def test_a_ranking_counts_for_its_answers_by_hand() -> None:
    # 8 + 2 + 2 + 2 + 2 = 16 sequences of equal length, 2 x 2 to a micro-batch: 4 of them. The ranking stays whole and
    # alone, the pairs share the other three: 8 | 2 2 | 2 | 2
    plan = plan_groups(np.arange(5), np.array([2, 8, 2, 2, 2]), np.full(5, 10), 1, 2, 2)
    assert sorted(map(len, plan[0])) == [1, 1, 1, 2]
    assert [1] in plan[0]
    # lengths 9 10 8 7 6 on two ranks: 8 x 10 alone, and no cut of the rest is needed below its 80, so the pairs are
    # halved where they cost most: 9 | 8 | 7 6. The rank without the ranking takes the larger rest
    plan = plan_groups(np.arange(5), np.array([2, 8, 2, 2, 2]), np.array([9, 10, 8, 7, 6]), 2, 2, 2)
    assert plan == [[[1], [2]], [[0], [3, 4]]]


def test_single_sequences_are_planned_as_rows() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 100, 64)
    rows = plan_step(np.arange(64), lengths, 3, 4)
    groups = plan_groups(np.arange(64), np.ones(64, np.int64), lengths, 3, 4, 1)
    assert [[[[g] for g in micro] for micro in rank] for rank in groups] == rows.ranks


def test_few_groups_leave_empty_micro_batches() -> None:
    assert sorted(plan_groups(np.array([7]), np.array([9]), np.array([3]), 3, 1, 2)) == [[[]], [[]], [[7]]]
    assert plan_groups(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.int64), 2, 1, 2) == [[[]], [[]]]


def ragged() -> ComparisonRows:
    """Groups: 5 6 | 7, a ranking of one token each 8 | 9 | 3, and 4 2 1 with the label 1."""
    return ComparisonRows(
        input_ids=np.array([5, 6, 7, 8, 9, 3, 4, 2, 1], np.int32),
        offsets=np.array([0, 2, 3, 4, 5, 6, 9]),
        groups=np.array([0, 2, 5, 6]),
        ranks=np.array([0, 1, 2, 1.5, 2, 0]),
        margins=np.array([0.5, 0, 0]),
        labels=np.array([-1, -1, 1]),
        sequence_digests=np.zeros(6, np.uint64),
        row_numbers=np.arange(3),
        sources=np.zeros(3, np.int32),
        repeats=np.ones(3, np.int64),
        lines=np.arange(3) + 1,
        paths=("a.jsonl",),
    )


def test_collate_by_hand() -> None:
    batch = collate_comparisons(ragged(), [1, 0], pad_id=77)
    assert batch.input_ids.tolist() == [[8, 77], [9, 77], [3, 77], [5, 6], [7, 77]]
    assert batch.position_ids.tolist() == [[0, 1]] * 5
    assert batch.last.tolist() == [0, 0, 0, 1, 0]
    assert batch.ranks.tolist() == [2, 1.5, 2, 0, 1]
    assert batch.prompt_ids.tolist() == [0, 0, 0, 1, 1]
    assert (batch.margins.tolist(), batch.labels.tolist(), batch.num_groups) == ([0, 0.5], [-1, -1], 2)
    batch = collate_comparisons(ragged(), [2], pad_id=77)
    assert (batch.input_ids.tolist(), batch.last.tolist(), batch.labels.tolist()) == ([[4, 2, 1]], [2], [1])


def test_an_empty_micro_batch_has_a_row_but_no_scores() -> None:
    batch = collate_comparisons(ragged(), [], pad_id=77)
    assert (batch.input_ids.tolist(), batch.position_ids.tolist(), batch.last.tolist()) == ([[77]], [[0]], [0])
    for empty in (batch.ranks, batch.prompt_ids, batch.margins, batch.labels):
        assert len(empty) == 0
    assert batch.num_groups == 0
    assert (str(batch.ranks.dtype), str(batch.prompt_ids.dtype)) == ("torch.float64", "torch.int64")
    assert str(batch.labels.dtype) == "torch.int64"


def test_tokens_of_groups() -> None:
    rows = ragged()
    assert rows.tokens(np.array([0, 2])) == 3 + 3
    assert rows.tokens(np.array([1, 1])) == 6  # a row that is seen twice
    assert rows.longest.tolist() == [2, 1, 3]
    assert rows.first(2).tokens(np.array([0, 1])) == 6
