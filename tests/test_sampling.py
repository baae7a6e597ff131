"""Hashed Gumbel noise and the tokens drawn with it: exact values, uniformity, independence, filters."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf_cli.ops.sampling import (
    CPU_CHUNK,
    UNIT,
    Draw,
    draw_tokens,
    filter_logits,
    gumbel_noise,
    row_keys,
    token_hashes,
)

CPU = torch.device("cpu")
INF = float("inf")
WORD, LONG = (1 << 32) - 1, (1 << 64) - 1


def keys(num: int, seed: int = 0, first_sample: int = 0, position: int = 0) -> Tensor:
    samples = np.arange(first_sample, first_sample + num, dtype=np.uint64)
    return torch.from_numpy(row_keys(seed, samples, np.full(num, position)))


def draws(logits: list[float], row_key: Tensor, draw: Draw = Draw()) -> np.ndarray:  # noqa: B008
    rows = torch.tensor(logits).repeat(len(row_key), 1)
    return draw_tokens(rows, row_key, token_hashes(len(logits), CPU), draw).numpy()


def chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


# --- the hash, in Python's own integers


def splitmix64(x: int) -> int:
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & LONG
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & LONG
    return x ^ (x >> 31)


def lowbias32(x: int) -> int:
    x = (x ^ (x >> 16)) * 0x7FEB352D & WORD
    x = (x ^ (x >> 15)) * 0x846CA68B & WORD
    return x ^ (x >> 16)


def inverse_lowbias32(x: int) -> int:
    """Each step undone, last first. x ^ (x >> 15) is undone by shifting 15 and 30: the third shift is beyond 32."""
    x ^= x >> 16
    x = x * pow(0x846CA68B, -1, 1 << 32) & WORD
    x = x ^ (x >> 15) ^ (x >> 30)
    x = x * pow(0x7FEB352D, -1, 1 << 32) & WORD
    return x ^ (x >> 16)


def signed(x: int) -> int:
    return x - (1 << 32) if x >> 31 else x


@given(
    seed=st.integers(0, LONG), sample=st.integers(0, LONG), position=st.integers(0, 1 << 20), token=st.integers(0, 99)
)
@settings(max_examples=60, deadline=None)
def test_noise_equals_the_hash_in_plain_integers(seed: int, sample: int, position: int, token: int) -> None:
    golden = 0x9E3779B97F4A7C15
    key = splitmix64((seed + golden) & LONG)
    key = splitmix64(((key ^ sample) + golden) & LONG)
    key = splitmix64(((key ^ position) + golden) & LONG)
    found = row_keys(seed, np.array([sample], np.uint64), np.array([position]))
    assert [int(x) & WORD for x in found[0]] == [key & WORD, key >> 32]
    mixed = (lowbias32(token * 0x9E3779B9 & WORD) ^ (key & WORD)) * ((key >> 32) | 1) & WORD
    unit = ((lowbias32(mixed) & 0x7FFFFFFF) + 0.5) * UNIT
    noise = gumbel_noise(torch.from_numpy(found), token_hashes(100, CPU))[0, token].item()
    assert noise == pytest.approx(-math.log(-math.log1p(-unit)), rel=1e-4, abs=1e-5)


def test_noise_is_finite_at_both_ends() -> None:
    """A key that takes the hash to 31 zeros, and one that takes it to 31 ones; 2⁻³² is the smallest unit."""
    hashes = token_hashes(5, CPU)
    lowest, highest = inverse_lowbias32(0), inverse_lowbias32(0x7FFFFFFF)
    assert [lowbias32(lowest), lowbias32(highest)] == [0, 0x7FFFFFFF]
    token = int(hashes[3]) & WORD
    row_key = torch.tensor([[signed(token ^ x), 0] for x in (lowest, highest)], dtype=torch.int32)
    large, small = gumbel_noise(row_key, hashes)[:, 3].tolist()
    assert large == pytest.approx(-math.log(2**-32), abs=1e-3)  # -log1p(-u) = u there
    assert small == pytest.approx(-math.log(-math.log(2**-24)), abs=1e-3)


# --- its quality


def test_noise_has_gumbels_distribution_up_to_the_tail() -> None:
    noise = gumbel_noise(keys(4096, seed=3), token_hashes(4096, CPU)).flatten()
    total = len(noise)
    # P(G <= x) = exp(-exp(-x)); 12 standard errors of a uniform share would be 0.0015
    for x in (-2.0, -1.0, 0.0, 1.0, 3.0, 6.0):
        share, error = math.exp(-math.exp(-x)), 0.5 / math.sqrt(total)
        assert (noise <= x).double().mean().item() == pytest.approx(share, abs=4 * error)
    # 16.8 million numbers: 762 above 10, 5 above 15
    expected = total * -math.expm1(-math.exp(-10))
    assert (noise > 10).sum().item() == pytest.approx(expected, abs=4 * math.sqrt(expected))
    assert 0 < (noise > 15).sum().item() < 16
    rows = noise.view(4096, 4096)[:1000]
    centred = (rows - rows.mean()) / rows.std()
    for shifted in (centred[:, 1:] * centred[:, :-1], centred[1:] * centred[:-1]):  # next token, next sample
        assert abs(shifted.mean().item()) < 4 / math.sqrt(shifted.numel())


@pytest.mark.parametrize("over", ["samples", "positions", "seeds"])
def test_tokens_come_as_often_as_softmax_says(over: str) -> None:
    logits, num = [2.0, 1.0, 0.5, 0.0, -1.0, -2.0, 0.0, 1.5], 40_000
    if over == "samples":
        row_key = keys(num, seed=7)
    elif over == "positions":
        row_key = torch.from_numpy(row_keys(7, np.full(num, 11, np.uint64), np.arange(num)))
    else:
        row_key = torch.cat([keys(1, seed=seed) for seed in range(num)])
    counts = np.bincount(draws(logits, row_key), minlength=8)
    shares = torch.tensor(logits).softmax(-1).double().numpy()
    assert chi_square(counts, shares * num) < 24.3  # 7 degrees of freedom: exceeded once in a thousand


@pytest.mark.parametrize("neighbour", ["position", "sample", "seed"])
def test_neighbours_are_independent(neighbour: str) -> None:
    num, logits = 40_000, [0.3, 0.0, -0.3, 0.1]
    other = {"position": keys(num, position=1), "sample": keys(num, first_sample=1), "seed": keys(num, seed=1)}
    a, b = draws(logits, keys(num)), draws(logits, other[neighbour])
    shares = torch.tensor(logits).softmax(-1).double().numpy()
    table = np.zeros((4, 4))
    np.add.at(table, (a, b), 1)
    assert chi_square(table, np.outer(shares, shares) * num) < 37.7  # 15 degrees of freedom


def test_a_row_draws_the_same_alone_and_in_any_batch() -> None:
    vocab = CPU_CHUNK // 3  # three rows at a time
    logits = torch.randn(7, vocab, generator=torch.Generator().manual_seed(0))
    row_key, hashes = keys(7), token_hashes(vocab, CPU)
    together = draw_tokens(logits.clone(), row_key, hashes, Draw(0.7))
    alone = [draw_tokens(logits[i : i + 1].clone(), row_key[i : i + 1], hashes, Draw(0.7)) for i in (6, 2, 0)]
    assert [int(t) for t in alone] == together[[6, 2, 0]].tolist()
    assert len(set(together.tolist())) > 4


# --- temperature and filters


def test_temperature() -> None:
    logits = [1.0, 3.0, 3.0, 2.0]
    assert set(draws(logits, keys(50), Draw(temperature=0))) == {1}
    num = 20_000
    counts = np.bincount(draws(logits, keys(num), Draw(temperature=2)), minlength=4)
    weights = np.exp([0.5, 1.5, 1.5, 1.0])
    assert chi_square(counts, weights / weights.sum() * num) < 16.3  # 3 degrees of freedom


def test_filters_by_hand() -> None:
    # shares 0.4, 0.3, 0.2, 0.1 in the order 2, 0, 3, 1
    logits = torch.tensor([[0.3, 0.1, 0.4, 0.2]]).log()
    kept = lambda top_k, top_p: (filter_logits(logits, top_k, top_p) > -INF)[0].nonzero()[:, 0].tolist()
    assert kept(0, 1.0) == [0, 1, 2, 3]
    assert kept(1, 1.0) == [2]
    assert kept(3, 1.0) == [0, 2, 3]
    assert kept(9, 1.0) == [0, 1, 2, 3]
    assert kept(0, 0.39) == [2]
    assert kept(0, 0.41) == [0, 2], "the token that crosses the share stays"
    assert kept(0, 0.71) == [0, 2, 3]
    # among the two likeliest the shares are 4/7 and 3/7
    assert kept(2, 0.5) == [2]
    assert kept(2, 0.6) == [0, 2]
    assert kept(0, 1e-9) == [2]


def test_ties() -> None:
    equal = torch.zeros(1, 4)
    assert (filter_logits(equal, 2, 1.0) > -INF).sum() == 4, "what equals the k-th stays"
    assert (filter_logits(equal, 0, 0.5) > -INF)[0].tolist() == [True, True, False, False], "lower tokens come first"


@given(
    st.lists(st.lists(st.integers(-6, 6), min_size=5, max_size=5), min_size=1, max_size=4),
    st.integers(0, 6),
    st.floats(0.05, 1.0),
)
@settings(max_examples=80, deadline=None)
def test_filters_equal_a_slow_reference(rows: list[list[int]], top_k: int, top_p: float) -> None:
    logits = torch.tensor(rows, dtype=torch.float32)
    found = filter_logits(logits, top_k, top_p)
    for row, filtered in zip(logits.tolist(), found.tolist(), strict=True):
        order = sorted(range(5), key=lambda i: (-row[i], i))
        smallest = row[order[min(top_k, 5) - 1]] if top_k else -INF
        order = [i for i in order if row[i] >= smallest]
        total, reached, kept = sum(math.exp(row[i]) for i in order), 0.0, set()
        for i in order:
            if reached / total < top_p - 1e-6 or not kept:
                kept.add(i)
            elif reached / total < top_p + 1e-6:  # too close to say
                kept |= {i} if filtered[i] > -INF else set()
            reached += math.exp(row[i])
        assert {i for i in range(5) if filtered[i] > -INF} == kept
        assert all(filtered[i] == row[i] for i in kept)


def test_filtered_tokens_are_never_drawn() -> None:
    num = 5000
    counts = np.bincount(draws([0.0, 1.0, 2.0, 3.0], keys(num), Draw(1.0, top_k=2)), minlength=4)
    assert counts[:2].sum() == 0
    share = 1 / (1 + math.e)
    assert counts[2] / num == pytest.approx(share, abs=4 * math.sqrt(share / num))
