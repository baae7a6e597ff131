"""Best of several: against counting in fractions, and against the KL of an enumerated best-of-n."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest

from rlhf_cli.ops.best_of import best_of_n_kl, pass_at_k


@pytest.mark.parametrize("n", [1, 2, 5, 10, 200])
def test_pass_at_k_equals_counting(n: int) -> None:
    for correct in sorted({0, 1, n // 3, n - 1, n}):
        for k in sorted({1, min(2, n), n // 2 or 1, n}):
            counted = 1 - Fraction(math.comb(n - correct, k), math.comb(n, k))
            assert pass_at_k(n, correct, k) == pytest.approx(float(counted), abs=1e-12)


def test_large_numbers_do_not_overflow() -> None:
    assert pass_at_k(100_000, 10, 100) == pytest.approx(1 - (1 - 0.001) ** 10, rel=1e-3)
    assert pass_at_k(10_000, 0, 10_000) == 0
    assert pass_at_k(10_000, 1, 10_000) == 1


@pytest.mark.parametrize(("n", "correct", "k"), [(0, 0, 1), (3, 4, 1), (3, -1, 1), (3, 1, 0), (3, 1, 4)])
def test_numbers_that_cannot_be_are_refused(n: int, correct: int, k: int) -> None:
    with pytest.raises(ValueError, match=f"k = {k}"):
        pass_at_k(n, correct, k)


@pytest.mark.parametrize("n", [1, 2, 8])
def test_kl_of_the_best_of_n(n: int) -> None:
    """Of m equally likely answers with different rewards the best of n is answer i with chance (i^n - (i-1)^n) / m^n;
    its KL tends to the formula from below as m grows."""
    found = []
    for m in (100, 10_000):
        chances = [(i / m) ** n - ((i - 1) / m) ** n for i in range(1, m + 1)]
        found.append(sum(p * math.log(p * m) for p in chances if p > 0))
    assert found[0] - 1e-12 <= found[1] <= best_of_n_kl(n) + 1e-9
    assert found[1] == pytest.approx(best_of_n_kl(n), abs=2e-4)
