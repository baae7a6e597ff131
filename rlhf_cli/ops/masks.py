"""Sums, means and whitening over kept entries.

Shapes: values and keep_mask have the same shape, (B, T) for tokens; keep_mask is bool, True = a real token.
What stands at a dropped position never matters, not even nan.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Reduce = Callable[[Tensor], Tensor]
"""Sums a tensor over all ranks."""


def masked_sum(values: Tensor, keep_mask: Tensor, dim: int | None = None) -> Tensor:
    """Σ of the kept values: a scalar, or without axis `dim`."""
    kept = values.masked_fill(~keep_mask, 0.0)
    return kept.sum() if dim is None else kept.sum(dim)


def masked_mean(values: Tensor, keep_mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean of the kept values: a scalar, or without axis `dim`; 0 where nothing is kept."""
    count = keep_mask.sum() if dim is None else keep_mask.sum(dim)
    return masked_sum(values, keep_mask, dim) / count.clamp(min=1)


def whiten(values: Tensor, keep_mask: Tensor, shift_mean: bool = True, reduce: Reduce | None = None) -> Tensor:
    """(values − mean) / sqrt(var + 1e-8) over the kept entries of all ranks, the same shape; 0 where dropped.

    values (B, T), keep_mask (B, T). var is the biased variance. shift_mean=False adds the mean back afterwards.
    reduce: sums over ranks; None = this rank's entries are all there are. Every rank must call, even with no entry.
    """
    reduce = reduce or (lambda t: t)
    # fp64 sums, and deviations from the mean in a second round: E[x²] − E[x]² loses digits when |mean| >> std.
    wide = values.double()
    count, total = reduce(torch.stack([keep_mask.sum().double(), masked_sum(wide, keep_mask)])).unbind()
    mean = total / count.clamp(min=1)
    variance = reduce(masked_sum((wide - mean).square(), keep_mask)) / count.clamp(min=1)
    whitened = (wide - mean) * torch.rsqrt(variance + 1e-8)
    if not shift_mean:
        whitened = whitened + mean
    return whitened.masked_fill(~keep_mask, 0.0).to(values.dtype)
