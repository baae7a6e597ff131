"""Learning rates by hand."""

from __future__ import annotations

import math

import pytest

from rlhf_cli.ops.schedule import learning_rate, warmup_steps
from rlhf_cli.schema import OptimConfig


def rates(total: int, **options: object) -> list[float]:
    optim = OptimConfig(**({"lr": 1.0, "warmup_ratio": 0.0} | options))  # type: ignore[arg-type]
    return [learning_rate(optim, step, total) for step in range(total)]


def test_shapes_over_four_steps() -> None:
    assert rates(4, schedule="constant") == [1.0] * 4
    assert rates(4, schedule="linear") == pytest.approx([1.0, 0.75, 0.5, 0.25]), "towards 0"
    assert rates(4, schedule="linear", min_lr_ratio=0.2) == pytest.approx([1.0, 0.8, 0.6, 0.4])
    half = math.sqrt(0.5) / 2  # cos(pi/4) / 2
    shares = [1.0, 0.5 + half, 0.5, 0.5 - half]
    assert rates(4, schedule="cosine") == pytest.approx([0.1 + 0.9 * share for share in shares]), "towards a tenth"
    assert rates(4, schedule="cosine", min_lr_ratio=0.0) == pytest.approx(shares)
    assert rates(4, schedule="inverse_sqrt") == pytest.approx([1.0, 0.5**0.5, 3**-0.5, 0.5])


def test_the_warm_up_reaches_the_rate_with_its_last_step() -> None:
    found = rates(10, schedule="linear", warmup_ratio=0.4, min_warmup_steps=2)
    assert found == pytest.approx([0.25, 0.5, 0.75, 1.0, *(1 - i / 6 for i in range(6))])
    noam = rates(9, schedule="inverse_sqrt", warmup_ratio=0.4, min_warmup_steps=0)
    assert noam[3] == 1.0, "the peak"
    assert noam[8] == pytest.approx(math.sqrt(4 / 9))


@pytest.mark.parametrize(("ratio", "least", "total", "steps"), [(0.03, 5, 1000, 30), (0.03, 5, 100, 5), (0.5, 0, 3, 2),
                                                                (0.03, 5, 3, 3), (0.0, 5, 100, 0)])  # fmt: skip
def test_how_long_the_warm_up_is(ratio: float, least: int, total: int, steps: int) -> None:
    assert warmup_steps(OptimConfig(warmup_ratio=ratio, min_warmup_steps=least), total) == steps
