"""Masked sums, means and whitening against values worked out by hand and a loop over ranks."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_cli.ops.masks import masked_mean, masked_sum, whiten

NAN = float("nan")


def test_sum_and_mean_by_hand() -> None:
    values = torch.tensor([[1.0, 2.0, NAN], [4.0, NAN, NAN]])
    keep = torch.tensor([[True, True, False], [True, False, False]])
    assert masked_sum(values, keep).item() == 7
    assert masked_mean(values, keep).item() == pytest.approx(7 / 3)
    assert masked_sum(values, keep, dim=1).tolist() == [3, 4]
    assert masked_mean(values, keep, dim=1).tolist() == [1.5, 4]
    assert masked_mean(values, torch.zeros_like(keep)).item() == 0


def test_whiten_by_hand() -> None:
    # kept 1, 3, 5: mean 3, biased variance (4 + 0 + 4) / 3 = 8/3
    values = torch.tensor([[1.0, 3.0], [5.0, NAN]])
    keep = torch.tensor([[True, True], [True, False]])
    step = 2 / (8 / 3) ** 0.5
    assert whiten(values, keep).flatten().tolist() == pytest.approx([-step, 0, step, 0])
    assert whiten(values, keep, shift_mean=False).flatten().tolist() == pytest.approx([3 - step, 3, 3 + step, 0])


def test_whiten_of_equal_values_is_zero_and_large_means_keep_their_digits() -> None:
    keep = torch.ones(1, 4, dtype=torch.bool)
    assert whiten(torch.full((1, 4), 7.0), keep).tolist() == [[0, 0, 0, 0]]
    values = torch.tensor([[10000.0, 10001.0, 10002.0, 10003.0]])
    assert whiten(values, keep)[0].tolist() == pytest.approx([x / 1.25**0.5 for x in (-1.5, -0.5, 0.5, 1.5)], abs=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=4), st.integers(0, 1000), st.booleans())
def test_whiten_over_ranks_equals_one_rank(rows: list[int], seed: int, shift_mean: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(sum(rows), 3, generator=generator)
    keep = torch.rand(sum(rows), 3, generator=generator) < 0.6
    expected = whiten(values, keep, shift_mean)
    handed: list[torch.Tensor] = [torch.zeros(0)] * len(rows)
    everyone = threading.Barrier(len(rows), timeout=10)

    def on_rank(rank: int) -> torch.Tensor:
        def reduce(tensor: torch.Tensor) -> torch.Tensor:
            handed[rank] = tensor
            everyone.wait()
            total = torch.stack(handed).sum(0)
            everyone.wait()
            return total

        return whiten(values.split(rows)[rank], keep.split(rows)[rank], shift_mean, reduce)

    with ThreadPoolExecutor(len(rows)) as ranks:
        found = torch.cat(list(ranks.map(on_rank, range(len(rows)))))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
