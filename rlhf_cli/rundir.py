"""What lies where in a run directory, and its manifest. Shared by the front and the ranks; standard library only."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from rlhf_cli.errors import ModelError
from rlhf_cli.files import write_json

Status = Literal["running", "complete", "failed", "interrupted"]


def read_manifest(run_dir: Path) -> dict[str, Any]:
    """The manifest of a run directory, or {} when there is none (yet).

    Raises ModelError when it is damaged.
    """
    path = run_dir / "manifest.json"
    if not path.is_file():
        return {}
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is damaged ({error}); run that stage again in a new run_dir") from None
    if not isinstance(manifest, dict):
        raise ModelError(f"{path} is damaged (no JSON object); run that stage again in a new run_dir")
    return manifest


def run_of(place: Path) -> Path | None:
    """The run directory that `place` is, or is the model of; None for a directory that no run made."""
    if read_manifest(place):
        return place
    output = read_manifest(place.parent).get("output") or {}
    return place.parent if output.get("path") == place.name else None


def why_unfinished(run_dir: Path, manifest: dict[str, Any]) -> str | None:
    """What to tell a user who names a run that did not come to its end; None for one that did."""
    stage, status = manifest.get("stage", "?"), manifest.get("status", "not started")
    if status == "complete":
        return None
    return (
        f"{run_dir} is a run of `rlhf {stage}` that is not finished (status: {status});"
        " finish it first: the same command again continues it"
    )


def output_dir(run_dir: Path, kinds: tuple[str, ...], named: str, advice: str = "") -> Path:
    """Where the result of a finished run lies. kinds: what it may be; named: the run as the user wrote it.

    Raises ModelError when there is none of that kind.
    """
    manifest = read_manifest(run_dir)
    output = manifest.get("output") or {}
    if manifest.get("status") != "complete" or output.get("kind") not in kinds:
        raise ModelError(
            f"{named} holds no finished {' or '.join(kinds)} (stage {manifest.get('stage')}, status"
            f" {manifest.get('status')}, kind {output.get('kind')}){advice}"
        )
    return run_dir / str(output["path"])


def update_manifest(run_dir: Path, **changes: Any) -> dict[str, Any]:
    """Change some entries of the manifest; a `status` that ends the run sets `finished`."""
    manifest = read_manifest(run_dir) | changes
    if changes.get("status") in ("complete", "failed", "interrupted"):
        manifest["finished"] = utc_now()
    write_json(run_dir / "manifest.json", manifest)
    return manifest


def utc_now() -> str:
    """UTC time, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def has_iterations(run_dir: Path) -> bool:
    """Whether responses of a RAFT iteration are there, from which the run goes on even without a checkpoint."""
    return any(path.stat().st_size for path in (run_dir / "samples").glob("*iteration_*/*.jsonl"))
