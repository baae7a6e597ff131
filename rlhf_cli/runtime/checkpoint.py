"""Resumable checkpoints: checkpoints/step_00000500 with everything that a run needs to go on.

    <name>/...          one directory per writer, such as the engine's optimizer state
    rng-00000.json      random number generators of each rank
    loop_state.json     schema version, step, world size, and what the training loop wants to find again
    digests.json        sha256 of each of these files; written last

A checkpoint is written under a temporary name and renamed when it is complete, so that a process killed at any moment
leaves the older ones valid. All ranks must see the same directory.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError

from rlhf_cli.errors import CheckpointError, RunFailed
from rlhf_cli.files import check_space, digest_file, sync
from rlhf_cli.runtime.distributed import Ranks, barrier, broadcast_object, gather_objects
from rlhf_cli.runtime.seed import rng_state, seed_everything, set_rng_state

SCHEMA_VERSION = 1
DIRECTORY = "checkpoints"
LOOP_STATE = "loop_state.json"
DIGESTS = "digests.json"
HEADROOM_BYTES = 64 * 2**20  # index, RNG and loop state, and room for the log files beside them
STEP_NAME = re.compile(r"step_(\d{8}|[1-9]\d{8,})")

WRITE_FAILURES = (OSError, SafetensorError, RunFailed)  # safetensors reports a full disk as an error of its own

Writer = Callable[[Path], None]


class Loaded(NamedTuple):
    """loop_state: as it was saved. rng_restored: False when the generators were seeded anew (see load)."""

    step: int
    loop_state: dict[str, Any]
    rng_restored: bool


def save(
    run_dir: Path,
    step: int,
    ranks: Ranks,
    writers: Mapping[str, Writer],
    loop_state: dict[str, Any],
    keep: int,
    bytes_needed: int,
) -> Path:
    """Write checkpoints/step_<step> and remove older ones beyond the newest `keep`. All ranks call it.

    writers: called on all ranks, each with a directory of its own name; one that cannot write raises after its
    collectives. loop_state: JSON values, the same on all ranks. bytes_needed: what they will write together.
    Raises RunFailed on every rank when the disk has too little room (then nothing was written) or a write failed.
    """
    root = run_dir / DIRECTORY
    _check_space(root, bytes_needed + HEADROOM_BYTES, ranks)
    name = f"step_{step:08d}"
    temporary = root / f".tmp-{name}"
    _on_main(ranks, lambda: _fresh_directory(temporary, writers))
    try:
        _together(lambda: _write_all(temporary, step, ranks, writers, loop_state))
        files = broadcast_object(_files(temporary) if ranks.is_main else [])
        mine = files[ranks.rank :: ranks.world_size]
        digests = _together(lambda: {file: _synced_digest(temporary / file) for file in mine})
        _on_main(ranks, lambda: _finish(temporary, digests))
    except RunFailed:
        if ranks.is_main:
            shutil.rmtree(temporary)  # a full disk: what is half written must not keep it full
        raise
    _on_main(ranks, lambda: _publish(temporary, root / name, step, keep))
    return root / name


def newest_valid(run_dir: Path, report: Callable[[str], None]) -> Path | None:
    """The newest checkpoint whose files all have their digests, or None. For one process only; others get the answer.

    Tidies up after a killed save first. A damaged checkpoint is reported and left where it is.
    """
    root = run_dir / DIRECTORY
    if not root.is_dir():
        return None
    for leftover in sorted(root.glob(".old-step_*")):
        final = root / leftover.name.removeprefix(".old-")
        if final.exists():
            shutil.rmtree(leftover)
        else:
            leftover.rename(final)  # killed between the two renames of _publish
    for leftover in root.glob(".tmp-step_*"):
        shutil.rmtree(leftover)
    found = sorted(_steps(root), reverse=True)
    for i, step in enumerate(found):
        path = root / f"step_{step:08d}"
        damage = find_damage(path)
        if damage is None:
            return path
        then = f"going back to step_{found[i + 1]:08d}" if i + 1 < len(found) else "no older one is left"
        report(f"checkpoint {path.name} is damaged ({damage}); {then}")
    return None


def find_damage(path: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None."""
    try:
        digests = json.loads((path / DIGESTS).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"file {DIGESTS}: missing"
    except ValueError:
        return f"file {DIGESTS}: not readable"
    if not isinstance(digests, dict) or LOOP_STATE not in digests:
        return f"file {DIGESTS}: incomplete"
    for file in digests:
        if not (path / file).is_file():
            return f"file {file}: missing"
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:  # hashlib lets other threads run
        for file, digest in zip(digests, pool.map(lambda f: digest_file(path / f), digests), strict=True):
            if digest != digests[file]:
                return f"file {file}: digest differs"
    return None


def load(path: Path, readers: Mapping[str, Writer], ranks: Ranks, seed: int) -> Loaded:
    """Restore a checkpoint: each reader gets the directory of its name. All ranks call it.

    On the world size that saved it, every rank's random number generators go on where they were. On another one there
    is nothing to continue: they are seeded from (seed, rank, step), which gives the same numbers at every such resume.
    """
    state = json.loads((path / LOOP_STATE).read_text(encoding="utf-8"))
    if state["schema_version"] != SCHEMA_VERSION:
        raise CheckpointError(
            f"{path}: has format {state['schema_version']}, this version of rlhf reads format {SCHEMA_VERSION};"
            " finish the run with the version that started it, or start anew in another run_dir"
        )
    for name, reader in readers.items():
        reader(path / name)
    restored = state["world_size"] == ranks.world_size
    if restored:
        set_rng_state(json.loads(_rng_file(path, ranks.rank).read_text(encoding="utf-8")))
    else:
        seed_everything(seed, ranks.rank, state["step"])
    barrier()
    return Loaded(state["step"], state["loop"], restored)


def _check_space(root: Path, needed: int, ranks: Ranks) -> None:
    _on_main(ranks, lambda: check_space(root, needed, "a checkpoint"))


def _fresh_directory(temporary: Path, writers: Mapping[str, Writer]) -> None:
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir()
    for name in writers:
        (temporary / name).mkdir()


def _write_all(
    temporary: Path, step: int, ranks: Ranks, writers: Mapping[str, Writer], loop_state: dict[str, Any]
) -> None:
    failures: list[Exception] = []
    for name, write in writers.items():
        try:
            write(temporary / name)
        except WRITE_FAILURES as error:
            failures.append(error)  # but the other ranks are in the next writer's collectives by now
    if failures:
        raise failures[0]
    _write_json(_rng_file(temporary, ranks.rank), rng_state())
    if ranks.is_main:
        state = {
            "schema_version": SCHEMA_VERSION,
            "step": step,
            "world_size": ranks.world_size,
            "loop": loop_state,
        }
        _write_json(temporary / LOOP_STATE, state)


def _finish(temporary: Path, digests: list[dict[str, str]]) -> None:
    """Write digests.json from each rank's part, and make sure that everything is on the disk."""
    merged = {file: digest for part in digests for file, digest in part.items()}
    _write_json(temporary / DIGESTS, dict(sorted(merged.items())))
    sync(temporary / DIGESTS)
    for directory in {(temporary / file).parent for file in merged}:
        sync(directory)


def _publish(temporary: Path, final: Path, step: int, keep: int) -> None:
    """Give a complete checkpoint its name, and prune. One of that name is there when a run went back and came again."""
    old = final.with_name(f".old-{final.name}")
    if final.exists():
        if old.exists():
            shutil.rmtree(old)
        os.rename(final, old)
    os.rename(temporary, final)
    sync(final.parent)
    if old.exists():
        shutil.rmtree(old)
    _prune(final.parent, step, keep)


def _together(body: Callable[[], Any]) -> list[Any]:
    """Run body on every rank and return all results; if it fails on one for lack of room and such, all raise.

    Without this the ranks that did not fail would wait for the one that did until the timeout.
    """
    failure: str | None = None
    result: Any = None
    try:
        result = body()
    except RunFailed as error:
        failure = str(error)
    except WRITE_FAILURES as error:
        failure = f"could not write a checkpoint: {error}"
    outcomes = gather_objects((result, failure))
    failures = [text for _, text in outcomes if text is not None]
    if failures:
        raise RunFailed(failures[0])
    return [value for value, _ in outcomes]


def _on_main(ranks: Ranks, body: Callable[[], None]) -> None:
    """Run body on rank 0, with everybody waiting, and failing, together."""
    _together(body if ranks.is_main else lambda: None)


def _rng_file(path: Path, rank: int) -> Path:
    return path / f"rng-{rank:05d}.json"


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value) + "\n", encoding="utf-8")


def _files(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def _synced_digest(path: Path) -> str:
    sync(path)
    return digest_file(path)


def _steps(root: Path) -> list[int]:
    matches = [STEP_NAME.fullmatch(path.name) for path in root.iterdir() if path.is_dir()]
    return [int(match.group(1)) for match in matches if match]


def _prune(root: Path, step: int, keep: int) -> None:
    """Remove checkpoints older than the `keep` newest; the one just written counts as the newest.

    Later steps than this one can only be damaged leftovers (the run would have gone on from them), and go too.
    """
    steps = sorted(_steps(root), reverse=True)
    kept = {step, *[s for s in steps if s < step][: keep - 1]}
    for other in steps:
        if other not in kept:
            shutil.rmtree(root / f"step_{other:08d}")
