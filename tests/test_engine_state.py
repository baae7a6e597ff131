"""Optimizer state by parameter name: written on one layout, read on another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from rlhf_cli.runtime.engine_state import saved_steps
from tests.dist_cases import held_over_change_plain, tiny_llama

pytestmark = pytest.mark.distributed


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def largest_difference(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
    assert a.keys() == b.keys()
    return max(float(np.abs(a[name] - b[name]).max()) for name in a)


@pytest.mark.parametrize(
    ("world", "stage", "dtype"),
    [(1, 2, "fp32"), (2, 1, "bf16"), (2, 2, "fp32"), (2, 2, "bf16"), (2, 3, "fp32"), (2, 3, "bf16")],
)
def test_resume_on_the_same_layout_is_bitwise(
    run_on_ranks: Any, tmp_path: Path, world: int, stage: int, dtype: str
) -> None:
    case = {"stage": stage, "dtype": dtype, "run_dir": str(tmp_path)}
    whole = run_on_ranks(world, "tests.dist_cases:train_and_save", **case)
    resumed = run_on_ranks(world, "tests.dist_cases:resume", **case)
    for one, other in zip(whole, resumed, strict=True):
        assert one[0] == other[0]
        assert same(one[1], other[1])
        assert one[2] == other[2]  # the random numbers go on
        assert other[3]
    if world > 1:
        assert whole[0][2] != whole[1][2]


@pytest.mark.parametrize(
    ("world", "stage", "other_world", "other_stage"), [(2, 2, 1, 2), (2, 3, 2, 2), (2, 3, 1, 1), (1, 0, 2, 3)]
)
def test_resume_on_another_layout(
    run_on_ranks: Any, tmp_path: Path, world: int, stage: int, other_world: int, other_stage: int
) -> None:
    case = {"dtype": "fp32", "run_dir": str(tmp_path)}
    whole = run_on_ranks(world, "tests.dist_cases:train_and_save", stage=stage, **case)[0]
    resumed = run_on_ranks(other_world, "tests.dist_cases:resume", stage=other_stage, **case)
    again = run_on_ranks(other_world, "tests.dist_cases:resume", stage=other_stage, **case)
    assert np.allclose(whole[0], resumed[0][0], rtol=0, atol=1e-5)
    assert largest_difference(whole[1], resumed[0][1]) < 1e-5
    assert all(result[3] == (world == other_world) for result in resumed)
    assert [result[2] for result in resumed] == [result[2] for result in again]  # reseeded, always alike
    assert same(resumed[0][1], again[0][1])


@pytest.mark.slow
def test_resume_on_more_ranks(run_on_ranks: Any, tmp_path: Path) -> None:
    # 16 rows do not divide among 3 ranks, so the 3 ranks only load and save again; 2 ranks go on from theirs.
    case = {"dtype": "fp32", "stage": 3, "run_dir": str(tmp_path)}
    whole = run_on_ranks(2, "tests.dist_cases:train_and_save", **case)[0]
    before = run_on_ranks(3, "tests.dist_cases:load_and_save", **case)
    assert len({str(state) for state in before}) == 1
    resumed = run_on_ranks(2, "tests.dist_cases:resume", **case)[0]
    assert largest_difference(whole[1], resumed[1]) == 0.0


@pytest.mark.parametrize(("world", "stage"), [(1, 2), (2, 1), (2, 3)])
def test_state_held_over_a_change_of_trainable_parameters(run_on_ranks: Any, world: int, stage: int) -> None:
    result = run_on_ranks(world, "tests.dist_cases:held_over_change", stage=stage)[0]
    assert largest_difference(result, held_over_change_plain()) < 1e-5


@pytest.mark.parametrize(("stage", "dtype"), [(1, "bf16"), (2, "fp32"), (3, "bf16")])
def test_a_destroyed_engine_leaves_nothing_behind(run_on_ranks: Any, stage: int, dtype: str) -> None:
    found = run_on_ranks(2, "tests.dist_cases:engines_alive", stage=stage, dtype=dtype)[0]
    assert [alive for alive, _ in found] == [1, 1, 1]
    assert len({hooks for _, hooks in found}) == 1


def test_files(run_on_ranks: Any, tmp_path: Path) -> None:
    run_on_ranks(2, "tests.dist_cases:train_and_save", stage=3, dtype="bf16", run_dir=str(tmp_path), after=0)
    directory = tmp_path / "checkpoints" / "step_00000003" / "engine"
    assert sorted(p.name for p in directory.iterdir()) == [
        "index.json",
        "state-00000-000.safetensors",
        "state-00001-000.safetensors",
    ]
    model = tiny_llama()
    index = json.loads((directory / "index.json").read_text())
    assert {n: p["shape"] for n, p in index["parameters"].items()} == {
        n: list(p.shape) for n, p in model.named_parameters()
    }
    assert set(saved_steps(directory).values()) == {3}
    tensors = load_file(directory / "state-00000-000.safetensors") | load_file(
        directory / "state-00001-000.safetensors"
    )
    for name, parameter in model.named_parameters():
        for kind in ("master", "exp_avg", "exp_avg_sq"):
            tensor = tensors.pop(f"{kind}/{name}")
            assert (tensor.dtype, tensor.shape) == (np.float32, (parameter.numel(),))
    assert not tensors


def test_large_states_are_split_into_shards(run_on_ranks: Any, tmp_path: Path) -> None:
    names = run_on_ranks(2, "tests.dist_cases:export_in_small_shards", directory=str(tmp_path), shard_bytes=20_000)[0]
    # Embedding and head have 33 * 15 * 12 bytes = 5940 each, a block's MLP 3 * 25 * 15 * 12 = 13500: 57 kB in all.
    assert sum(name.startswith("state-00000") for name in names) >= 2
    assert sum(name.startswith("state-00001") for name in names) >= 2


def test_import_names_the_parameter_that_does_not_fit(run_on_ranks: Any, tmp_path: Path) -> None:
    message = run_on_ranks(2, "tests.dist_cases:import_into_other_model", directory=str(tmp_path))[0]
    assert (
        "3 differ, the first is model.layers.1.mlp.down_proj.weight (shape stored: [15, 25], in the model: none)"
        in (message)
    )


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_export_refuses_weights_that_left_the_optimizer(run_on_ranks: Any, tmp_path: Path, stage: int) -> None:
    messages = run_on_ranks(2, "tests.dist_cases:export_changed_weights", stage=stage, directory=str(tmp_path))
    assert any("['model.norm.weight']" in message for message in messages)  # whoever owns a piece of it
    assert all(message.startswith("weights differ from the optimizer's") for message in messages)


def test_loss_scaler_goes_on(run_on_ranks: Any, tmp_path: Path) -> None:
    skips, scale, iteration, fresh, restored, restored_iteration = run_on_ranks(
        1, "tests.dist_cases:scaler_over_resume", directory=str(tmp_path)
    )[0]
    assert skips == [True, True, False, False]
    # The scale starts at 2^16; the first overflow uses up the hysteresis of 2, the second halves the scale.
    assert (fresh, scale) == (65536, 32768)
    assert (restored, restored_iteration) == (scale, iteration)
