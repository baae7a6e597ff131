"""Files that appear under their final name only when they are complete, and digests of them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlhf_cli.errors import RunFailed


def write_text(path: Path, text: str) -> None:
    """Write aside, then rename over `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.tmp")
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def write_json(path: Path, value: Any) -> None:
    """`write_text` of indented JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def directory_aside(final: Path) -> Iterator[Path]:
    """A directory to fill; it takes the place of `final` when the body ends without an error, else it is removed."""
    aside = final.with_name(f".{final.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
    except Exception:
        shutil.rmtree(aside, ignore_errors=True)  # on a full disk it would stand in the way of everything else
        raise
    for path in aside.rglob("*"):
        if path.is_file():
            sync(path)
    replaced = final.with_name(f".{final.name}.old")
    shutil.rmtree(replaced, ignore_errors=True)
    if final.exists():
        final.rename(replaced)
    aside.rename(final)
    sync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def sync(path: Path) -> None:
    """A file, or the names in a directory, onto the disk: no rename may survive a power cut without the contents."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_space(directory: Path, num_bytes: int, what: str) -> None:
    """Raise RunFailed before anything is written when `directory` has no room for `num_bytes`."""
    directory.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(directory).free
    if free < num_bytes:
        size, unit = (1e9, "GB") if num_bytes >= 1e8 else (1e6, "MB")
        raise RunFailed(
            f"no room for {what} in {directory}: needs {num_bytes / size:.2f} {unit}, free are"
            f" {free / size:.2f} {unit}; make room and start the same command again"
        )


def digest_file(path: Path) -> str:
    """sha256 of a file's bytes, as hex."""
    with path.open("rb") as file:
        total = hashlib.sha256()
        while block := file.read(1 << 20):
            total.update(block)
        return total.hexdigest()


def digest_tree(directory: Path) -> str:
    """sha256 over names and contents of all files below a directory."""
    total = hashlib.sha256()
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        total.update(f"{path.relative_to(directory)}\0{digest_file(path)}\n".encode())
    return total.hexdigest()
