"""Ranks, selection and soft weights against brute force; the law of the best of n; the number of ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf_cli.ops.ranking import response_ranks, select_top, soft_weights
from rlhf_cli.runtime.distributed import Ranks, gather_objects

GONE = -math.inf
Strategy = Literal["local", "top"]
FRACTIONS = [1 / k for k in (1, 2, 3, 4, 7, 8)] + [0.333333, 0.142857]

responses = st.lists(  # few values, so that there are ties, and groups of all sizes in any order
    st.tuples(st.sampled_from([GONE, -1.5, 0.0, -0.0, 0.1, 2.0, 1e30]), st.sampled_from([-3, 0, 7, 2**40])),
    max_size=24,
)


def tensors(rows: list[tuple[float, int]]) -> tuple[Tensor, Tensor]:
    return torch.tensor([r for r, _ in rows]), torch.tensor([g for _, g in rows], dtype=torch.int64)


def best_first(rewards: list[float], among: list[int]) -> list[int]:
    """By repeated search for the largest; the first of equals is found first."""
    left, order = list(among), []
    while left:
        best = left[0]
        for i in left[1:]:
            if rewards[i] > rewards[best]:
                best = i
        order.append(best)
        left.remove(best)
    return order


def members(groups: list[int]) -> list[list[int]]:
    return [[i for i, other in enumerate(groups) if other == group] for group in sorted(set(groups))]


def slow_select(rewards: list[float], groups: list[int], strategy: Strategy, top_fraction: float) -> list[int]:
    pools = members(groups) if strategy == "local" else [list(range(len(rewards)))]
    chosen = []
    for pool in pools:
        number = max(1, round(len(pool) * top_fraction))
        chosen += [i for i in best_first(rewards, pool)[:number] if rewards[i] > GONE]
    return sorted(chosen)


def test_selection_by_hand() -> None:
    # Three prompts, K = 4. Of group 5: 2.0 stands at 1 and 6, the first wins. Of group 3 one is left, of 9 none.
    rewards = torch.tensor([1.0, 2.0, GONE, GONE, -7.0, GONE, 2.0, 0.0, GONE, GONE, GONE, GONE])
    groups = torch.tensor([5, 5, 3, 3, 3, 3, 5, 5, 9, 9, 9, 9])
    assert select_top(rewards, "local", 0.25, groups).tolist() == [1, 4]
    assert select_top(rewards, "local", 0.5, groups).tolist() == [1, 4, 6]  # 2 of each: 3 has one to give, 9 none
    # 12 were written: the best 3 of all
    assert select_top(rewards, "top", 0.25, groups).tolist() == [0, 1, 6]
    # 6 places, 5 to fill them
    assert select_top(rewards, "top", 0.5, groups).tolist() == [0, 1, 4, 6, 7]
    assert select_top(rewards, "top", 0.01, groups).tolist() == [1], "one at least"
    assert response_ranks(rewards, groups).tolist() == [3, 1, 2, 3, 1, 4, 2, 4, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="allowed: local, top"):
        select_top(rewards, "best", 0.5, groups)  # type: ignore[arg-type]


@settings(max_examples=150, deadline=None)
@given(rows=responses, strategy=st.sampled_from(["local", "top"]), top_fraction=st.sampled_from(FRACTIONS))
@example(rows=[(1.0, 0)] * 10, strategy="top", top_fraction=0.25)  # 2.5 places
@example(rows=[(1.0, 0)] * 10, strategy="local", top_fraction=0.25)
def test_selection_against_brute_force(rows: list[tuple[float, int]], strategy: Strategy, top_fraction: float) -> None:
    rewards, groups = tensors(rows)
    found = select_top(rewards, strategy, top_fraction, groups)
    assert found.dtype == torch.int64
    assert found.tolist() == slow_select(rewards.tolist(), groups.tolist(), strategy, top_fraction)


@settings(max_examples=75, deadline=None)
@given(rows=responses)
def test_ranks_against_brute_force(rows: list[tuple[float, int]]) -> None:
    rewards, groups = tensors(rows)
    expected = [0] * len(rows)
    for pool in members(groups.tolist()):
        for rank, i in enumerate(best_first(rewards.tolist(), pool), start=1):
            expected[i] = rank
    assert response_ranks(rewards, groups).tolist() == expected


@settings(max_examples=75, deadline=None)
@given(rows=responses, temperature=st.sampled_from([0.05, 0.7, 3.0]), whole=st.booleans())
def test_soft_weights_against_a_loop(rows: list[tuple[float, int]], temperature: float, whole: bool) -> None:
    rewards, groups = tensors(rows)
    found = soft_weights(rewards, temperature, None if whole else groups)
    expected = [0.0] * len(rows)
    for pool in members([0] * len(rows) if whole else groups.tolist()):
        scores = {i: rewards[i].item() / temperature for i in pool if rewards[i] > GONE}
        for i, score in scores.items():
            expected[i] = 1 / sum(math.exp(min(700.0, other - score)) for other in scores.values())
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(expected, rel=1e-12, abs=1e-300)
    for pool in members(groups.tolist()):
        if not whole:
            assert found[pool].sum().item() == pytest.approx(float((rewards[pool] > GONE).any()), rel=1e-12)


def test_soft_weights_between_the_best_and_all() -> None:
    # Two prompts: (3, 1, discarded) and (0, 0, -2), where two are best alike
    rewards = torch.tensor([3.0, 0.0, 1.0, 0.0, GONE, -2.0])
    groups = torch.tensor([0, 1, 0, 1, 0, 1])
    assert soft_weights(rewards, 1e-6, groups).tolist() == [1.0, 0.5, 0.0, 0.5, 0.0, 0.0]
    assert soft_weights(rewards, 1e-6, None).tolist() == [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    third = 1 / 3
    assert soft_weights(rewards, 1e9, groups).tolist() == pytest.approx([0.5, third, 0.5, third, 0, third], abs=1e-8)
    assert soft_weights(rewards, 1e9, None).tolist() == pytest.approx([0.2, 0.2, 0.2, 0.2, 0, 0.2], abs=1e-8)
    # e^(3/2) : e^(1/2) = e : 1
    e = math.e
    assert soft_weights(rewards, 2.0, groups)[[0, 2]].tolist() == pytest.approx([e / (1 + e), 1 / (1 + e)], rel=1e-12)


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_what_cannot_be_ranked(wrong: float) -> None:
    rewards, groups = torch.tensor([1.0, wrong]), torch.tensor([0, 0])
    for call in (
        lambda: select_top(rewards, "local", 0.5, groups),
        lambda: select_top(rewards, "top", 0.5, groups),
        lambda: soft_weights(rewards, 1.0, groups),
    ):
        with pytest.raises(AssertionError, match="cannot be ranked"):
            call()


def best_of_n(probs: Tensor, rewards: Tensor, n: int) -> Tensor:
    """Law of the best of n independent draws, (M,) of probs (M,): F^n - F_minus^n is the chance that the best reward is
    this one, where F sums over rewards up to it and F_minus below it; outcomes of equal reward share it as by probs."""
    law = torch.zeros_like(probs)
    for i, reward in enumerate(rewards):
        tied, below = probs[rewards == reward].sum(), probs[rewards < reward].sum()
        law[i] = ((below + tied) ** n - below**n) * probs[i] / tied
    return law


@pytest.mark.parametrize("n", [2, 4, 8])
def test_best_of_n_has_its_law(n: int) -> None:
    """Drawn, ranked and counted: the production selection against q, whose KL from the draws is bounded."""
    probs = torch.tensor([0.3, 0.05, 0.25, 0.1, 0.1, 0.2], dtype=torch.float64)
    outcome_rewards = torch.tensor([0.0, 3.0, 1.0, 1.0, -2.0, 0.5], dtype=torch.float64)  # 2 and 3 are tied
    trials = 20_000
    drawn = torch.multinomial(probs, trials * n, replacement=True, generator=torch.Generator().manual_seed(n))
    # One of a prompt's responses here, the next somewhere else: groups are not runs of neighbours
    groups = torch.arange(trials).repeat(n)
    chosen = select_top(outcome_rewards[drawn], "local", 1 / n, groups)
    assert torch.equal(groups[chosen].sort().values, torch.arange(trials))
    counts = torch.bincount(drawn[chosen], minlength=len(probs))
    law = best_of_n(probs, outcome_rewards, n)
    assert law.sum().item() == pytest.approx(1.0, rel=1e-12)
    errors = (trials * law * (1 - law)).sqrt()
    assert ((counts - trials * law).abs() < 4 * errors).all(), (counts, trials * law)
    assert ((counts - trials * probs).abs() > 4 * errors).any()  # which the draws themselves do not pass
    # Beirami et al., arXiv 2401.01879: a bound, and not an equality, of discrete outcomes
    kl = (law * (law / probs).log()).sum().item()
    assert 0 < kl < math.log(n) - (n - 1) / n


def reward_of(index: int) -> float:
    """Of a response by its number: many ties, some discarded."""
    value = index * 2654435761 % 2**32 >> 8
    return GONE if value % 9 == 0 else float(value % 13) / 7


def score_a_share(ranks: Ranks, rows: list[int]) -> list[list[int]]:
    """On each rank: reward the own share of the responses, gather, and select from all of them."""
    mine = [(row, reward_of(row)) for row in rows[ranks.rank :: ranks.world_size]]
    rewards = torch.full((len(rows),), math.nan, dtype=torch.float64)
    for part in gather_objects(mine):
        for row, reward in part:
            rewards[row] = reward
    return selections(rewards)


def selections(rewards: Tensor) -> list[list[int]]:
    groups = torch.arange(len(rewards)) // 4
    local, top = (select_top(rewards, strategy, 0.25, groups) for strategy in ("local", "top"))
    return [local.tolist(), top.tolist()]


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_any_number_of_ranks_selects_the_same(world_size: int, run_on_ranks: Callable[..., list[Any]]) -> None:
    rows = torch.randperm(64, generator=torch.Generator().manual_seed(0)).tolist()  # in whatever order they are done
    found = run_on_ranks(world_size, "tests.test_ranking:score_a_share", rows=rows)
    rewards = [reward_of(i) for i in range(64)]
    groups = [i // 4 for i in range(64)]
    expected = [slow_select(rewards, groups, strategy, 0.25) for strategy in ("local", "top")]
    assert found == [expected] * world_size
    assert len(expected[1]) == 16
    assert expected[0] != expected[1]
