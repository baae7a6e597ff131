"""Which rows a run trained on, so that a later stage finds out when it evaluates on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rlhf_cli.errors import ModelError
from rlhf_cli.rundir import read_manifest

FILE = "train_rows.npy"


class Seen(NamedTuple):
    """run_dir: an earlier run, or this one; rows: how many evaluation rows it trained on; None: it cannot be known."""

    run_dir: str
    rows: int | None

    def warning(self, total: int, own: bool) -> str:
        """A line for the user. total: evaluation rows in all; own: it is the run that evaluates."""
        if self.rows is None:
            return (
                f"warning: {self.run_dir} does not say which rows it trained on ({FILE} is missing);"
                " evaluation rows may be among them"
            )
        if own:
            return (
                f"warning: {self.rows} of {total} evaluation rows are among the training rows, too, so the evaluation"
                " flatters the model; the data repeats itself (data.deduplicate=true drops rows that come again)"
            )
        return (
            f"warning: {self.rows} of {total} evaluation rows were trained on in {self.run_dir}, so the evaluation"
            " flatters the model; hold the same rows out in every stage, or evaluate on others (data.eval_path)"
        )


def save_row_digests(run_dir: Path, digests: np.ndarray) -> None:
    """Keep the digests (N,) uint64 of the rows that a run trains on."""
    aside = run_dir / f".{FILE}.tmp"
    with aside.open("wb") as file:
        np.save(file, np.unique(digests))
    aside.rename(run_dir / FILE)


def find_seen(run_dir: Path, digests: np.ndarray, owners: np.ndarray) -> list[Seen]:
    """The runs among `run_dir` and all that it builds on which trained on rows with one of these digests.

    digests (N,) uint64: of texts; owners (N,): the row that each text belongs to (a pair has two).
    """
    found = []
    for earlier in [str(run_dir), *_ancestors(run_dir)]:
        file = Path(earlier) / FILE
        if file.is_file():
            count = len(np.unique(owners[np.isin(digests, np.load(file))]))
            if count:
                found.append(Seen(earlier, count))
        elif not Path(earlier).is_dir() or _manifest(Path(earlier)).get("data"):
            found.append(Seen(earlier, None))
    return found


def _ancestors(run_dir: Path) -> list[str]:
    """Run directories that this one builds on, near ones first, each once."""
    found: list[str] = []
    waiting = [run_dir]
    while waiting:
        for parent in _manifest(waiting.pop(0)).get("parents") or []:
            if parent.get("run_dir") and parent["run_dir"] not in found:
                found.append(parent["run_dir"])
                waiting.append(Path(parent["run_dir"]))
    return found


def _manifest(run_dir: Path) -> dict[str, Any]:
    try:
        return read_manifest(run_dir)
    except ModelError:
        return {}  # a damaged relative is no reason to stop
