"""Frozen weights between uses: exact when they come back, and really gone in between."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = pytest.mark.distributed
CASES = "tests.frozen_cases:"


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("home", ["keep", "shard", "offload"])
def test_the_same_bits_come_back(run_on_ranks: Any, world: int, home: str) -> None:
    for equal, held_bytes, elements in run_on_ranks(world, f"{CASES}hold", home=home):
        assert equal
        if home == "keep":
            assert held_bytes == 4 * 35 + 2 * 15 + 8
            assert elements == 35 + 15 + 1
        else:
            # 140, 30 and 8 bytes, each up to a multiple of 16: 144 + 32 + 16 = 192, of which each rank has its part.
            assert held_bytes == 192 // world
            assert elements == 0


def test_sharding_gives_memory_back(run_on_ranks: Any) -> None:
    size = 12 * 2048**2 * 4 / 2**20  # 192 MiB
    for found in run_on_ranks(2, f"{CASES}memory", home="shard"):
        assert found["loaded"] > 0.95 * size
        assert found["at rest"] < 0.6 * size
        assert found["in use"] > 1.4 * size  # the share and the whole
        assert found["after"] < 0.6 * size
    for found in run_on_ranks(2, f"{CASES}memory", home="keep"):
        assert min(found.values()) > 0.95 * size
