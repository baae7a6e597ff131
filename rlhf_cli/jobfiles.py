"""What the front process and the ranks tell each other through the run directory: logs, failures, the stop request.

Shared by both columns; standard library only.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal, NamedTuple

# The front's terminal travels as this descriptor of rank 0; absent when ranks live on other machines.
TERMINAL_FD_VARIABLE = "RLHF_TERMINAL_FD"
# The process whose death must end the ranks; absent when ranks live on other machines.
FRONT_PID_VARIABLE = "RLHF_FRONT_PID"
# How many ranks the front has planned with; a launcher may start another number.
PLANNED_RANKS_VARIABLE = "RLHF_PLANNED_RANKS"
# GPUs that the front has counted where it runs; absent when there are none, or none shall be used.
COUNTED_GPUS_VARIABLE = "RLHF_COUNTED_GPUS"
# Begins the line that each start adds to a log.
START_MARK = "===== "

NoteKind = Literal["user", "crash", "interrupted"]


class FailureNote(NamedTuple):
    """What a rank says about its own end.

    time: seconds since the epoch; kind: "user" (an RlhfError), "crash" (any other exception) or "interrupted" (stopped
    before there was anything to save); traceback: empty for "user" and "interrupted"; exit_code: of the rank.
    """

    time: float
    rank: int
    host: str
    kind: NoteKind
    message: str
    traceback: str
    exit_code: int


def rank_log(run_dir: Path, rank: int) -> Path:
    """Everything that rank printed."""
    return run_dir / "logs" / f"rank_{rank}.log"


def launcher_log(run_dir: Path) -> Path:
    """What torch elastic, DeepSpeed's runner or srun printed, and what a rank printed before it opened its own log."""
    return run_dir / "logs" / "launcher.log"


def console_log(run_dir: Path) -> Path:
    """Rank 0's messages for the terminal, where it cannot reach the terminal itself (several machines)."""
    return run_dir / "logs" / "console.log"


def write_note(run_dir: Path, note: FailureNote) -> None:
    """Leave a rank's note; complete or absent at any moment."""
    _write_whole(run_dir / "logs" / f"error_rank_{note.rank}.json", json.dumps(note._asdict(), indent=1) + "\n")


def read_notes(run_dir: Path) -> list[FailureNote]:
    """The notes of this start, the earliest first."""
    found: list[dict[str, Any]] = [json.loads(p.read_text(encoding="utf-8")) for p in _note_paths(run_dir)]
    return sorted((FailureNote(**note) for note in found), key=lambda note: note.time)


def request_stop(run_dir: Path, signum: int) -> None:
    """Ask every rank to save and end. A file, because it reaches all machines and no launcher in between acts on it."""
    _write_whole(_stop_path(run_dir), f"{signum}\n")


def stop_requested(run_dir: Path) -> int:
    """The signal that asked the job to stop, or 0."""
    try:
        return int(_stop_path(run_dir).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return 0


def forget_earlier_start(run_dir: Path) -> None:
    """Remove the stop request and the notes of an earlier start, so that none is taken for this one's."""
    for path in [_stop_path(run_dir), *_note_paths(run_dir)]:
        path.unlink(missing_ok=True)


def _stop_path(run_dir: Path) -> Path:
    return run_dir / ".stop"


def _note_paths(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "logs").glob("error_rank_*.json"))


def _write_whole(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)
