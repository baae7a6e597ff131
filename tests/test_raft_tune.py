"""Fine-tuning on selected responses against one row after the other by hand: 1 and 2 ranks, each ZeRO stage."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import pytest

from rlhf_cli.raft.tune import learning_rates
from rlhf_cli.schema import RaftConfig, build
from tests.raft_tune_cases import Tuned, slow_tune

slow_tuned = lru_cache(maxsize=None)(slow_tune)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("world", "stage", "micro", "kind", "optimizer", "soft"),
    [
        (1, 0, 1, "llama", "fresh", False), (1, 2, 8, "llama", "fresh", False), (2, 2, 1, "llama", "fresh", False),
        (2, 3, 8, "llama", "fresh", False), (1, 3, 8, "llama", "continue", True), (2, 2, 1, "llama", "continue", True),
        (2, 0, 1, "llama", "continue", True), (2, 3, 1, "lora", "fresh", True),
    ],
)  # fmt: skip
def test_three_iterations_as_by_hand(
    run_on_ranks: Any, world: int, stage: int, micro: int, kind: str, optimizer: str, soft: bool
) -> None:
    """Moments and step counts are new in each iteration, or go on; so is the schedule."""
    given = {"kind": kind, "optimizer": optimizer, "soft": soft}
    results: list[Tuned] = run_on_ranks(world, "tests.raft_tune_cases:tune", stage=stage, micro=micro, **given)
    expected = slow_tuned(**given)
    for found in results:
        assert found.figures == results[0].figures
    for found, wanted in zip(results[0].figures, expected.figures, strict=True):
        assert found == pytest.approx(wanted, rel=1e-4, abs=1e-5)
    assert set(results[0].weights) == set(expected.weights)
    for name, weight in expected.weights.items():
        assert np.abs(results[0].weights[name] - weight).max() < 1e-5, name


def test_the_iterations_move_the_weights_far_beyond_the_tolerance() -> None:
    """And a new optimizer is another thing than one that goes on, soft weights than none."""
    cases = [("fresh", False), ("continue", True), ("fresh", True), ("continue", False)]
    ends = [slow_tuned("llama", *case).weights["model.layers.0.mlp.up_proj.weight"] for case in cases]
    for i, end in enumerate(ends):
        assert all(np.abs(end - other).max() > 1e-3 for other in ends[:i])


def test_the_schedule_of_each_iteration_or_of_all() -> None:
    values = {
        "stage": "raft", "model": {"path": "m"}, "data": {"path": "p"}, "train": {"global_batch_size": 4},
        "optim": {"lr": 1.0, "schedule": "linear", "warmup_ratio": 0.0, "min_lr_ratio": 0.0},
        "raft": {"num_iterations": 5, "batch_size": 8, "epochs": 2},
    }  # fmt: skip
    fresh = build(RaftConfig, values)
    # Where half of the responses are discarded, two steps are left of four.
    assert [learning_rates(fresh, 3, 2)(step) for step in range(2)] == [1.0, 0.5]
    values["raft"]["optimizer"] = "continue"  # type: ignore[index]
    on = build(RaftConfig, values)
    # 2 x 8 / 4 = 4 steps an iteration, 20 in all; iteration 3 begins at step 12, whatever was discarded
    assert [learning_rates(on, 3, 2)(step) for step in range(2)] == pytest.approx([0.4, 0.35])
