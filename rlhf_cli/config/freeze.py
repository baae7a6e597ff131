"""The run directory before the ranks start: is it new, finished, to be continued, or somebody else's?"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal, NamedTuple, TextIO

import yaml

from rlhf_cli.errors import ConfigError, Problem
from rlhf_cli.files import write_text
from rlhf_cli.rundir import has_iterations, read_manifest
from rlhf_cli.schema import flatten

# What may differ between the first start and the next, because it does not change the result.
MAY_DIFFER = (
    "run_dir", "resume", "launch.", "logging.", "deepspeed.", "train.micro_batch_size", "train.save_every",
    "train.keep_checkpoints", "data.cache_dir", "generation.batch_size", "generation.refill", "ppo.frozen",
    "raft.frozen", "raft.keep_models", "ppo.ptx.data.cache_dir",
)  # fmt: skip
MAY_GROW = ("train.max_steps", "train.epochs", "ppo.num_iterations", "raft.num_iterations")
# What flock(2) says on file systems without it: Lustre mounted without -o flock, some of NFS and FUSE.
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)


class Standing(NamedTuple):
    """state: new | unfinished | finished; notes: what to tell the user."""

    state: Literal["new", "unfinished", "finished"]
    notes: list[str]


def default_run_dir(stage: str, recipe: str | None, now: datetime | None = None) -> Path:
    """runs/<stage>/<recipe>-<UTC time>."""
    stamp = (now or datetime.now(timezone.utc)).strftime("%Y%m%d-%H%M%S")
    return Path("runs") / stage / (f"{recipe}-{stamp}" if recipe else stamp)


def standing(run_dir: Path, values: dict[str, Any], resume: str) -> Standing:
    """What a run directory means for this request.

    Raises ConfigError when the directory holds something else, another config, or a run although resume=never.
    """
    if run_dir.exists() and not run_dir.is_dir():
        raise ConfigError([Problem("run_dir", f"{run_dir} is a file")])
    frozen_path = run_dir / "config.yaml"
    if not frozen_path.is_file():
        foreign = [p.name for p in run_dir.iterdir() if not p.name.startswith(".")] if run_dir.is_dir() else []
        if foreign:
            names = ", ".join(sorted(foreign)[:3])
            raise ConfigError(
                [Problem("run_dir", f"{run_dir} is no run directory and not empty ({names} ...); name another")]
            )
        return Standing("new", [])
    if resume == "never":
        raise ConfigError(
            [Problem("run_dir", f"{run_dir} already holds a run; resume=auto continues it, or name another run_dir")]
        )
    if not _reached_a_step(run_dir):
        # A first start that failed over its data or its model must not bind the corrected one.
        return Standing("new", ["an earlier start never reached a step; starting over"])
    notes = _differences(run_dir, _read_frozen(frozen_path), values)
    if read_manifest(run_dir).get("status") == "complete":
        if not notes:
            return Standing("finished", [])
        if not _checkpoints(run_dir):
            grown = ", ".join(note.split()[0] for note in notes)
            raise ConfigError(
                [
                    Problem(
                        grown,
                        f"cannot grow: {run_dir} is finished and kept no checkpoint"
                        " (train.save_every=0); start from its model in another run_dir:"
                        f" model.path={run_dir}",
                    )
                ]
            )
    return Standing("unfinished", notes)


def _read_frozen(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        values = None
    if not isinstance(values, dict):
        raise ConfigError(
            [Problem("run_dir", f"{path} is damaged, so this run cannot go on; put it back, or name another run_dir")]
        )
    return values


def claim(run_dir: Path, state: str, values: dict[str, Any]) -> tuple[TextIO, Path]:
    """Take a run directory for a start in this state: (its lock, see there; the frozen config).

    Raises ConfigError when another process has it, or when it cannot be written to.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        held = lock(run_dir)
        if state == "new":
            clear_false_start(run_dir)
        return held, freeze(run_dir, values)
    except OSError as error:
        raise ConfigError(
            [Problem("run_dir", f"{run_dir} cannot be written to ({error}); make room or name another")]
        ) from None


def clear_false_start(run_dir: Path) -> None:
    """Remove what a start that never reached a step may have left for the next one to stumble over."""
    for name in ("tokenizer", "checkpoints", "tensorboard"):
        shutil.rmtree(run_dir / name, ignore_errors=True)
    (run_dir / "manifest.json").unlink(missing_ok=True)


def _reached_a_step(run_dir: Path) -> bool:
    metrics, scored = run_dir / "metrics.jsonl", run_dir / ".scores"  # what `rlhf score` has done so far
    begun = (metrics.is_file() and metrics.stat().st_size > 0) or bool(_checkpoints(run_dir)) or scored.is_dir()
    begun = begun or has_iterations(run_dir)
    return begun or read_manifest(run_dir).get("status") == "complete"  # a merge has no steps


def _checkpoints(run_dir: Path) -> list[Path]:
    return list((run_dir / "checkpoints").glob("step_*"))


def _differences(run_dir: Path, old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    before, after = dict(flatten(old)), dict(flatten(new))
    problems, notes = [], []
    for key in sorted(before.keys() | after.keys()):
        was, now = before.get(key), after.get(key)
        if was == now or key.startswith(MAY_DIFFER) or (not was and not now and {} in (was, now)):
            continue
        if key in MAY_GROW and _grows(was, now):
            notes.append(f"{key} grows from {was} to {now}")
            continue
        problems.append(f"{key}: was {was!r} in this run, now {now!r}")
    if problems:
        head = f"{run_dir} holds a run with another config; name another run_dir, or give these the values they had:"
        raise ConfigError([Problem("run_dir", "\n  - ".join([head, *problems]))])
    return notes


def _grows(was: Any, now: Any) -> bool:
    return isinstance(was, int | float) and isinstance(now, int | float) and now > was


def freeze(run_dir: Path, values: dict[str, Any]) -> Path:
    """Write config.yaml, complete or not at all. Returns its path."""
    path = run_dir / "config.yaml"
    write_text(path, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
    return path


def lock(run_dir: Path) -> TextIO:
    """Keep other processes out of a run directory for as long as the returned file is open.

    Where the file system knows no locks nobody is kept out; a note on standard error says so.
    """
    file = (run_dir / ".lock").open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "unknown"
        raise ConfigError([Problem("run_dir", f"{run_dir} is in use by another rlhf process (pid {holder})")]) from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        note = f"{run_dir}: no lock on this file system ({error.strerror}); see that no second rlhf works in it"
        print(note, file=sys.stderr, flush=True)
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file
