"""`rlhf report RUN_DIR... [out=FILE.html]`: from words to a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rlhf_cli.errors import ConfigError, DataError, Problem
from rlhf_cli.files import write_text
from rlhf_cli.report.find import find_runs
from rlhf_cli.report.page import page
from rlhf_cli.report.runs import read_ancestors, read_runs
from rlhf_cli.rundir import utc_now

DEFAULT_OUT = "report.html"
USAGE = "rlhf report RUN_DIR... [out=FILE.html]"


class Written(NamedTuple):
    """path: the page; num_runs: those it shows; problems: what could not be read of them, with the run's name."""

    path: Path
    num_runs: int
    problems: list[str]


def write_report(places: Sequence[Path], out: Path) -> Written:
    """One page of all runs that are named or lie below what is named.

    Raises DataError when there is no run, or when the page cannot be written.
    """
    if out.suffix not in (".html", ".htm"):
        raise DataError(f"out={out}: a page is written; end the name in .html")
    runs = read_runs(find_runs(places))
    document = page(runs, read_ancestors(runs), utc_now())
    try:
        write_text(out, document)
    except OSError as error:
        raise DataError(f"out={out} cannot be written ({error.strerror}); name another place") from None
    return Written(out, len(runs), [f"{run.name}: {problem}" for run in runs for problem in run.problems])


def read_words(words: Sequence[str]) -> tuple[list[Path], Path]:
    """(what is named, the file) of a command line. A directory may have = in its name, as those of sweeps do.

    Raises ConfigError when nothing is named.
    """
    outs = [word.removeprefix("out=") for word in words if word.startswith("out=")]
    places = [Path(word).expanduser() for word in words if not word.startswith("out=")]
    flags = [word for word in words if word.startswith("-")]
    if flags:
        raise ConfigError([Problem("", f"no flag {flags[0]!r}; usage: {USAGE}")])
    if not places:
        raise ConfigError([Problem("", f"no run directory is named; usage: {USAGE}")])
    if len(outs) > 1:
        raise ConfigError([Problem("out", f"is given {len(outs)} times; usage: {USAGE}")])
    return places, Path(outs[0] if outs else DEFAULT_OUT).expanduser()
