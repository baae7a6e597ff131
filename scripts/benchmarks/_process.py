"""Where the programs of a benchmark run, one after the other, heard only when one fails."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

SHOWN_CHARACTERS = 4000


@contextmanager
def directory(kept: Path | None) -> Iterator[Path]:
    """The place for model, data, runs: what was asked for, or one that is gone afterwards."""
    if kept is not None:
        kept.mkdir(parents=True, exist_ok=True)
        yield kept.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="rlhf-benchmark-") as path:
        yield Path(path)


def run_quietly(argv: Sequence[str | Path], env: Mapping[str, str], directory: Path) -> None:
    """Run a program in `directory`. Ends the benchmark with the end of its output when it fails."""
    words = [str(word) for word in argv]
    done = subprocess.run(
        words, env=env, cwd=directory, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(words[:4])} ... ended with {done.returncode}:\n{done.stdout[-SHOWN_CHARACTERS:]}")
