"""Fixtures for all tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.ranks import Pools


@pytest.fixture(scope="session")
def run_on_ranks() -> Iterator[Callable[..., list[Any]]]:
    """run_on_ranks(world_size, "tests.module:function", timeout=120.0, **json_args) -> results in rank order."""
    pools = Pools()
    yield pools.run
    pools.close()
