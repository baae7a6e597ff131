"""Running mean and standard deviation of rewards."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_cli.reward.moments import RunningMoments

VALUES = st.floats(-1e3, 1e3).map(lambda x: round(x, 3))


def test_by_hand() -> None:
    moments = RunningMoments()
    moments.update(torch.tensor([1.0, 3.0]))
    assert (moments.count, moments.mean, moments.std) == (2, 2.0, 1.0)  # population: ((1-2)^2 + (3-2)^2) / 2
    moments.update(torch.tensor([8.0]))
    # of 1, 3, 8: mean 4, variance (9 + 1 + 16) / 3
    assert (moments.count, moments.mean) == (3, pytest.approx(4.0))
    assert moments.std == pytest.approx((26 / 3) ** 0.5)
    assert moments.normalise(torch.tensor([4.0, 4.0 + (26 / 3) ** 0.5])).tolist() == pytest.approx([0.0, 1.0])


@given(st.lists(st.lists(VALUES, max_size=8), min_size=1, max_size=8))
def test_batches_are_the_population_of_all_their_values(batches: list[list[float]]) -> None:
    moments = RunningMoments()
    for batch in batches:
        moments.update(torch.tensor(batch))
    values = np.array([value for batch in batches for value in torch.tensor(batch).double().tolist()])
    assert moments.count == len(values)
    if len(values):
        assert moments.mean == pytest.approx(values.mean(), abs=1e-9)
        assert (moments.m2 / len(values)) ** 0.5 == pytest.approx(values.std(), abs=1e-6)


@pytest.mark.parametrize("value", [0.1, -7.3, 0.0, 1e9 / 3])
def test_without_spread_only_the_mean_is_taken_off(value: float) -> None:
    moments = RunningMoments()
    assert moments.normalise(torch.tensor([value])).tolist() == torch.tensor([value]).double().tolist()
    for count in (1, 3, 7, 30):  # equal numbers whose sum is rounded
        moments.update(torch.full((count,), value, dtype=torch.float64))
        assert moments.std == 1.0
        assert moments.normalise(torch.tensor([value + 2], dtype=torch.float64)).item() == pytest.approx(2.0)
    noisy = RunningMoments()
    noisy.update(value + 1e-8 * value * torch.randn(50, dtype=torch.float64))
    assert noisy.std == 1.0


def test_a_checkpoint_keeps_every_bit() -> None:
    moments = RunningMoments()
    moments.update(torch.randn(50, dtype=torch.float64) / 3)
    again = RunningMoments.from_dict(json.loads(json.dumps(moments.as_dict())))
    assert again == moments
    for one in (moments, again):
        one.update(torch.tensor([0.1, 0.7]))
    assert again == moments
