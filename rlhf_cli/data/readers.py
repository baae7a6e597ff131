"""Files, directories, globs and hub ids -> raw rows. Every fault names the file and the line."""

from __future__ import annotations

import csv
import glob
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import IO, Any, NamedTuple

from rlhf_cli.data.columns import map_columns
from rlhf_cli.data.rows import DOCUMENT, Row, RowError
from rlhf_cli.errors import DataError
from rlhf_cli.schema import SourceConfig

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")
UTF8_BOM = b"\xef\xbb\xbf"
UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")

TOO_DEEP = ("nested too deeply", "its JSON is nested more deeply than Python reads")  # reason and detail of a RowError

Rows = Iterator[Row | RowError]


class Source(NamedTuple):
    """One entry of data.path, found: local files, or a loaded hub data set."""

    path: str
    files: tuple[Path, ...]
    hub: Any = None


def open_source(data: SourceConfig, path: str) -> Source:
    """Find what `path` means. Raises DataError when there is nothing, or nothing readable."""
    local = Path(path).expanduser()
    if local.is_file():
        if not _extension(local):
            raise DataError(f"data.path: {path}: unknown kind of file; readable are {_readable()}")
        return Source(path, (local,))
    if local.is_dir():
        files = tuple(sorted(f for f in local.iterdir() if f.is_file() and f.name[0] != "." and _extension(f)))
        if not files:
            raise DataError(f"data.path: the directory {path} holds no data file; readable are {_readable()}")
        return Source(path, files)
    if any(c in path for c in "*?["):
        found = sorted(Path(f) for f in glob.glob(str(local), recursive=True))
        files = tuple(f for f in found if f.is_file())
        if not files:
            raise DataError(f"data.path: no file matches {path}")
        unreadable = [str(f) for f in files if not _extension(f)]
        if unreadable:
            raise DataError(f"data.path: {path} matches {unreadable[0]}, an unknown kind of file; {_readable()}")
        return Source(path, files)
    meant_local = "/" in path and Path(path.split("/")[0]).expanduser().is_dir()  # spares the hub's retries
    if HUB_ID.fullmatch(path) and not _extension(local) and not meant_local:
        return Source(path, (), _load_hub(path, data.split))
    raise DataError(f"data.path: {path} does not exist{_neighbours(local)}")


def read_rows(data: SourceConfig, source: Source | str) -> Rows:
    """Every row of one source in file order, with data.columns applied. A row that cannot be read comes as RowError."""
    if isinstance(source, str):
        source = open_source(data, source)
    for name, rows in _raw_rows(source):
        first = True
        for row in rows:
            if isinstance(row, Row):
                yield row._replace(values=map_columns(row.values, data.columns, row.source if first else None))
            else:
                yield row
            first = False
        if first:
            raise DataError(f"{name}: no rows in it")


def source_digest(source: Source) -> str:
    """Digest of what is read: the bytes of all files in order, not their names or times."""
    files = source.files or tuple(Path(f["filename"]) for f in source.hub.cache_files)
    digest = blake2b(digest_size=16)
    for file in files:
        try:
            with file.open("rb") as handle:
                digest.update(f"{_extension(file)}:{file.stat().st_size}:".encode())
                while block := handle.read(1 << 20):
                    digest.update(block)
        except OSError as error:
            raise DataError(f"{file}: cannot be read: {error}") from error
    if source.hub is not None:
        digest.update(f"{source.path}:{source.hub.split}:{source.hub.num_rows}".encode())
    return digest.hexdigest()


def _raw_rows(source: Source) -> Iterator[tuple[str, Rows]]:
    for file in source.files:
        yield str(file), READERS[_extension(file)](file)
    if source.hub is not None:
        yield source.path, (Row(dict(v), f"{source.path} row {i}") for i, v in enumerate(source.hub, start=1))


def _load_hub(path: str, split: str) -> Any:
    import datasets  # seconds to import, and only hub ids need it

    name, _, config = path.partition(":")
    try:
        return datasets.load_dataset(name, config or None, split=split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"data.path: {path} is no local file or directory, and loading it as a hub data set (split {split}) failed:"
            f" {error}; check the name, data.split and the network, or download it and give the local path"
        ) from error


def _extension(file: Path) -> str:
    """The key in READERS, or "" for a file that is not data."""
    name = file.name.lower().removesuffix(".gz")
    extension = Path(name).suffix
    if extension == ".parquet" and file.name.lower().endswith(".gz"):
        return ""
    return extension if extension in READERS else ""


def _readable() -> str:
    return " ".join(READERS) + " (all but parquet also with .gz)"


def _neighbours(path: Path) -> str:
    if not path.parent.is_dir():
        return f"; there is no directory {path.parent} either"
    names = sorted(f.name for f in path.parent.iterdir() if f.is_dir() or _extension(f))
    return f"; {path.parent} holds {', '.join(names[:8])}" if names else f"; {path.parent} holds no data"


def _open(file: Path) -> IO[bytes]:
    opener: Callable[..., Any] = gzip.open if file.name.lower().endswith(".gz") else open
    handle: IO[bytes] = opener(file, "rb")
    try:
        head = handle.read(2)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file}: cannot be read: {error}") from error
    if head in UTF16_BOMS:
        raise DataError(f"{file}: is UTF-16, not UTF-8; convert it: iconv -f UTF-16 -t UTF-8")
    handle.seek(0)
    return handle


def _read_all(file: Path) -> str:
    with _open(file) as handle:
        try:
            content = handle.read()
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{file}: cannot be read: {error}") from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{file}:{line}: {_not_utf8(error)}") from error


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"not UTF-8 (byte 0x{error.object[error.start]:02x}); convert it, e.g. iconv -f latin1 -t UTF-8"


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, line). Only \\n ends a line: JSON text may hold other Unicode line ends."""
    with _open(file) as handle:
        number = 0
        try:
            for number, line in enumerate(handle, start=1):
                yield number, line.removeprefix(UTF8_BOM) if number == 1 else line
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(f"{file}:{number + 1}: cannot be read on from here: {error}") from error


def _read_jsonl(file: Path) -> Rows:
    for number, line in _lines(file):
        if not line.strip():
            continue
        where = f"{file}:{number}"
        try:
            value = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            yield RowError(where, "not UTF-8", _not_utf8(error))
        except ValueError as error:
            yield RowError(where, "not valid JSON", f"{error} (each line holds one object)")
        except RecursionError:
            yield RowError(where, *TOO_DEEP)
        else:
            yield _object(value, where)


def _object(value: Any, where: str, kind: str | None = None) -> Row | RowError:
    if isinstance(value, dict):
        return Row(value, where, kind)
    try:
        found = json.dumps(value)[:60]
    except RecursionError:
        return RowError(where, *TOO_DEEP)
    return RowError(where, "not an object", f'expected {{"column": value, ...}}, got {found}')


def _read_json(file: Path) -> Rows:
    text = _read_all(file)
    if not text.strip():
        raise DataError(f"{file}: is empty")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        if _is_json_lines(text):
            yield from _read_jsonl(file)
            return
        if isinstance(error, RecursionError):
            raise DataError(f"{file}: {TOO_DEEP[1]}") from error
        line = getattr(error, "lineno", 1)
        raise DataError(f"{file}:{line}: not valid JSON: {error}") from error
    kind = None
    if isinstance(value, dict):
        if not isinstance(value.get("instances"), list):
            raise DataError(
                f'{file}: expected {{"type": ..., "instances": [...]}} or a list of objects, got an object with '
                f"the keys {', '.join(map(str, value)) or '(none)'}"
            )
        kind, value = value.get("type"), value["instances"]
        if kind is not None and not isinstance(kind, str):
            raise DataError(f'{file}: "type" is {kind!r}; expected a word such as "text_only"')
    if not isinstance(value, list):
        raise DataError(f'{file}: expected {{"type": ..., "instances": [...]}} or a list of objects')
    for number, instance in enumerate(value, start=1):
        yield _object(instance, f"{file} instance {number}", kind)


def _is_json_lines(text: str) -> bool:
    """Many .json files hold one object per line; the first line tells."""
    first = text.lstrip().split("\n", 1)[0]
    try:
        return isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False


def _read_csv(file: Path) -> Rows:
    delimiter = "\t" if _extension(file) == ".tsv" else ","
    csv.field_size_limit(sys.maxsize)  # the default of 128 KiB is shorter than many documents
    with _open(file) as handle:
        reader = csv.reader(
            io.TextIOWrapper(handle, encoding="utf-8-sig", newline=""), delimiter=delimiter, strict=True
        )
        try:
            header = next(reader, [])
            if not any(header):
                raise DataError(f"{file}: is empty; the first line must name the columns")
            if len(set(header)) < len(header) or "" in header:
                raise DataError(f"{file}:1: column names must be there and differ, got {', '.join(header)}")
            while True:
                where = f"{file}:{reader.line_num + 1}"  # quoted fields go on over lines, and line_num is the last one
                fields = next(reader, None)
                if fields is None:
                    break
                if not fields:
                    continue
                if len(fields) != len(header):
                    yield RowError(where, "wrong number of fields", f"{len(fields)} for {len(header)} columns")
                else:
                    yield Row(dict(zip(header, fields, strict=True)), where)
        except UnicodeDecodeError as error:
            raise DataError(f"{file}: after line {reader.line_num}: {_not_utf8(error)}") from error
        except (csv.Error, EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(f"{file}:{reader.line_num}: cannot be read on from here: {error}") from error


def _read_parquet(file: Path) -> Rows:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=1024):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(values, f"{file} row {number}")
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{file}: cannot be read as parquet after row {number}: {error}") from error


def _read_text(file: Path) -> Rows:
    text = _read_all(file).replace("\r\n", "\n")
    if not text.strip():
        raise DataError(f"{file}: is empty")
    yield Row({"text": text}, str(file), DOCUMENT)


READERS: dict[str, Callable[[Path], Rows]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_text,
}
