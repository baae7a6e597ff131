"""Rewards of tokens and the advantage estimators, by hand and against loops over responses."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf_cli.ops.advantages import GROUP_STD_FLOOR, estimate, token_rewards
from rlhf_cli.schema import AlgorithmConfig
from tests.ragged import NAN, Ragged, mask_of, ragged

ESTIMATORS = ["gae", "rloo", "grpo", "reinforce++"]


def settings_for(advantage: str, **other: object) -> AlgorithmConfig:
    return AlgorithmConfig(advantage=advantage, **other)  # type: ignore[arg-type]


def slow_whiten(rows: list[list[float]]) -> list[list[float]]:
    flat = [x for row in rows for x in row]
    mean = statistics.fmean(flat)
    std = math.sqrt(statistics.fmean((x - mean) ** 2 for x in flat) + 1e-8)
    return [[(x - mean) / std for x in row] for row in rows]


def unpadded(values: Tensor, lengths: list[int]) -> list[list[float]]:
    for row, length in zip(values, lengths, strict=True):
        assert not row[length:].any()  # nan would be true
    return [row[:length].tolist() for row, length in zip(values, lengths, strict=True)]


def assert_rows(found: Tensor, expected: list[list[float]]) -> None:
    rows = unpadded(found, [len(row) for row in expected])
    assert [x for row in rows for x in row] == pytest.approx([x for row in expected for x in row], rel=1e-6, abs=1e-6)


def test_token_rewards_by_hand() -> None:
    # β = ½; k1 of row 1: 1, −2; the score 10 goes to its second token. Row 2: k1 = 4 and the score −1 at its only one.
    logprobs = torch.tensor([[-1.0, -3.0, NAN], [-2.0, NAN, 7.0]])
    reference = torch.tensor([[-2.0, -1.0, 5.0], [-6.0, 0.0, NAN]])
    keep = torch.tensor([[True, True, False], [True, False, False]])
    scores = torch.tensor([10.0, -1.0])
    found = token_rewards(scores, logprobs, reference, keep, 0.5, "k1")
    assert found.tolist() == [[-0.5, 11.0, 0.0], [-3.0, 0.0, 0.0]]
    # k2 = 1/2, 2 and 8
    found = token_rewards(scores, logprobs, reference, keep, 0.5, "k2")
    assert found.tolist() == [[-0.25, 9.0, 0.0], [-5.0, 0.0, 0.0]]


@settings(max_examples=40, deadline=None)
@given(batch=ragged(), kl_coef=st.floats(0, 2), kind=st.sampled_from(["k1", "k2", "k3"]))
def test_token_rewards_token_by_token(batch: Ragged, kl_coef: float, kind: str) -> None:
    logprobs, reference = batch.draw(0), batch.draw(1)
    scores = batch.draw(2, dropped=0.0)[:, 0]
    found = token_rewards(scores, logprobs, reference, batch.keep_mask, kl_coef, kind)
    expected = []
    for row, length in enumerate(batch.lengths):
        rewards = []
        for t in range(length):
            log_r = float(reference[row, t] - logprobs[row, t])
            k = {"k1": -log_r, "k2": log_r**2 / 2, "k3": math.exp(log_r) - 1 - log_r}[kind]
            rewards.append(-kl_coef * k + (float(scores[row]) if t == length - 1 else 0.0))
        expected.append(rewards)
    assert_rows(found, expected)


def test_without_penalty_no_estimate_matters() -> None:
    # exp(1000) is inf, and 0 · inf would be nan
    keep = torch.ones(1, 2, dtype=torch.bool)
    found = token_rewards(torch.tensor([3.0]), torch.full((1, 2), -1000.0), torch.zeros(1, 2), keep, 0.0, "k3")
    assert found.tolist() == [[0.0, 3.0]]


def test_a_response_needs_a_token() -> None:
    with pytest.raises(AssertionError, match="without tokens"):
        token_rewards(torch.ones(1), torch.ones(1, 2), torch.ones(1, 2), torch.zeros(1, 2, dtype=torch.bool), 0.1)


GROUPED = torch.tensor([7, 3, 7, 3, 7])  # responses to a prompt need not stand together
SUMS = [1.0, 4.0, 2.0, 8.0, 6.0]


def grouped_rewards() -> tuple[Tensor, Tensor, list[int]]:
    """(rewards, keep_mask, lengths): rows that sum up to SUMS, of lengths 1, 2, 3, 1, 2."""
    lengths = [1, 2, 3, 1, 2]
    keep = mask_of(lengths)
    rewards = torch.full(keep.shape, NAN, dtype=torch.float64)
    for row, (length, total) in enumerate(zip(lengths, SUMS, strict=True)):
        rewards[row, :length] = -0.5
        rewards[row, length - 1] = total + 0.5 * (length - 1)
    return rewards, keep, lengths


def test_rloo_by_hand() -> None:
    # Group 7: 1 − (2+6)/2 = −3, 2 − (1+6)/2 = −1.5, 6 − (1+2)/2 = 4.5; group 3: 4 − 8, 8 − 4
    rewards, keep, lengths = grouped_rewards()
    advantages, returns = estimate(rewards, None, keep, GROUPED, settings_for("rloo"))
    each = [-3.0, -4.0, -1.5, 4.0, 4.5]
    assert_rows(advantages, [[a] * n for a, n in zip(each, lengths, strict=True)])
    assert returns is None


def test_grpo_by_hand() -> None:
    # Group 7: mean 3, deviations −2, −1, 3, variance 14/2; group 3: mean 6, deviations ∓2, variance 8/1
    rewards, keep, lengths = grouped_rewards()
    advantages, _ = estimate(rewards, None, keep, GROUPED, settings_for("grpo"))
    seven, three = math.sqrt(7) + 1e-4, math.sqrt(8) + 1e-4
    each = [-2 / seven, -2 / three, -1 / seven, 2 / three, 3 / seven]
    assert_rows(advantages, [[a] * n for a, n in zip(each, lengths, strict=True)])


def test_grpo_does_not_blow_up_rounding_errors() -> None:
    # 0.1 + 0.2 and 0.3 differ in fp32's last digit, and so would ±0.7 after division by their std
    rewards = torch.tensor([[0.1, 0.2], [0.3, 0.0]])
    keep = torch.ones(2, 2, dtype=torch.bool)
    advantages, _ = estimate(rewards, None, keep, torch.zeros(2, dtype=torch.long), settings_for("grpo"))
    assert advantages.abs().max() < 1e-3


def test_reinforce_by_hand() -> None:
    # γ = ½: rewards-to-go of (0, 0, 4) are 1, 2, 4, of (1) 1: mean 2, variance (1 + 0 + 4 + 1)/4
    keep = mask_of([3, 1])
    rewards = torch.tensor([[0.0, 0.0, 4.0, NAN], [1.0, NAN, NAN, NAN]])
    plain, _ = estimate(
        rewards, None, keep, torch.arange(2), settings_for("reinforce++", gamma=0.5, whiten_advantages="never")
    )
    assert plain.tolist() == [[1.0, 2.0, 4.0, 0.0], [1.0, 0.0, 0.0, 0.0]]
    white, returns = estimate(rewards, None, keep, torch.arange(2), settings_for("reinforce++", gamma=0.5))
    assert_rows(white, [[-1 / 1.5**0.5, 0.0, 2 / 1.5**0.5], [-1 / 1.5**0.5]])
    assert returns is None


@settings(max_examples=40, deadline=None)
@given(
    batch=ragged(max_rows=4),
    samples=st.integers(2, 3),
    whiten_advantages=st.sampled_from(["auto", "always", "never"]),
    whiten_rewards=st.booleans(),
    advantage=st.sampled_from(ESTIMATORS),
    gamma=st.sampled_from([1.0, 0.7]),
)
def test_estimators_against_loops(
    batch: Ragged, samples: int, whiten_advantages: str, whiten_rewards: bool, advantage: str, gamma: float
) -> None:
    lengths = [n for n in batch.lengths for _ in range(samples)]  # groups of answers, shuffled below
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(batch.seed))
    lengths = [lengths[i] for i in order]
    groups = (torch.arange(len(lengths)) // samples)[order] * 10 - 3
    many = Ragged(lengths, mask_of(lengths), batch.seed)
    rewards, values = many.draw(0), many.draw(1)
    config = settings_for(
        advantage, gamma=gamma, lam=0.9, whiten_advantages=whiten_advantages, whiten_rewards=whiten_rewards
    )
    found, returns = estimate(rewards, values if advantage == "gae" else None, many.keep_mask, groups, config)

    r = [rewards[i, :n].tolist() for i, n in enumerate(lengths)]
    if whiten_rewards:
        mean = statistics.fmean(x for row in r for x in row)
        r = [[x + mean for x in row] for row in slow_whiten(r)]
    v = [values[i, :n].tolist() for i, n in enumerate(lengths)]
    if advantage == "gae":
        expected = [slow_gae(a, b, gamma, 0.9) for a, b in zip(r, v, strict=True)]
        assert returns is not None
        assert_rows(returns, [[a + b for a, b in zip(*rows, strict=True)] for rows in zip(expected, v, strict=True)])
    elif advantage == "reinforce++":
        expected = [[sum(gamma**k * x for k, x in enumerate(row[t:])) for t in range(len(row))] for row in r]
    else:
        expected = slow_groups([sum(row) for row in r], groups.tolist(), lengths, advantage)
    if whiten_advantages == "always" or (whiten_advantages == "auto" and advantage in ("gae", "reinforce++")):
        expected = slow_whiten(expected)
    assert_rows(found, expected)


def slow_gae(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    advantages, after = [0.0] * len(rewards), 0.0
    for t in reversed(range(len(rewards))):
        ahead = values[t + 1] if t + 1 < len(values) else 0.0
        after = advantages[t] = rewards[t] + gamma * ahead - values[t] + gamma * lam * after
    return advantages


def slow_groups(sums: list[float], groups: list[int], lengths: list[int], advantage: str) -> list[list[float]]:
    expected = []
    for i, total in enumerate(sums):
        group = [s for s, g in zip(sums, groups, strict=True) if g == groups[i]]
        if advantage == "rloo":
            others = [s for j, s in enumerate(sums) if groups[j] == groups[i] and j != i]
            a = total - statistics.fmean(others)
        else:
            a = (total - statistics.fmean(group)) / (statistics.stdev(group) + GROUP_STD_FLOOR)
        expected.append([a] * lengths[i])
    return expected


@pytest.mark.parametrize("advantage", ESTIMATORS)
def test_what_stands_behind_the_end_changes_nothing(advantage: str) -> None:
    lengths = [2, 4, 1, 3]
    groups, config = torch.tensor([0, 0, 1, 1]), settings_for(advantage)
    found = []
    for behind in (0.0, NAN, 1e30):
        batch = Ragged(lengths, mask_of(lengths), 5)
        logprobs, reference, values = (batch.draw(i, dropped=behind).float() for i in range(3))
        rewards = token_rewards(torch.arange(4.0), logprobs, reference, batch.keep_mask, 0.1)
        found.append(estimate(rewards, values if config.has_critic else None, batch.keep_mask, groups, config))
    for other in found[1:]:
        assert torch.equal(other.advantages, found[0].advantages)
        assert (other.returns is None) == (found[0].returns is None) == (advantage != "gae")
        if other.returns is not None and found[0].returns is not None:
            assert torch.equal(other.returns, found[0].returns)


@pytest.mark.parametrize("advantage", ["rloo", "grpo"])
def test_a_lonely_response_cannot_be_compared(advantage: str) -> None:
    keep = torch.ones(3, 1, dtype=torch.bool)
    with pytest.raises(AssertionError, match="alone with its prompt"):
        estimate(torch.ones(3, 1), None, keep, torch.tensor([0, 0, 1]), settings_for(advantage))


@pytest.mark.parametrize("advantage", ["rloo", "grpo"])
def test_whole_responses_have_no_discount(advantage: str) -> None:
    assert [p.key for p in settings_for(advantage, gamma=0.9).check()] == ["gamma"]
    assert not list(settings_for(advantage).check())
