"""A job of fake ranks under a real front process and a real launcher, for the tests to poke."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 60.0  # a loaded machine takes its time to import torch in the launcher


class Job:
    """front: the process; output: all that it and its ranks showed on the terminal, complete after `wait`."""

    def __init__(self, run_dir: Path, deed: dict[str, Any], launch: dict[str, Any], module: str = "", **popen: Any):
        self.run_dir = run_dir
        (run_dir / "config.yaml").write_text(yaml.safe_dump(deed))
        words = [sys.executable, "-m", "tests.launch_front", str(run_dir), yaml.safe_dump(launch)]
        env = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")} | popen.pop("env", {})
        self._shown = (run_dir / "shown").open("w+b")
        streams = {"stdin": subprocess.DEVNULL, "stdout": self._shown, "stderr": subprocess.STDOUT}
        self.front = subprocess.Popen([*words, *([module] if module else [])], cwd=ROOT, env=env, **(streams | popen))

    def wait(self, seconds: float = PATIENCE) -> int:
        return self.front.wait(seconds)

    @property
    def output(self) -> str:
        return (self.run_dir / "shown").read_text()

    def log(self, rank: int) -> str:
        return (self.run_dir / "logs" / f"rank_{rank}.log").read_text()

    def pid(self, rank: int | str) -> int:
        return int((self.run_dir / f"pid_{rank}").read_text())

    def wait_for_files(self, *names: str) -> None:
        def all_there() -> bool:
            assert self.front.poll() is None, f"the front ended early: {self.output}"
            return all((self.run_dir / name).exists() for name in names)

        until(all_there, PATIENCE)

    def env(self, rank: int) -> dict[str, str]:
        return yaml.safe_load((self.run_dir / f"env_{rank}").read_text())


def until(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def gone(pid: int) -> bool:
    """Whether a process has ended (a zombie that init has not collected yet has)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True
