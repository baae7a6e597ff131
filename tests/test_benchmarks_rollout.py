"""The rollout benchmark at toy size, its arithmetic and its table."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "scripts" / "benchmarks"


@pytest.fixture
def scripts() -> Iterator[Any]:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import _rollout_programs
        import rollout

        yield SimpleNamespace(programs=_rollout_programs, script=rollout)
    finally:
        sys.path.remove(str(BENCHMARKS))


def test_end_tokens_give_the_wanted_mean(scripts: Any) -> None:
    p = scripts.programs.end_share(19.5, 64)
    lengths = np.minimum(np.random.default_rng(0).geometric(p, 200_000), 64)
    assert lengths.mean() == pytest.approx(19.5, abs=0.15)  # its standard error is 0.04
    # one of two tokens ends: 1, or 2 at most: 1 + p' = 1.5
    assert scripts.programs.end_share(1.5, 2) == pytest.approx(0.5, abs=1e-6)


def test_lengths_end_at_the_first_end_token(scripts: Any) -> None:
    task = scripts.programs.Task([], [3, 4], 8)
    assert scripts.programs._length([1, 2, 4, 3, 1], task) == 3
    assert scripts.programs._length([1, 2], task) == 2


def test_bounds_by_hand(scripts: Any) -> None:
    shape = scripts.programs.Shape(
        hidden=8, layers=2, heads=2, kv_heads=1, vocab=100, batch=4, prompt=16, new=12, mean=12, ragged_prompts=4
    )
    width = shape.intermediate
    block = 2 * 64 * 1.5 + 3 * 8 * width  # q and o whole, k and v half; gate, up, down
    assert shape.matrix_parameters == 2 * block + 800
    # 12 tokens of prompt and 12 of response: 24 through the blocks, 12 through the head, 24²/2 pairs
    work = 2 * 2 * block * 24 + 2 * 800 * 12 + 4 * 2 * 8 * 288
    # a row holds 12 + 6 tokens on average, each with 2 · 2 · 8 / 2 numbers
    moved = 2 * ((2 * block + 800) / 4 + 16 * 18)
    found = scripts.script.bounds(shape, 12, 2, flops=1e6, bandwidth=1e6)
    assert found.compute == pytest.approx(12 * 1e6 / work)
    assert found.bandwidth == pytest.approx(1e6 / moved)


def test_table_shows_medians_and_ratios(scripts: Any) -> None:
    """The second run met a busy machine: 300/200, 100/100, 400/200."""
    speeds = {
        "ours": scripts.script.Speed([300, 100, 400], [90]),
        "generate": scripts.script.Speed([200, 100, 200], [30]),
    }
    bounds = scripts.script.Bounds(1000, 2000)
    lines = scripts.script.table(speeds, bounds, bounds).splitlines()
    assert lines[2] == "| ours | 300 | 100% | 1.50 (1.00 to 2.00) | 90 | 0% | 3.00 (3.00 to 3.00) |"
    assert lines[3] == "| generate | 200 | 50% | 1.00 (1.00 to 1.00) | 30 | 0% | 1.00 (1.00 to 1.00) |"
    alone = scripts.script.table({"ours": speeds["ours"]}, bounds, bounds).splitlines()
    assert alone[2] == "| ours | 300 | 100% |  | 90 | 0% |  |"
    assert lines[5].startswith("| bound by bandwidth | 2,000 |")
    assert len({line.count("|") for line in lines}) == 1


@pytest.mark.slow
def test_all_programs_run_at_toy_size(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "rollout.py", "--quick", "--threads", "1", "--dtype", "fp32"],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    rows = [line.split("|") for line in done.stdout.splitlines() if line.startswith("| ")]
    assert [row[1].strip() for row in rows][1:5] == ["ours", "ours+refill", "generate", "continuous"]
    assert all(float(row[column].replace(",", "")) > 0 for row in rows[1:] for column in (2, 5))
