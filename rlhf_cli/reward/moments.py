"""Mean and standard deviation of all rewards so far, to normalise with (Chan, Golub and LeVeque 1979)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

# A spread that equal scores show by rounding alone (fp32 eps is 1.2e-7) is none.
LEAST_STD = 1e-6  # relative to the mean


@dataclass
class RunningMoments:
    """Of the population of all values seen. m2: sum of squared distances from the mean."""

    count: int = 0
    mean: float = 0.0
    m2: float = 0.0

    def update(self, values: Tensor) -> None:
        """Take in a batch (N,), finite."""
        if not len(values):
            return
        values = values.double()
        assert torch.isfinite(values).all(), "a reward that is no number"
        mean = float(values.mean())
        m2 = float(((values - mean) ** 2).sum())
        total = self.count + len(values)
        step = mean - self.mean if self.count else 0.0
        self.m2 += m2 + step**2 * self.count * len(values) / total
        self.mean = self.mean + step * len(values) / total if self.count else mean
        self.count = total

    @property
    def std(self) -> float:
        """Of the population; 1 where there is nothing to tell it from: fewer than two values, or equal ones."""
        if self.count < 2:
            return 1.0
        std = math.sqrt(self.m2 / self.count)
        return std if std > LEAST_STD * abs(self.mean) else 1.0

    def normalise(self, values: Tensor) -> Tensor:
        """(N,) -> (N,) float64, less the mean, over the std."""
        return (values.double() - self.mean) / self.std

    def as_dict(self) -> dict[str, float]:
        """For a checkpoint; JSON keeps every bit."""
        return {"count": self.count, "mean": self.mean, "m2": self.m2}

    @classmethod
    def from_dict(cls, values: Mapping[str, float]) -> RunningMoments:
        """The inverse of as_dict."""
        return cls(int(values["count"]), float(values["mean"]), float(values["m2"]))
