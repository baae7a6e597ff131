"""Fixtures for all tests."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.ranks import Pools

# A shell's background job ignores Ctrl-C, and so would every program that a test starts and stops with it.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def run_on_ranks() -> Iterator[Callable[..., list[Any]]]:
    """run_on_ranks(world_size, "tests.module:function", timeout=120.0, **json_args) -> results in rank order."""
    pools = Pools()
    yield pools.run
    pools.close()
