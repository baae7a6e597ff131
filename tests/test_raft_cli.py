"""`rlhf raft` as a user types it: killed at a random moment and started again."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.rundir import read_manifest
from rlhf_cli.runtime.metrics import read_metrics
from tests.command_line import finish, start
from tests.raft_cases import Given, equal, trail, weights

# Slow enough that a kill can hit the scoring, too.
SLOW_REWARD = """
import time
def slow(prompts, responses, **columns):
    time.sleep(0.1)
    return [response.count("e") / max(1, len(response)) for response in responses]
"""


@pytest.mark.slow
@pytest.mark.distributed
def test_killed_at_a_random_moment_it_ends_with_the_same_weights(
    run_on_ranks: Callable[..., list[Any]], tmp_path: Path
) -> None:
    """Two ranks; the uninterrupted run is one of a pool."""
    given = Given(tmp_path)
    (tmp_path / "slow.py").write_text(SLOW_REWARD)
    source = f"[{{type: function, path: {tmp_path / 'slow.py'}, function: slow}}]"
    words = given.words(reward__sources=source, raft__num_iterations=4, launch__num_processes=2)
    run_on_ranks(2, "tests.raft_cases:run_raft", run_dir=str(tmp_path / "whole"), overrides=words)
    killed = tmp_path / "killed"
    front = start("raft", killed, words)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (killed / "samples" / ".iteration_01").is_dir():
        assert front.poll() is None, (tmp_path / "front.log").read_text()
        time.sleep(0.01)
    wait = random.uniform(0, 2)
    time.sleep(wait)
    front.send_signal(signal.SIGKILL)
    front.wait()
    assert read_manifest(killed)["status"] == "running", f"after {wait} s"
    finish("raft", killed, words)
    for model in ("model", "last_policy"):
        one, two = tmp_path / "whole" / model, killed / model
        assert one.is_dir() == two.is_dir()
        assert not one.is_dir() or equal(weights(tmp_path / "whole", model), weights(killed, model)), f"after {wait} s"
    for iteration in (1, 2, 3, 4):
        assert trail(killed, iteration) == trail(tmp_path / "whole", iteration), f"after {wait} s"
    assert [line["step"] for line in read_metrics(killed)] == [0, 1, 2, 3, 4]
