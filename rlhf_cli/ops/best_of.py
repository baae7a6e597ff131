"""Measures of the best of several samples."""

from __future__ import annotations

import math


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """The unbiased estimate of the chance that one of k samples is correct, from num_samples of which num_correct are.

    1 - C(n - c, k) / C(n, k) as a product, in which nothing overflows (Chen et al., arXiv 2107.03374, 2.1). Raises
    ValueError for numbers that cannot be, more than num_samples for k among them.
    """
    if not 0 <= num_correct <= num_samples or not 1 <= k <= num_samples:
        raise ValueError(f"{num_correct} of {num_samples} samples, k = {k}")
    wrong = num_samples - num_correct
    return 1.0 - math.prod(1 - k / i for i in range(wrong + 1, num_samples + 1)) if wrong >= k else 1.0


def best_of_n_kl(n: int) -> float:
    """The KL of the best of n samples to one sample, in nats: log n - (n - 1) / n.

    Where rewards are never equal; where they may be, not more (Stiennon et al., arXiv 2009.01325, G.3; Beirami et al.,
    arXiv 2401.01879).
    """
    return math.log(n) - (n - 1) / n
