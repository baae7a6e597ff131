"""One file over HTTP: resumed where it stopped, checked, and only then under its final name. Standard library only."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import http.client
import re
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, NamedTuple
from urllib.parse import urlsplit

BLOCK = 1 << 18
SILENCE_SECONDS = 30  # a connection that says nothing for so long counts as cut
LONGEST_PAUSE_SECONDS = 60
HUB = "huggingface.co"
# Answers that another try may change: RFC 9110 (408, 425, 429, 500, 502, 503, 504).
PASSING = {408, 425, 429, 500, 502, 503, 504}
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class DownloadError(Exception):
    """Something that stands between the user and the data. One clear message; exit_code is 2 for a wrong request."""

    exit_code = 1


class RequestError(DownloadError):
    exit_code = 2


class _Interrupted(Exception):
    """The transfer stopped early; what has come is kept, and another try may get the rest."""

    def __init__(self, message: str, pause_seconds: float = 0.0):
        super().__init__(message)
        self.pause_seconds = pause_seconds


class Original(NamedTuple):
    """name: path in the store; sha256 and num_bytes: None where they are not known beforehand."""

    name: str
    url: str
    sha256: str | None
    num_bytes: int | None


class Patience(NamedTuple):
    """retries: how often in a row without a byte of progress; wait_seconds: the first pause, doubled each time."""

    retries: int
    wait_seconds: float


class Fetched(NamedTuple):
    path: Path
    sha256: str


def fetch(original: Original, address: str, store: Path, patience: Patience, say: Callable[[str], None]) -> Fetched:
    """The checked file in the store, from there or from the network. Raises DownloadError.

    A file whose hash is not known beforehand is taken on trust once; its hash is kept beside it, for later comparison.
    """
    final = store / original.name
    part, record = final.with_name(final.name + ".part"), final.with_name(final.name + ".sha256")
    with locked(final.with_name(final.name + ".lock"), say):
        expected = original.sha256 or (record.read_text(encoding="utf-8").split()[0] if record.exists() else None)
        if final.exists():
            found = file_sha256(final)
            if expected in (found, None):
                return Fetched(final, found)
            say(f"  {original.name} is damaged, it is downloaded again")
            final.unlink()
        resumed = part.exists()
        _receive_all(original, address, part, patience, say)
        found = file_sha256(part)
        if resumed and expected not in (found, None):  # the beginning may be to blame; give the whole file one chance
            say(f"  {original.name} does not fit together with its first part, it is downloaded from the start")
            part.unlink()
            _receive_all(original, address, part, patience, say)
            found = file_sha256(part)
        if expected not in (found, None):
            part.unlink()
            raise DownloadError(
                f"{original.name}: wrong bytes from {address}\n"
                f"  expected sha256 {expected}\n  found sha256    {found}\n"
                "It is removed. Either the transfer was damaged (run the command again), or this is another file"
                + (f": see RLHF_MIRROR, or {record} if the publisher has changed it" if not original.sha256 else "")
            )
        if expected is None:
            record.write_text(f"{found}  {final.name}\n", encoding="utf-8")
            say(
                f"  {original.name}: no checksum is known beforehand, these bytes are taken on trust.\n"
                f"    sha256 {found}, kept in {record}; a later download must have the same"
            )
        part.rename(final)
    return Fetched(final, found)


def address_of(url: str, environ: dict[str, str]) -> str:
    """Where a file is asked for: RLHF_MIRROR in place of scheme and host, or HF_ENDPOINT for files of the hub.

    Raises RequestError for a variable that holds no address.
    """
    host = urlsplit(url).netloc
    variable = "RLHF_MIRROR" if environ.get("RLHF_MIRROR") else "HF_ENDPOINT" if host == HUB else ""
    base = environ.get(variable, "")
    if not base:
        return url
    if urlsplit(base).scheme not in ("http", "https") or not urlsplit(base).netloc:
        raise RequestError(f"{variable}: {base!r} is no address; expected something like https://mirror.example/path")
    return base.rstrip("/") + url.split(host, 1)[1]


@contextlib.contextmanager
def locked(path: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Holds a lock that ends with the process, however it ends; waits for another process that has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"  another download holds {path}, waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def is_full(error: OSError) -> bool:
    """Whether a write failed for want of space, of quota, or at a limit on file sizes."""
    return error.errno in FULL


def _receive_all(original: Original, address: str, part: Path, patience: Patience, say: Callable[[str], None]) -> None:
    """Try until the part is the whole file."""
    say(f"  {original.name} from {address}")
    failures = 0
    while True:
        before = _size(part)
        try:
            return _receive(original, address, part, say)
        except _Interrupted as error:
            failures = 1 if _size(part) > before else failures + 1
            if failures > patience.retries:
                raise DownloadError(
                    f"{original.name}: {error}, {failures} times in a row, from {address}\n"
                    "What has come is kept: run the command again when the network is better. In a closed network, set"
                    " RLHF_MIRROR (or HF_ENDPOINT for the hub, or https_proxy)."
                ) from error
            pause = min(max(patience.wait_seconds * 2 ** (failures - 1), error.pause_seconds), LONGEST_PAUSE_SECONDS)
            say(f"  {original.name}: {error}; trying again in {pause:g} s")
            time.sleep(pause)


def _receive(original: Original, address: str, part: Path, say: Callable[[str], None]) -> None:
    """One request for what is missing. Raises _Interrupted where another try makes sense, DownloadError elsewhere."""
    have = _size(part)
    if have and have == original.num_bytes:
        return
    try:
        response = _open(original, address, have)
    except _NothingLeft as answer:
        if answer.total == have:
            return
        part.unlink()
        raise _Interrupted("the part that is here is longer than the file") from None
    with response:
        start, total = _span(response)
        if original.num_bytes is not None and total not in (None, original.num_bytes):
            part.unlink(missing_ok=True)
            raise DownloadError(
                f"{original.name}: another file stands at {address}\n  expected {original.num_bytes} bytes with sha256"
                f" {original.sha256}\n  found {total} bytes\nNothing is kept of it. Check the mirror, if you use one."
            )
        if start not in (0, have):
            part.unlink(missing_ok=True)
            raise _Interrupted(f"the server sent bytes from {start} on where {have} were asked for")
        # without buffering: a killed process leaves all that has come
        with part.open("ab" if start else "wb", buffering=0) as handle:
            _copy(response, handle, start, total, original.name, say)


class _NothingLeft(Exception):
    """416: the server has nothing from that byte on."""

    def __init__(self, total: int | None):
        super().__init__()
        self.total = total


def _open(original: Original, address: str, have: int) -> http.client.HTTPResponse:
    headers = {"User-Agent": "rlhf-cli data/download.sh"} | ({"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=SILENCE_SECONDS)
    except urllib.error.HTTPError as error:
        with error:
            if error.code == 416 and have:
                raise _NothingLeft(_total_of(error.headers.get("Content-Range"))) from error
            if error.code in PASSING:
                after = error.headers.get("Retry-After") or ""
                raise _Interrupted(
                    f"the server answers {error.code} {error.reason}", float(after) if after.isdigit() else 0.0
                ) from error
            raise DownloadError(
                f"{original.name}: {address} answers {error.code} {error.reason}\n"
                "Another try will not help. If you use RLHF_MIRROR or HF_ENDPOINT, the mirror lacks the file; else the"
                " publisher has moved it."
            ) from error
    except (OSError, http.client.HTTPException) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(reason, ssl.SSLCertVerificationError):
            raise DownloadError(
                f"{original.name}: the certificate of {urlsplit(address).netloc} is not trusted: {reason}\n"
                "Behind a proxy with an own authority, name its certificates with SSL_CERT_FILE."
            ) from error
        raise _Interrupted(f"no connection: {reason}") from error
    assert isinstance(response, http.client.HTTPResponse)
    return response


def _span(response: http.client.HTTPResponse) -> tuple[int, int | None]:
    """(first byte of the answer, size of the whole file if told). A server without ranges sends all, from byte 0."""
    if response.status == 206:
        span = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range") or "")
        if span is None:
            return -1, None
        return int(span[1]), _total_of(span[0])
    length = response.headers.get("Content-Length") or ""
    return 0, int(length) if length.isdigit() else None


def _total_of(content_range: str | None) -> int | None:
    total = (content_range or "").rpartition("/")[2]
    return int(total) if total.isdigit() else None


def _copy(
    response: http.client.HTTPResponse,
    handle: IO[bytes],
    have: int,
    total: int | None,
    name: str,
    say: Callable[[str], None],
) -> None:
    show = _progress(name, have, total, say)
    while True:
        try:
            block = response.read1(BLOCK)
        except (OSError, http.client.HTTPException) as error:
            raise _Interrupted(f"the connection was cut after {have:,} bytes ({error or 'silence'})") from error
        if not block:
            break
        _write(handle, block)
        have += len(block)
        show(have)
    if total is not None and have < total:
        raise _Interrupted(f"the connection was cut after {have:,} of {total:,} bytes")


def _write(handle: IO[bytes], block: bytes) -> None:
    """All of the block: an unbuffered write may take only a part of it."""
    rest = memoryview(block)
    try:
        while rest:
            rest = rest[handle.write(rest) :]
    except OSError as error:
        if not is_full(error):
            raise
        raise DownloadError(
            f"{handle.name}: no space left ({error.strerror})\nWhat has come is kept: free some space and run the"
            " command again, or choose another place with --to."
        ) from error


def _progress(name: str, start: int, total: int | None, say: Callable[[str], None]) -> Callable[[int], None]:
    """Shows how far a file is: on a terminal one line that changes, elsewhere a line every half minute."""
    terminal = sys.stderr.isatty()
    began = shown = time.monotonic()

    def show(have: int) -> None:
        nonlocal shown
        now, done = time.monotonic(), have == total
        if now - shown < (0.2 if terminal else 30) and not (done and terminal):
            return
        shown = now
        share = f"{100 * have / total:3.0f} %  {have / 1e6:.1f} of {total / 1e6:.1f}" if total else f"{have / 1e6:.1f}"
        line = f"  {name}  {share} MB  {(have - start) / 1e6 / max(now - began, 1e-9):.1f} MB/s"
        if terminal:
            sys.stderr.write(f"\r\x1b[K{line}" + ("\n" if done else ""))
            sys.stderr.flush()
        else:
            say(line)

    return show


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
