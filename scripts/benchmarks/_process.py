"""One program after the other, heard only when it fails."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

SHOWN_CHARACTERS = 4000


def run_quietly(argv: Sequence[str | Path], env: Mapping[str, str], directory: Path) -> None:
    """Run a program in `directory`. Ends the benchmark with the end of its output when it fails."""
    words = [str(word) for word in argv]
    done = subprocess.run(
        words, env=env, cwd=directory, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(words[:4])} ... ended with {done.returncode}:\n{done.stdout[-SHOWN_CHARACTERS:]}")
