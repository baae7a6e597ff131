"""Generalised advantage estimation against values by hand, the sum over k of (γλ)^k δ, and its two limits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_cli.ops.gae import compute_gae
from tests.ragged import NAN, Ragged, ragged

UNIT = st.floats(0, 1)


def test_by_hand() -> None:
    # γ = ½, λ = ½, so γλ = ¼. Row 1: δ = (1 + ½·4 − 2, 0 + ½·6 − 4, 8 − 6) = (1, −1, 2);
    # A_3 = 2, A_2 = −1 + ¼·2 = −½, A_1 = 1 − ¼·½ = 7/8; returns A + V. Row 2 ends after one token: δ = A = 3 − 1.
    rewards = torch.tensor([[1.0, 0.0, 8.0], [3.0, NAN, 5.0]])
    values = torch.tensor([[2.0, 4.0, 6.0], [1.0, 9.0, NAN]])
    keep = torch.tensor([[True, True, True], [True, False, False]])
    advantages, returns = compute_gae(rewards, values, keep, gamma=0.5, lam=0.5)
    assert advantages.tolist() == [[0.875, -0.5, 2.0], [2.0, 0.0, 0.0]]
    assert returns.tolist() == [[2.875, 3.5, 8.0], [3.0, 0.0, 0.0]]
    assert advantages.dtype == returns.dtype == torch.float32


def slow_row(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """A_t = Σ_k (γλ)^k δ_{t+k}, eq. 16 of the paper, term by term."""
    ahead = [*values[1:], 0.0]
    delta = [r + gamma * after - v for r, v, after in zip(rewards, values, ahead, strict=True)]
    return [sum((gamma * lam) ** k * d for k, d in enumerate(delta[t:])) for t in range(len(delta))]


@settings(max_examples=60, deadline=None)
@given(batch=ragged(), gamma=UNIT, lam=UNIT)
def test_equals_the_sum_of_discounted_errors(batch: Ragged, gamma: float, lam: float) -> None:
    rewards, values = batch.draw(0), batch.draw(1)
    advantages, returns = compute_gae(rewards, values, batch.keep_mask, gamma, lam)
    for row, length in enumerate(batch.lengths):
        r, v = rewards[row, :length].tolist(), values[row, :length].tolist()
        expected = slow_row(r, v, gamma, lam)
        assert advantages[row, :length].tolist() == pytest.approx(expected, abs=1e-9)
        assert returns[row, :length].tolist() == pytest.approx(
            [a + b for a, b in zip(expected, v, strict=True)], abs=1e-9
        )
        assert not advantages[row, length:].any()
        assert not returns[row, length:].any()


@settings(max_examples=30, deadline=None)
@given(batch=ragged())
def test_limits(batch: Ragged) -> None:
    rewards, values, keep = batch.draw(0), batch.draw(1), batch.keep_mask
    whole, returns = compute_gae(rewards, values, keep, 1.0, 1.0)
    one_step, _ = compute_gae(rewards, values, keep, 1.0, 0.0)
    for row, length in enumerate(batch.lengths):
        r, v = rewards[row, :length], values[row, :length]
        to_go = r.flip(0).cumsum(0).flip(0)  # Σ_{k≥t} r_k
        torch.testing.assert_close(whole[row, :length], to_go - v)
        torch.testing.assert_close(returns[row, :length], to_go)
        torch.testing.assert_close(one_step[row, :length], r + torch.cat([v[1:], v.new_zeros(1)]) - v)


@settings(max_examples=30, deadline=None)
@given(batch=ragged(), shift=st.integers(0, 3))
def test_a_row_alone_and_padded_anywhere_gives_the_same_bits(batch: Ragged, shift: int) -> None:
    rewards, values = batch.draw(0).float(), batch.draw(1).float()
    advantages, returns = compute_gae(rewards, values, batch.keep_mask, 0.9, 0.8)
    for row, length in enumerate(batch.lengths):
        # Padding in front, and a hole behind the first token
        places = [shift, *range(shift + 2, shift + 1 + length)]
        keep = torch.zeros(1, shift + length + 3, dtype=torch.bool)
        keep[0, places] = True
        alone = [torch.full(keep.shape, NAN) for _ in range(2)]
        for to, of in zip(alone, (rewards, values), strict=True):
            to[0, places] = of[row, :length]
        found = compute_gae(alone[0], alone[1], keep, 0.9, 0.8)
        assert torch.equal(found[0][0, places], advantages[row, :length])
        assert torch.equal(found[1][0, places], returns[row, :length])


def test_no_gradient() -> None:
    values = torch.ones(1, 2, requires_grad=True)
    advantages, returns = compute_gae(torch.ones(1, 2), values, torch.ones(1, 2, dtype=torch.bool), 1.0, 1.0)
    assert not advantages.requires_grad
    assert not returns.requires_grad
