"""Tokenised data on disk: written aside, renamed when complete, checked when opened."""

from __future__ import annotations

import json
import os
import shutil
import socket
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from rlhf_cli.errors import DataError

INFO = "info.json"

Columns = dict[str, np.ndarray]


def cache_root(cache_dir: str | None) -> Path:
    """data.cache_dir, else $RLHF_CACHE, else ~/.cache/rlhf."""
    return Path(cache_dir or os.environ.get("RLHF_CACHE") or Path.home() / ".cache" / "rlhf").expanduser()


def load_entry(entry: Path) -> tuple[dict[str, Any], dict[str, Columns]] | None:
    """(info, part -> memory-mapped columns) of a complete entry, or None if it is absent or damaged."""
    try:
        info = json.loads((entry / INFO).read_text(encoding="utf-8"))
        for name, size, checksum in info["files"]:
            if (entry / name).stat().st_size != size or _checksum(entry / name) != checksum:
                return None
        parts: dict[str, Columns] = {}
        for name, _, _ in info["files"]:
            part, column = Path(name).parts
            parts.setdefault(part, {})[Path(column).stem] = np.load(entry / name, mmap_mode="r")
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return info["info"], parts


def load_or_build(
    entry: Path, write: Callable[[Path], Mapping[str, Any]], report: Callable[[str], None]
) -> tuple[dict[str, Any], dict[str, Columns]]:
    """What load_entry gives, after build_entry where there is no entry yet. report gets a line when there is one."""
    found = load_entry(entry)
    if found is not None:
        report(f"data: tokens from the cache {entry}")
        return found
    build_entry(entry, write)
    found = load_entry(entry)
    if found is None:
        raise DataError(f"tokenised data in {entry} is damaged as soon as it is written; check the disk")
    return found


def build_entry(entry: Path, write: Callable[[Path], Mapping[str, Any]]) -> None:
    """Let `write` fill a directory aside, seal it with what it returns as info, and give it its name.

    Several processes may build one entry: the first complete one stays, the others are dropped.
    """
    aside = entry.with_name(f"{entry.name}.tmp-{socket.gethostname()}-{os.getpid()}")
    try:
        _remove_abandoned(entry)
        shutil.rmtree(aside, ignore_errors=True)  # from a dead process that had our number
        aside.mkdir(parents=True)
        try:
            info = write(aside)
            names = sorted(str(f.relative_to(aside)) for f in aside.rglob("*.npy"))
            files = [[name, (aside / name).stat().st_size, _checksum(aside / name)] for name in names]
            (aside / INFO).write_text(json.dumps({"info": info, "files": files}, indent=1), encoding="utf-8")
            _publish(aside, entry)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        raise DataError(
            f"tokenised data cannot be kept in {entry.parent}: {error}; set data.cache_dir or $RLHF_CACHE to a"
            " directory with space that you may write to"
        ) from error


class ColumnWriter:
    """Appends to one .npy file whose length is known only at the end."""

    def __init__(self, file: Path, dtype: np.dtype):
        self.dtype, self.length = dtype, 0
        file.parent.mkdir(parents=True, exist_ok=True)
        self.handle = file.open("wb")
        self.header_size = _write_header(self.handle, dtype, 0)

    def append(self, values: np.ndarray) -> None:
        self.handle.write(np.ascontiguousarray(values, self.dtype).tobytes())
        self.length += len(values)

    def close(self) -> None:
        """Write the true length into the header, for which numpy leaves room."""
        self.handle.seek(0)
        size = _write_header(self.handle, self.dtype, self.length)
        assert size == self.header_size
        self.handle.flush()
        os.fsync(self.handle.fileno())
        self.handle.close()


class PartWriter:
    """Appends to the columns of one part of an entry, chunk by chunk.

    dtypes: column -> its type. bounds: column of ends -> the column that they are positions in; such a column starts
    with a 0, and the ends of a chunk are counted from the chunk's own start.
    """

    def __init__(self, folder: Path, dtypes: Mapping[str, Any], bounds: Mapping[str, str]):
        self.columns = {name: ColumnWriter(folder / f"{name}.npy", np.dtype(dtype)) for name, dtype in dtypes.items()}
        self.bounds = bounds
        for name in bounds:
            self.columns[name].append(np.zeros(1))

    def append(self, chunk: Columns) -> None:
        starts = {name: self.columns[inner].length for name, inner in self.bounds.items()}
        for name, column in self.columns.items():
            column.append(chunk[name] + starts[name] if name in starts else chunk[name])

    def close(self) -> None:
        for column in self.columns.values():
            column.close()


def _write_header(handle: IO[bytes], dtype: np.dtype, length: int) -> int:
    descr = np.lib.format.dtype_to_descr(dtype)
    np.lib.format.write_array_header_1_0(handle, {"descr": descr, "fortran_order": False, "shape": (length,)})
    return handle.tell()


def _checksum(file: Path) -> int:
    value = 0
    with file.open("rb") as handle:
        while block := handle.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


def _publish(aside: Path, entry: Path) -> None:
    """Rename; an entry that is there is kept if it is whole (another process was first), else replaced."""
    try:
        aside.rename(entry)
    except OSError:
        if load_entry(entry) is not None:
            return
        shutil.rmtree(entry)
        aside.rename(entry)


def _remove_abandoned(entry: Path) -> None:
    """Directories that killed processes of this machine left behind."""
    prefix = f"{entry.name}.tmp-{socket.gethostname()}-"
    for aside in entry.parent.glob(f"{prefix}*"):
        pid = aside.name.removeprefix(prefix)
        if pid.isdigit() and not _is_alive(int(pid)):
            shutil.rmtree(aside, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
