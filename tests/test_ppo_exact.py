"""The production update reaches the optimum of tasks whose optimum is known (tests/ppo_exact.py)."""

from __future__ import annotations

from typing import Any

import pytest

from tests.ppo_exact import TASKS

pytestmark = pytest.mark.distributed  # an engine needs a process group, if only of one


@pytest.mark.parametrize("advantage", ["gae", "rloo", "grpo", "reinforce++"])
@pytest.mark.parametrize("task", [pytest.param(n, marks=pytest.mark.slow if n == "long" else ()) for n in TASKS])
def test_the_optimum_is_reached(run_on_ranks: Any, task: str, advantage: str) -> None:
    """With the KL penalty in the reward every estimator should: at the optimum score − β KL is the same for all
    answers, so whatever compares answers (rloo, grpo, also divided by a standard deviation) is zero there, and near it
    each pair of answers is pushed in the right direction. For gae and reinforce++ what is still to come is the same for
    all that can follow, a number that a critic can learn and that takes no side as a baseline."""
    found = run_on_ranks(1, "tests.ppo_exact:solve", timeout=500.0, name=task, advantage=advantage)[0]
    assert found.best - found.start > 0.2  # there is something to gain
    assert found.recovered >= 0.95, found
    assert found.kl <= 0.1, found
