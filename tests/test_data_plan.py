"""Which rows make which step, and how they are spread over ranks."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_cli.data.plan import (
    Course,
    StepPlan,
    best_fit_decreasing,
    epoch_order,
    epoch_rows,
    locate,
    num_steps,
    plan_step,
)

LENGTHS = st.lists(st.integers(1, 32), min_size=1, max_size=40)


def test_order_depends_on_seed_and_epoch_only() -> None:
    order = epoch_order(50, None, 3, 1)
    assert sorted(order.tolist()) == list(range(50))
    assert order.tolist() == epoch_order(50, None, 3, 1).tolist()
    for seed, epoch in [(3, 0), (3, 2), (4, 1), (1, 3)]:
        assert order.tolist() != epoch_order(50, None, seed, epoch).tolist()


def test_order_with_repeats() -> None:
    repeats = np.array([0, 1, 3])
    assert epoch_rows(3, repeats) == 4
    assert sorted(epoch_order(3, repeats, 0, 0).tolist()) == [1, 2, 2, 2]


@pytest.mark.parametrize(
    ("rows", "batch", "epochs", "max_steps", "steps"),
    [
        (10, 4, 1.0, None, 3),  # 4 + 4 + 2
        (10, 4, 2.0, None, 6),
        (10, 4, 0.5, None, 2),  # 1.5
        (300, 10, 0.1, None, 3),  # 0.1 x 30, exactly
        (10, 4, 0.01, None, 1),
        (10, 4, 1.0, 100, 100),
    ],
)
def test_num_steps(rows: int, batch: int, epochs: float, max_steps: int | None, steps: int) -> None:
    assert num_steps(rows, batch, epochs, max_steps) == steps


def test_locate_by_hand() -> None:
    # 10 rows, batches of 4: slices 0-4, 4-8, 8-10, then the next epoch
    assert [locate(s, 10, 4) for s in range(4)] == [
        (0, slice(0, 4)),
        (0, slice(4, 8)),
        (0, slice(8, 10)),
        (1, slice(0, 4)),
    ]


@given(st.integers(1, 30), st.integers(1, 12), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_an_epoch_sees_every_row_once_and_resume_needs_the_step_only(rows: int, batch: int, seed: int) -> None:
    per_epoch = num_steps(rows, batch, 1, None)
    course = Course(rows, None, batch, seed)
    steps = [course.rows(step).tolist() for step in range(2 * per_epoch)]
    for epoch in (0, 1):
        seen = [row for step in steps[epoch * per_epoch : (epoch + 1) * per_epoch] for row in step]
        assert sorted(seen) == list(range(rows))
        assert seen == epoch_order(rows, None, seed, epoch).tolist()
        assert course.epoch(epoch * per_epoch) == epoch
    for start in (1, per_epoch):
        resumed = Course(rows, None, batch, seed)
        assert [resumed.rows(step).tolist() for step in range(start, 2 * per_epoch)] == steps[start:]


def flat(plan: StepPlan) -> list[int]:
    return [row for rank in plan.ranks for micro in rank for rows in micro for row in rows]


@given(LENGTHS, st.integers(1, 5), st.integers(1, 6), st.sampled_from([None, 32, 50]))
@settings(max_examples=300, deadline=None)
def test_a_plan_is_complete_and_within_limits(
    lengths: list[int], world_size: int, micro_batch_size: int, pack_length: int | None
) -> None:
    rows = np.arange(len(lengths)) * 3 + 100  # row numbers are not positions
    plan = plan_step(rows, np.array(lengths), world_size, micro_batch_size, pack_length)
    assert sorted(flat(plan)) == rows.tolist()  # every row once, whatever the world size
    assert len(plan.ranks) == world_size
    assert len({len(rank) for rank in plan.ranks}) == 1  # as many micro-batches on every rank
    bins = [rows for rank in plan.ranks for micro in rank for rows in micro]
    assert all(bins)
    # no micro-batch costs more than the dearest of those that are cut every micro_batch_size bins
    sizes = sorted((sum(lengths[(row - 100) // 3] for row in rows) for rows in bins), reverse=True)
    costs = [len(m) * max(sum(lengths[(r - 100) // 3] for r in b) for b in m) for k in plan.ranks for m in k if m]
    assert max(costs) <= micro_batch_size * sizes[0]
    if len(bins) % (micro_batch_size * world_size) == 0:
        assert max(costs) <= max(micro_batch_size * sizes[i] for i in range(0, len(sizes), micro_batch_size))
    if pack_length is None:
        assert all(len(rows) == 1 for rows in bins)
    else:
        assert all(sum(lengths[(row - 100) // 3] for row in rows) <= pack_length for rows in bins)
    # no more forward passes than needed
    assert len(plan.ranks[0]) == max(1, -(-len(bins) // (micro_batch_size * world_size)))
    # a rank is idle only if there are not enough bins
    if len(bins) >= world_size:
        assert all(any(micro for micro in rank) for rank in plan.ranks)


def fewest_bins(lengths: list[int], capacity: int) -> int:
    """By trying every assignment."""
    for count in range(1, len(lengths) + 1):
        for assignment in itertools.product(range(count), repeat=len(lengths)):
            loads = Counter[int]()
            for length, number in zip(lengths, assignment, strict=True):
                loads[number] += length
            if max(loads.values()) <= capacity:
                return count
    raise AssertionError


@given(st.lists(st.integers(1, 10), min_size=1, max_size=6))
@settings(max_examples=60, deadline=None)
def test_packing_against_brute_force(lengths: list[int]) -> None:
    bins = best_fit_decreasing(np.array(lengths), 10)
    assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in b) <= 10 for b in bins)
    assert fewest_bins(lengths, 10) <= len(bins) <= 11 / 9 * fewest_bins(lengths, 10) + 1


def test_packing_by_hand() -> None:
    # 7, 5, 4, 3, 1 into 10: 7 | 7, 5 | 4 fits beside 5 only | 3 fills 7 to 10 | 1 fills 9 to 10
    bins = best_fit_decreasing(np.array([3, 7, 1, 5, 4]), 10)
    assert bins == [[1, 0], [3, 4, 2]]


def test_bins_are_dealt_evenly() -> None:
    # five rows of 6 make five bins of 10, two ranks: the odd one out would cost a whole pass, but 6 bins need 6 rows
    plan = plan_step(np.arange(5), np.full(5, 6), 2, 1, 10)
    assert [sum(map(len, rank)) for rank in plan.ranks] == [3, 2]
    # lengths 9 and six of 3: best fit makes 3 bins (9 | 3 3 3 | 3 3 3), four ranks would leave one idle
    plan = plan_step(np.arange(7), np.array([9, 3, 3, 3, 3, 3, 3]), 4, 1, 10)
    assert sorted(len(rank[0][0]) for rank in plan.ranks) == [1, 2, 2, 2]


def test_unpacked_rows_of_like_length_go_together_and_work_is_balanced() -> None:
    lengths = np.array([1, 9, 2, 10, 3, 8, 4, 7])
    plan = plan_step(np.arange(8), lengths, 2, 2)
    by_length = [[[[int(lengths[r]) for r in rows] for rows in micro] for micro in rank] for rank in plan.ranks]
    # four micro-batches: 10 9 | 8 7 | 4 3 | 2 1 would cost 20, 16, 8, 4; 10 | 9 | 8 7 | 4 3 2 1 cost 10, 9, 16, 16, and
    # no cut has a maximum below 16. The rank with 10 gets a 16, the rank with 9 the other.
    assert by_length == [[[[10]], [[4], [3], [2], [1]]], [[[9]], [[8], [7]]]]


def test_fewer_rows_than_ranks_leave_empty_micro_batches() -> None:
    plan = plan_step(np.array([7]), np.array([3]), 3, 4)
    assert sorted(map(str, plan.ranks)) == ["[[[7]]]", "[[]]", "[[]]"]


@pytest.mark.timeout(60)  # a tenth of a second on one core; what is quadratic in the rows does not come to an end
def test_balance_on_a_large_batch() -> None:
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.lognormal(5, 1, 10_000).astype(int) + 1, 2048)
    for pack_length in (None, 2048):
        plan = plan_step(np.arange(10_000), lengths, 8, 4, pack_length)
        loads = [
            sum(len(m) * max(int(lengths[rows].sum()) for rows in m) for m in rank if m) for rank in plan.ranks
        ]  # fmt: skip
        assert max(loads) < 1.02 * min(loads)
    bins = best_fit_decreasing(lengths, 2048)
    assert lengths.sum() / (len(bins) * 2048) > 0.99
