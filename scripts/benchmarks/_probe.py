"""What every compared process notes about itself. Standard library only: it also runs in TRL's environment."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Probe:
    """Memory and times of one training process.

    imports_mib: most memory held once everything is imported; peak_mib: most memory held by the end of the last step.
    times: wall-clock second at the end of each optimizer step; tokens: real tokens of each; samples: documents or pairs
    of each; losses: of each. figures: of each, for programs that have more to compare.
    """

    imports_mib: float = 0.0
    peak_mib: float = 0.0
    times: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    samples: list[int] = field(default_factory=list)
    figures: list[dict[str, float]] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)

    def step_ended(self) -> None:
        self.times.append(time.time())
        self.peak_mib = high_water_mib()

    def write(self, path: str) -> None:
        Path(path).write_text(json.dumps(asdict(self)), encoding="utf-8")


def high_water_mib() -> float:
    """Most resident memory this process ever had. Not ru_maxrss, which survives fork and exec."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024


def job_from_argv() -> dict[str, Any]:
    """The one argument of a compared process: its settings as JSON."""
    return json.loads(sys.argv[1])
