"""The production update reaches the optimum of tasks whose optimum is known (tests/ppo_exact.py)."""

from __future__ import annotations

from typing import Any

import pytest

from tests.ppo_exact import TASKS

pytestmark = pytest.mark.distributed  # an engine needs a process group, if only of one


@pytest.mark.parametrize("advantage", ["gae", "rloo", "grpo", "reinforce++"])
@pytest.mark.parametrize("task", TASKS)
def test_the_optimum_is_reached(run_on_ranks: Any, task: str, advantage: str) -> None:
    found = run_on_ranks(1, "tests.ppo_exact:solve_task", name=task, advantage=advantage)[0]
    assert found.best - found.start > 0.2  # there is something to gain
    assert found.recovered >= 0.95, found
    assert found.kl <= 0.1, found
