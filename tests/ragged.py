"""Random ragged batches for tests of per-token maths."""

from __future__ import annotations

from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

NAN = float("nan")


class Ragged(NamedTuple):
    """lengths of the rows; keep_mask (R, T), right-padded; seed for `draw`."""

    lengths: list[int]
    keep_mask: Tensor
    seed: int

    def draw(self, number: int, scale: float = 1.0, dropped: float = NAN) -> Tensor:
        """(R, T) fp64 normal numbers, another set for each `number`; `dropped` behind the end of each row."""
        generator = torch.Generator().manual_seed(1000 * self.seed + number)
        drawn = scale * torch.randn(self.keep_mask.shape, generator=generator, dtype=torch.float64)
        return drawn.masked_fill(~self.keep_mask, dropped)


def mask_of(lengths: list[int]) -> Tensor:
    """(R, T) with the first lengths[i] of row i kept; T is one more than the longest, so that all rows are padded."""
    return torch.arange(max(lengths) + 1)[None] < torch.tensor(lengths)[:, None]


@st.composite
def ragged(draw: st.DrawFn, min_rows: int = 1, max_rows: int = 5) -> Ragged:
    lengths = draw(st.lists(st.integers(1, 7), min_size=min_rows, max_size=max_rows))
    return Ragged(lengths, mask_of(lengths), draw(st.integers(0, 10**6)))
