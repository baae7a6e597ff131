"""The command line as a user types it, in processes of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from rlhf_cli.runtime.metrics import read_metrics

RLHF = [sys.executable, "-m", "rlhf_cli"]


def rlhf(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, with its output."""
    return subprocess.run([*RLHF, *arguments], capture_output=True, text=True, check=False, cwd=cwd, timeout=300)


def start(stage: str, run_dir: Path, overrides: list[str]) -> subprocess.Popen[str]:
    """A front that is left running; its words go to front.log beside the run directory."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    log = (run_dir.parent / "front.log").open("a")
    return subprocess.Popen(
        [*RLHF, stage, *overrides, f"run_dir={run_dir}"], env=env, stdout=log, stderr=log, text=True
    )


def wait_for_step(run_dir: Path, step: int, front: subprocess.Popen[str]) -> None:
    """Until that step stands in metrics.jsonl."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert front.poll() is None, (run_dir.parent / "front.log").read_text()
        if any(line["step"] >= step for line in read_metrics(run_dir)):
            return
        time.sleep(0.01)
    raise AssertionError("the run does not get on")


def finish(stage: str, run_dir: Path, overrides: list[str]) -> None:
    """Run to the good end."""
    front = start(stage, run_dir, overrides)
    assert front.wait(timeout=300) == 0, (run_dir.parent / "front.log").read_text()
