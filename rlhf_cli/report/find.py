"""From the words of a command line to run directories: given outright, or anywhere below a folder."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from rlhf_cli.errors import DataError, ModelError
from rlhf_cli.rundir import read_manifest

STAGE_LINE = re.compile(r"^stage: *\S", re.MULTILINE)  # of a frozen config
DEPTH = 4  # folders below a named one that are looked into: runs/STAGE/SWEEP/RUN is three


def find_runs(places: Sequence[Path]) -> list[Path]:
    """Every run directory that is named or lies below a named folder, resolved, each once.

    Raises DataError for what does not exist and for a folder without a run.
    """
    found: list[Path] = []
    for place in places:
        if not place.is_dir():
            raise DataError(f"{place}: no such directory; name run directories, or a folder that holds some")
        below = list(_runs_below(place))
        if not below:
            raise DataError(
                f"{place} holds no run (no manifest.json or config.yaml of `rlhf` in it, nor in the folders below);"
                " name run directories, or a folder that holds some"
            )
        found += [path.resolve() for path in below]
    return list(dict.fromkeys(found))


def is_run(place: Path) -> bool:
    """Whether a directory is a run, however little of it is there or can be read."""
    if (place / "manifest.json").is_file():
        try:
            return "stage" in read_manifest(place)
        except (ModelError, OSError):
            return True  # damaged; the report says so
    frozen = place / "config.yaml"
    try:
        return frozen.is_file() and bool(STAGE_LINE.search(frozen.read_text(encoding="utf-8", errors="replace")))
    except OSError:
        return False


def _runs_below(place: Path) -> Iterator[Path]:
    seen: dict[Path, int] = {}  # how deep; links are followed, and may lead back
    for folder, below, _ in os.walk(place, followlinks=True):
        path = Path(folder)
        real, depth = path.resolve(), len(path.parts) - len(place.parts)
        if seen.get(real, DEPTH + 1) <= depth:
            below.clear()
            continue
        seen[real] = depth
        if is_run(path):
            yield path
            below.clear()  # what lies in a run belongs to it
        elif depth >= DEPTH:
            below.clear()
        else:
            below[:] = sorted(name for name in below if not name.startswith("."))


def short_names(paths: Sequence[Path]) -> list[str]:
    """Of each path as many of its last parts as no other one ends in."""
    endings = Counter(path.parts[-depth:] for path in paths for depth in range(1, len(path.parts) + 1))
    shortest = (
        next(ending for n in range(1, len(p.parts) + 1) for ending in [p.parts[-n:]] if endings[ending] == 1)
        for p in paths
    )
    return [str(Path(*ending)) for ending in shortest]
