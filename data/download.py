#!/usr/bin/env python3
"""Download data sets by name; see data/download.sh, docs/data.md ("Getting data") and catalogue.json beside this file.

Standard library only, since it runs before anything is installed. Three parts: this one (what there is, what is there
already), transfer.py (one file over HTTP), convert.py (originals -> the files that the stages read).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from convert import CONVERTERS, VERSION, Written
from transfer import (
    DownloadError,
    Fetched,
    Original,
    Patience,
    RequestError,
    address_of,
    fetch,
    file_sha256,
    is_full,
    locked,
)

HERE = Path(__file__).resolve().parent
STORE = ".originals"
LOCKS = ".locks"  # of data sets; those of originals lie beside them, and one call holds one of each
RECEIPT = ".downloaded.json"  # hidden: a directory named by data.path has its visible data files read
EXIT_INTERRUPTED = 130  # 128 + SIGINT


class DataSet(NamedTuple):
    """files: originals by role. Sizes are estimates; disk_mb counts originals and result."""

    name: str
    about: str
    licence: str
    homepage: str
    download_mb: float
    disk_mb: float
    converter: str
    files: dict[str, list[Original]]

    @property
    def originals(self) -> list[Original]:
        return [original for role in self.files.values() for original in role]


def main(words: list[str]) -> int:
    options = _parser().parse_args(words)
    root = (options.to or HERE).expanduser()
    try:
        catalogue = read_catalogue(options.catalogue)
        if options.list:
            _print_list(catalogue, root)
            return 0
        wanted = _wanted(options.names, catalogue)
        return _provide_all(wanted, root, Patience(options.retries, options.wait))
    except DownloadError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\nstopped; what has come is kept, and the same command goes on from there", file=sys.stderr)
        return EXIT_INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="download.sh",
        description="Download data sets by name, check them, and lay them out as the stages of rlhf read them.",
        epilog="RLHF_MIRROR=https://host/path replaces scheme and host of every address, HF_ENDPOINT those of the hub;"
        " https_proxy and SSL_CERT_FILE work as usual. Originals are kept in .originals/ and may be deleted.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="a data set of --list; several; or all")
    parser.add_argument("--list", action="store_true", help="what there is, how large, under which licence")
    parser.add_argument(
        "--to", type=Path, metavar="DIR", help="where to put it (default: the directory of this script)"
    )
    parser.add_argument("--catalogue", type=Path, default=HERE / "catalogue.json", metavar="FILE", help="another list")
    parser.add_argument(
        "--retries", type=_number(int), default=5, metavar="N", help="tries without progress (default: 5)"
    )
    parser.add_argument(
        "--wait",
        type=_number(float),
        default=1.0,
        metavar="SECONDS",
        help="first pause before another try, then doubled",
    )
    return parser


def _number(kind: type[int] | type[float]) -> Callable[[str], float]:
    """A parser of numbers that are not negative."""

    def number(word: str) -> float:
        value = kind(word)
        if not value >= 0:  # also not a number
            raise ValueError
        return value

    return number


def read_catalogue(file: Path) -> dict[str, DataSet]:
    """Raises RequestError that names the file and the place in it."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise RequestError(f"{file}: the catalogue cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise RequestError(f"{file}: the catalogue is not valid JSON: {error}") from error
    try:
        # names become paths
        for name in [
            *content["originals"],
            *(name for entry in content["data_sets"].values() for name in entry["files"]),
        ]:
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise RequestError(f"{name!r} leads out of the data directory")
        originals = {
            name: Original(name, entry["url"], entry["sha256"], entry["bytes"])
            for name, entry in content["originals"].items()
        }
        return {name: _data_set(name, entry, originals) for name, entry in content["data_sets"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise RequestError(
            f"{file}: not laid out as a catalogue ({error!r}); compare {HERE / 'catalogue.json'}"
        ) from error
    except RequestError as error:
        raise RequestError(f"{file}: {error}") from error


def _data_set(name: str, entry: dict[str, Any], originals: dict[str, Original]) -> DataSet:
    files = {role: [originals[original] for original in names] for role, names in entry["files"].items()}
    if entry["converter"] not in CONVERTERS:
        raise RequestError(f"data_sets.{name}: converter {entry['converter']!r} is none of {', '.join(CONVERTERS)}")
    needed = CONVERTERS[entry["converter"]][1]
    if needed and set(files) != needed:
        raise RequestError(f"data_sets.{name}: files must name {', '.join(sorted(needed))}, not {', '.join(files)}")
    if Path(name).name != name or name.startswith(".") or name == "all":
        raise RequestError(f"data_sets: {name!r} cannot be the name of a directory")
    return DataSet(name=name, files=files, **{field: entry[field] for field in DataSet._fields[1:-1]})


def _wanted(names: list[str], catalogue: dict[str, DataSet]) -> list[DataSet]:
    unknown = [name for name in names if name not in catalogue and name != "all"]
    if unknown or not names:
        problem = f"unknown data set {', '.join(unknown)}" if unknown else "which data set?"
        raise RequestError(f"{problem}; there are {', '.join(catalogue)}, or all (--list says more)")
    return list(catalogue.values()) if "all" in names else [catalogue[name] for name in dict.fromkeys(names)]


def _print_list(catalogue: dict[str, DataSet], root: Path) -> None:
    width = max(map(len, catalogue), default=0)
    for entry in catalogue.values():
        there = "there" if (root / entry.name / RECEIPT).exists() else "     "
        print(f"{entry.name:<{width}}  {there}  {entry.download_mb:>4g} MB, {entry.disk_mb:>4g} on disk  {entry.about}")
        print(f"{'':<{width}}         licence: {entry.licence}; {entry.homepage}")


def _provide_all(wanted: list[DataSet], root: Path, patience: Patience) -> int:
    """Every data set that can be had; one that cannot does not stop the others."""
    code = 0
    for entry in wanted:
        try:
            _provide(entry, root, patience)
        except DownloadError as error:
            print(f"error: {entry.name}: {error}", file=sys.stderr)
            code = max(code, error.exit_code)
        except OSError as error:
            what = "no space left" if is_full(error) else str(error.strerror or error)
            print(
                f"error: {entry.name}: {error.filename or root}: {what}; or choose another place with --to",
                file=sys.stderr,
            )
            code = 1
    return code


def _provide(entry: DataSet, root: Path, patience: Patience) -> None:
    target, store = root / entry.name, root / STORE
    with locked(root / LOCKS / f"{entry.name}.lock", _say):
        if _is_whole(entry, target):
            print(f"{target}: already there")
            return
        _say(f"{entry.name}: {entry.about} ({entry.licence})")
        addresses = {original: address_of(original.url, dict(os.environ)) for original in entry.originals}
        _check_space(entry, root)
        fetched = {o: fetch(o, address, store, patience, _say) for o, address in addresses.items()}
        for output in _make(entry, fetched, target):
            kind = "lines" if output.name.endswith(".txt") else "rows"
            left_out = "".join(f", {number:,} left out: {why}" for why, number in output.left_out.items())
            print(f"{target / output.name}: {output.rows:,} {kind}{left_out}")


def _is_whole(entry: DataSet, target: Path) -> bool:
    """Whether the data set is there, made from these originals by these converters, byte for byte as it was made. Files
    that have joined it do not matter then.

    Raises DownloadError where something else is in its place: what is not ours is never replaced.
    """
    if not target.exists():
        return False
    try:
        receipt = json.loads((target / RECEIPT).read_text(encoding="utf-8"))
        made = {name: output["sha256"] for name, output in receipt["files"].items()}
        sources = {source["name"]: source["sha256"] for source in receipt["originals"]}
        converter = receipt["converter"]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DownloadError(
            f"{target} is there, but was not made by this script; move it away, or choose another place with --to"
        ) from error
    files = {str(file.relative_to(target)) for file in target.rglob("*") if file.is_file()} - {RECEIPT}
    changed = [name for name, sha256 in made.items() if name not in files or file_sha256(target / name) != sha256]
    current = {original.name: original.sha256 or sources.get(original.name) for original in entry.originals}
    if not changed and sources == current and converter == [entry.converter, VERSION]:
        return True
    if foreign := changed + sorted(files - made.keys()):
        raise DownloadError(
            f"{target} cannot be replaced: {', '.join(foreign[:4])} changed, came or went since it was downloaded\n"
            "Keep it as your own under another name, or remove it, and run the command again."
        )
    return False


def _check_space(entry: DataSet, root: Path) -> None:
    """Before the first byte: what is still missing of the estimate must be free."""
    stored = [root / STORE / f"{o.name}{ending}" for o in entry.originals for ending in ("", ".part")]
    missing = entry.disk_mb * 1e6 - sum(path.stat().st_size for path in stored if path.exists())
    free = shutil.disk_usage(root).free
    if free < missing:
        raise DownloadError(
            f"needs about {missing / 1e6:,.0f} MB, and {root} has {free / 1e6:,.0f} MB free; free some space, or choose"
            " another place with --to"
        )


def _make(entry: DataSet, fetched: dict[Original, Fetched], target: Path) -> list[Written]:
    """Convert beside the final place, and move there what is complete."""
    making, old = (target.with_name(f".{entry.name}.{word}") for word in ("making", "old"))
    for leftover in (making, old):  # of a process that was killed; this one holds the lock
        shutil.rmtree(leftover, ignore_errors=True)
    making.mkdir(parents=True)
    try:
        sources = {role: [fetched[original].path for original in originals] for role, originals in entry.files.items()}
        written = CONVERTERS[entry.converter][0](sources, making)
        receipt = _receipt(entry, fetched, making, written)
        (making / RECEIPT).write_text(json.dumps(receipt, indent=2) + "\n", encoding="utf-8")
        if target.exists():
            target.rename(old)
        making.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return written


def _receipt(entry: DataSet, fetched: dict[Original, Fetched], folder: Path, written: list[Written]) -> dict[str, Any]:
    """What it was made of and what came out."""
    return {
        "data_set": entry.name,
        "licence": entry.licence,
        "homepage": entry.homepage,
        "converter": [entry.converter, VERSION],
        "originals": [{"name": o.name, "url": o.url, "sha256": f.sha256} for o, f in fetched.items()],
        "files": {
            output.name: {
                "rows": output.rows,
                "left_out": output.left_out,
                "bytes": (folder / output.name).stat().st_size,
                "sha256": file_sha256(folder / output.name),
            }
            for output in written
        },
    }


def _say(line: str) -> None:
    # a terminal may show an unfinished line of progress
    print(("\r\x1b[K" if sys.stderr.isatty() else "") + line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
