"""data/download.sh as a user calls it, against a server on this machine that misbehaves on request."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from rlhf_cli.data.formats import detect_format, parse_row
from rlhf_cli.data.readers import open_source, read_rows
from rlhf_cli.data.rows import LabelledRow, PairRow, PromptRow, Row
from rlhf_cli.schema import SourceConfig

DATA = Path(__file__).parent.parent / "data"
SCRIPT = DATA / "download.sh"
TEXT = b"".join(b"line %d of a text that is long enough to be cut\n" % number for number in range(2000))  # 105 kB
ROWS = b'{"sample": "O happy dagger!", "sentiment": "sad"}\n'
FAST = ("--wait", "0.01")


class Asked(NamedTuple):
    path: str
    start: int


class Server(http.server.ThreadingHTTPServer):
    """files: what it has, by path. faults: what to do wrong, one per request to a path, in order."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, list[Callable[[Handler, bytes, int], None]]] = {}
        self.asked: list[Asked] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        start = int((re.match(r"bytes=(\d+)-", self.headers.get("Range", "")) or [0, 0])[1])
        self.server.asked.append(Asked(self.path, start))
        content = self.server.files.get(self.path)
        if content is None:
            return self.send_error(404)
        faults = self.server.faults.get(self.path)
        if faults:
            return faults.pop(0)(self, content, start)
        self.begin(content, start)
        self.wfile.write(content[start:])
        return None

    def begin(self, content: bytes, start: int) -> None:
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Not on the terminal."""


def cut_after(num_bytes: int) -> Callable[[Handler, bytes, int], None]:
    def fault(handler: Handler, content: bytes, start: int) -> None:
        handler.begin(content, start)
        handler.wfile.write(content[start : start + num_bytes])
        handler.wfile.flush()

    return fault


def busy(handler: Handler, content: bytes, start: int) -> None:
    handler.send_error(503)


def no_ranges(handler: Handler, content: bytes, start: int) -> None:
    handler.begin(content, 0)
    handler.wfile.write(content)


def slow(handler: Handler, content: bytes, start: int) -> None:
    handler.begin(content, start)
    for block in (content[i : i + 20_000] for i in range(start, len(content), 20_000)):
        handler.wfile.write(block)
        time.sleep(0.05)


class Place(NamedTuple):
    """server: an upstream, reached through RLHF_MIRROR; root: where data goes; call, start: download.sh, as from a
    shell in another directory."""

    server: Server
    root: Path
    catalogue: Path
    call: Callable[..., subprocess.CompletedProcess[str]]
    start: Callable[..., subprocess.Popen[str]]

    def file(self, name: str) -> Path:
        return self.root / name


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    """A catalogue with one data set of two files, `plays`, and a server that has them."""
    server = Server()
    server.files = {"/a/plays.txt": TEXT, "/a/labels.jsonl": ROWS}
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    elsewhere, root = tmp_path / "elsewhere", tmp_path / "data"
    elsewhere.mkdir()
    catalogue = tmp_path / "catalogue.json"
    write_catalogue(catalogue, {"plays.txt": sha256(TEXT), "labels.jsonl": sha256(ROWS)})
    words = [str(SCRIPT), "--to", str(root), "--catalogue", str(catalogue)]
    # a proxy of the machine must not see these requests
    environ = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    environ |= {"RLHF_MIRROR": server.address, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

    def start(*more: str, shell: str = "", **variables: str) -> subprocess.Popen[str]:
        command = ["bash", "-c", f'{shell} exec "$@"', "bash"] if shell else []
        return subprocess.Popen(
            [*command, *words, *more],
            cwd=elsewhere,
            env=environ | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def call(*more: str, shell: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
        process = start(*more, shell=shell, **variables)
        out, err = process.communicate(timeout=60)
        assert "Traceback" not in err, err
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    yield Place(server, root, catalogue, call, start)
    server.shutdown()
    server.server_close()


def write_catalogue(
    path: Path, hashes: dict[str, str | None], converter: str = "copy", disk_mb: float = 1, sizes: bool = True
) -> None:
    originals = {
        name: {
            "url": f"https://upstream.example/a/{name}",
            "sha256": digest,
            "bytes": {"plays.txt": len(TEXT), "labels.jsonl": len(ROWS)}.get(name) if sizes else None,
        }
        for name, digest in hashes.items()
    }
    entry = {
        "about": "plays and labels",
        "licence": "none",
        "homepage": "https://upstream.example",
        "download_mb": 1,
        "disk_mb": disk_mb,
        "converter": converter,
        "files": {name: [name] for name in hashes},
    }
    path.write_text(json.dumps({"originals": originals, "data_sets": {"plays": entry}}), encoding="utf-8")


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


# --- what a user sees


def test_download_then_already_there(place: Place) -> None:
    first = place.call("plays")
    assert first.returncode == 0, first.stderr
    assert place.file("plays/plays.txt").read_bytes() == TEXT
    assert f"{place.root}/plays/plays.txt: 2,000 lines" in first.stdout
    receipt = json.loads(place.file("plays/.downloaded.json").read_text())
    assert receipt["files"]["labels.jsonl"] == {
        "rows": 1, "left_out": {}, "bytes": len(ROWS), "sha256": sha256(ROWS),
    }  # fmt: skip
    place.file("plays/notes.txt").write_text("mine")  # does not matter
    asked = len(place.server.asked)
    again = place.call("plays")
    assert (again.returncode, again.stdout) == (0, f"{place.root}/plays: already there\n")
    assert len(place.server.asked) == asked == 2


def test_an_unknown_name_lists_the_known_ones(place: Place) -> None:
    result = place.call("play")
    assert result.returncode == 2
    assert result.stderr == "error: unknown data set play; there are plays, or all (--list says more)\n"
    assert place.call().returncode == 2  # no name at all
    assert not place.root.exists()


def test_the_list(place: Place) -> None:
    assert re.search(r"^plays +1 MB, +1 on disk  plays and labels$", place.call("--list").stdout, re.MULTILINE)
    place.call("all")
    assert "plays  there" in place.call("--list").stdout


def test_a_directory_of_the_users_own_is_left_alone(place: Place) -> None:
    place.file("plays").mkdir(parents=True)
    place.file("plays/mine.txt").write_text("mine")
    result = place.call("plays")
    assert result.returncode == 1
    assert "was not made by this script" in result.stderr
    assert [f.name for f in place.file("plays").iterdir()] == ["mine.txt"]


def test_changed_data_is_not_replaced_and_not_called_whole(place: Place) -> None:
    place.call("plays")
    place.file("plays/labels.jsonl").write_bytes(ROWS * 2)
    result = place.call("plays")
    assert result.returncode == 1
    assert "labels.jsonl changed" in result.stderr
    assert place.file("plays/labels.jsonl").read_bytes() == ROWS * 2


def test_data_of_an_older_catalogue_is_made_again(place: Place) -> None:
    place.call("plays")
    new = ROWS * 3
    place.server.files["/a/labels.jsonl"] = new
    write_catalogue(place.catalogue, {"plays.txt": sha256(TEXT), "labels.jsonl": sha256(new)}, sizes=False)
    assert place.call("plays").returncode == 0
    assert place.file("plays/labels.jsonl").read_bytes() == new
    assert [asked.path for asked in place.server.asked].count("/a/plays.txt") == 1
    assert sorted(f.name for f in place.root.iterdir()) == [".locks", ".originals", "plays"]


# --- faults of the network


def test_a_cut_connection_goes_on_where_it_was(place: Place) -> None:
    place.server.faults["/a/plays.txt"] = [cut_after(30_000), busy, cut_after(30_000)]
    result = place.call("plays", *FAST)
    assert result.returncode == 0, result.stderr
    assert "cut after 30,000 of" in result.stderr
    assert "503 Service Unavailable; trying again in 0.02 s" in result.stderr  # the second in a row
    starts = [asked.start for asked in place.server.asked if asked.path == "/a/plays.txt"]
    assert starts == [0, 30_000, 30_000, 60_000]
    assert place.file("plays/plays.txt").read_bytes() == TEXT


def test_a_server_without_ranges(place: Place) -> None:
    place.server.faults["/a/plays.txt"] = [cut_after(30_000), no_ranges]
    assert place.call("plays", *FAST).returncode == 0
    assert place.file("plays/plays.txt").read_bytes() == TEXT


def test_a_redirect_is_followed_with_the_range(place: Place) -> None:
    place.server.files["/cdn"] = TEXT
    place.server.faults["/a/plays.txt"] = [redirect] * 2
    place.server.faults["/cdn"] = [cut_after(30_000)]
    assert place.call("plays", *FAST).returncode == 0
    assert [asked for asked in place.server.asked if asked.path == "/cdn"] == [Asked("/cdn", 0), Asked("/cdn", 30_000)]
    assert place.file("plays/plays.txt").read_bytes() == TEXT


def redirect(handler: Handler, content: bytes, start: int) -> None:
    handler.send_response(302)
    handler.send_header("Location", "/cdn")
    handler.send_header("Content-Length", "0")
    handler.end_headers()


def test_it_gives_up_without_progress_and_keeps_what_came(place: Place) -> None:
    place.server.faults["/a/plays.txt"] = [cut_after(30_000), busy, busy, busy]
    result = place.call("plays", *FAST, "--retries", "2")
    assert result.returncode == 1
    assert "answers 503 Service Unavailable, 3 times in a row" in result.stderr
    assert "RLHF_MIRROR" in result.stderr
    assert place.file(".originals/plays.txt.part").read_bytes() == TEXT[:30_000]
    assert not place.file("plays").exists()
    assert place.call("plays").returncode == 0
    assert place.server.asked[-2:] == [Asked("/a/plays.txt", 30_000), Asked("/a/labels.jsonl", 0)]


def test_a_file_that_is_not_there_is_an_error_at_once(place: Place) -> None:
    del place.server.files["/a/plays.txt"]
    result = place.call("plays")
    assert result.returncode == 1
    assert f"{place.server.address}/a/plays.txt answers 404" in result.stderr
    assert "the mirror lacks the file" in result.stderr
    assert len(place.server.asked) == 1
    assert not place.file("plays").exists()


def test_nobody_answers(place: Place) -> None:
    result = place.call("plays", *FAST, "--retries", "1", RLHF_MIRROR="http://127.0.0.1:1")
    assert result.returncode == 1
    assert "no connection: [Errno 111] Connection refused, 2 times in a row" in result.stderr


def test_wrong_bytes_are_removed(place: Place) -> None:
    wrong = TEXT.replace(b"line 7 ", b"line 8 ")
    place.server.files["/a/plays.txt"] = wrong
    result = place.call("plays")
    assert result.returncode == 1
    assert f"expected sha256 {sha256(TEXT)}\n  found sha256    {sha256(wrong)}" in result.stderr
    assert not place.file("plays").exists()
    assert [f.name for f in place.file(".originals").iterdir() if f.suffix != ".lock"] == []


def test_a_file_of_another_size_is_refused_before_it_is_fetched(place: Place) -> None:
    place.server.files["/a/plays.txt"] = b"version https://git-lfs.github.com/spec/v1\n"  # a pointer, not the file
    result = place.call("plays")
    assert result.returncode == 1
    assert f"expected {len(TEXT)} bytes" in result.stderr
    assert "found 43 bytes" in result.stderr


@pytest.mark.parametrize("leftover", [b"x" * 5000, TEXT + b"x"], ids=["wrong beginning", "too long"])
def test_a_bad_part_is_not_built_upon(place: Place, leftover: bytes) -> None:
    place.file(".originals").mkdir(parents=True)
    place.file(".originals/plays.txt.part").write_bytes(leftover)
    place.server.faults["/a/plays.txt"] = [range_not_satisfiable] if len(leftover) > len(TEXT) else []
    assert place.call("plays", *FAST).returncode == 0
    assert place.file("plays/plays.txt").read_bytes() == TEXT


def range_not_satisfiable(handler: Handler, content: bytes, start: int) -> None:
    handler.send_response(416)
    handler.send_header("Content-Range", f"bytes */{len(content)}")
    handler.end_headers()


def test_a_damaged_original_is_fetched_again(place: Place) -> None:
    place.call("plays")
    place.file(".originals/plays.txt").write_bytes(TEXT[:-1])
    for file in ("plays.txt", "labels.jsonl", ".downloaded.json"):
        place.file(f"plays/{file}").unlink()
    place.file("plays").rmdir()
    assert "plays.txt is damaged" in place.call("plays").stderr
    assert place.file("plays/plays.txt").read_bytes() == TEXT


def test_without_a_known_checksum_the_first_download_sets_it(place: Place) -> None:
    write_catalogue(place.catalogue, {"plays.txt": None, "labels.jsonl": sha256(ROWS)}, sizes=False)
    first = place.call("plays")
    assert first.returncode == 0
    assert "taken on trust" in first.stderr
    assert f"sha256 {sha256(TEXT)}" in first.stderr
    assert place.file(".originals/plays.txt.sha256").read_text() == f"{sha256(TEXT)}  plays.txt\n"
    assert place.call("plays").stdout.endswith("already there\n")
    place.file(".originals/plays.txt").unlink()
    place.file("plays").rename(place.file("kept"))
    place.server.files["/a/plays.txt"] = TEXT + b"changed upstream\n"
    second = place.call("plays")
    assert second.returncode == 1
    assert f"expected sha256 {sha256(TEXT)}" in second.stderr
    assert "if the publisher has changed it" in second.stderr


# --- addresses


def test_hf_endpoint_is_for_the_hub_only(place: Place) -> None:
    content = place.catalogue.read_text()
    content = content.replace("https://upstream.example/a/plays", "https://huggingface.co/a/plays")
    place.catalogue.write_text(content.replace("https://upstream.example/a/labels", "http://127.0.0.1:1/a/labels"))
    result = place.call("plays", *FAST, "--retries", "0", RLHF_MIRROR="", HF_ENDPOINT=place.server.address + "/")
    assert place.server.asked == [Asked("/a/plays.txt", 0)]
    assert "labels.jsonl from http://127.0.0.1:1/a/labels.jsonl" in result.stderr
    assert result.returncode == 1  # where nobody answers


def test_a_mirror_may_have_a_path_and_must_be_an_address(place: Place) -> None:
    place.server.files = {f"/copies{path}": content for path, content in place.server.files.items()}
    assert place.call("plays", RLHF_MIRROR=f"{place.server.address}/copies/").returncode == 0
    place.call("plays")
    bad = place.call("plays", "--to", str(place.root / "new"), RLHF_MIRROR="mirror.example")
    assert bad.returncode == 2
    assert "RLHF_MIRROR: 'mirror.example' is no address" in bad.stderr


def test_an_original_may_be_called_like_its_data_set(place: Place) -> None:
    place.server.files["/a/plays"] = TEXT
    write_catalogue(place.catalogue, {"plays": sha256(TEXT)})
    assert place.call("plays").returncode == 0
    assert place.file("plays/plays").read_bytes() == TEXT


def test_a_bad_catalogue_is_named(place: Place) -> None:
    place.catalogue.write_text('{"originals": {"a": {"url": "https://x.example/a"}}, "data_sets": {}}')
    result = place.call("plays")
    assert result.returncode == 2
    assert f"{place.catalogue}: not laid out as a catalogue (KeyError('sha256'))" in result.stderr
    write_catalogue(place.catalogue, {"plays.txt": None}, converter="magic")
    assert "converter 'magic' is none of copy, hh" in place.call("plays").stderr
    write_catalogue(place.catalogue, {"../plays.txt": None})
    assert "'../plays.txt' leads out of the data directory" in place.call("plays").stderr
    assert place.call("plays", "--catalogue", "nowhere.json").returncode == 2


# --- space, signals, several at once


def test_too_little_space_is_said_before_the_first_byte(place: Place) -> None:
    write_catalogue(place.catalogue, {"plays.txt": sha256(TEXT)}, disk_mb=1e12)
    result = place.call("plays")
    assert result.returncode == 1
    assert "needs about 1,000,000,000,000 MB" in result.stderr
    assert place.server.asked == []


def test_space_that_ends_on_the_way(place: Place) -> None:
    result = place.call("plays", shell="ulimit -f 64;")  # KiB: writing the 65th fails
    assert result.returncode == 1
    assert "plays.txt.part: no space left" in result.stderr
    assert not place.file("plays").exists()
    assert place.file(".originals/plays.txt.part").read_bytes() == TEXT[: 64 * 1024]
    # as much as the originals need, and no more: the conversion fails
    lines = [json.dumps({"subreddit": "s", "title": "t" * 99, "post": "", "summary": ""})] * 500
    content = ("\n".join(lines) + "\n").encode()
    place.server.files |= {"/a/train": content, "/a/eval": content}
    write_catalogue(place.catalogue, {"train": sha256(content), "eval": sha256(content)}, converter="tldr")
    assert len(content) < 80 * 1024 < 500 * len("SUBREDDIT TITLE POST TL;DR prompt response" + "t" * 99 + " " * 40)
    result = place.call("plays", shell="ulimit -f 80;")
    assert result.returncode == 1
    assert "no space left" in result.stderr
    assert sorted(f.name for f in place.root.iterdir()) == [".locks", ".originals"]
    assert place.call("plays").returncode == 0


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=["Ctrl-C", "killed"])
def test_stopped_and_started_again(place: Place, how: signal.Signals) -> None:
    ended = threading.Event()
    place.server.faults["/a/plays.txt"] = [hang_after(40_000, ended)]
    process = place.start("plays")
    part = place.file(".originals/plays.txt.part")
    wait_for(lambda: part.exists() and part.stat().st_size == 40_000)
    os.killpg(process.pid, how)
    _, err = process.communicate(timeout=20)
    ended.set()
    if how == signal.SIGINT:
        assert process.returncode == 130
        assert "the same command goes on from there" in err
    assert place.call("plays").returncode == 0
    assert place.server.asked[1] == Asked("/a/plays.txt", 40_000)
    assert place.file("plays/plays.txt").read_bytes() == TEXT


def hang_after(num_bytes: int, ended: threading.Event) -> Callable[[Handler, bytes, int], None]:
    def fault(handler: Handler, content: bytes, start: int) -> None:
        handler.begin(content, start)
        handler.wfile.write(content[:num_bytes])
        ended.wait(30)

    return fault


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_two_at_once_share_the_work(place: Place) -> None:
    place.server.faults["/a/plays.txt"] = [slow]
    processes = [place.start("plays") for _ in range(2)]
    texts = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], texts
    assert sorted(asked.path for asked in place.server.asked) == ["/a/labels.jsonl", "/a/plays.txt"]
    assert sorted("already there" in out for out, _ in texts) == [False, True]


# --- what becomes of the originals


def dialogue(*turns: str) -> str:
    return "".join(f"\n\n{'Assistant' if i % 2 else 'Human'}: {turn}" for i, turn in enumerate(turns))


def pair(question: str, good: str, bad: str) -> dict[str, str]:
    return {"chosen": dialogue(question, good), "rejected": dialogue(question, bad)}


def read(path: Path) -> tuple[str, list[Row]]:
    """(format, rows) of a directory or file as the stages read it."""
    rows = list(read_rows(SourceConfig(), open_source(SourceConfig(), str(path))))
    assert all(isinstance(row, Row) for row in rows)
    return detect_format(rows[0]), rows  # type: ignore[arg-type, return-value]


def offer(place: Place, converter: str, files: dict[str, dict[str, bytes]]) -> subprocess.CompletedProcess[str]:
    """Serve files (role -> name -> content) as the data set `made`, and download it."""
    contents = {name: content for role in files.values() for name, content in role.items()}
    place.server.files = {f"/a/{name}": content for name, content in contents.items()}
    write_catalogue(place.catalogue, {name: sha256(content) for name, content in contents.items()}, converter)
    catalogue = json.loads(place.catalogue.read_text())
    entry = catalogue["data_sets"].pop("plays") | {"files": {role: list(named) for role, named in files.items()}}
    place.catalogue.write_text(json.dumps(catalogue | {"data_sets": {"made": entry}}))
    return place.call("made")


def packed(rows: list[dict[str, str]]) -> bytes:
    return gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode())


def test_hh(place: Place) -> None:
    harmless = [pair(f"Is {i} safe?", "Yes.", "No.") for i in range(6)]
    helpful = [pair(f"What is {i}?", "A number — ’tis.", "") for i in range(2)]
    longer = {
        "chosen": dialogue("Hello", "Hi", "Name a prime.", "Seven."),
        "rejected": dialogue("Hello", "Hi", "Name a prime.", "Nine.", "Really?", "No."),
    }
    apart = {"chosen": dialogue("One?", "1"), "rejected": dialogue("Two?", "2")}  # differ before anybody answers
    result = offer(
        place,
        "hh",
        {
            "train": {"harmless.gz": packed([*harmless, apart]), "helpful.gz": packed([*helpful, harmless[0], longer])},
            "eval": {"test.gz": packed([harmless[3], harmless[3] | {"rejected": dialogue("Is 3 safe?", "Perhaps.")}])},
        },
    )
    assert result.returncode == 0, result.stderr
    made = place.file("made")
    # of n rows the k-th stands at (k - 1/2) / n: harmless at .07 .21 .36 .50 .64 .79 .93 (`apart`), helpful at .125
    # .375 .625 .875
    expected = [
        harmless[0], helpful[0], harmless[1], harmless[2], helpful[1], harmless[3], harmless[0], harmless[4],
        harmless[5], longer,
    ]  # fmt: skip
    form, rows = read(made / "rm")
    assert form == "hh"
    assert [row.values for row in rows] == expected
    parsed = [parse_row(row, form) for row in rows]
    assert all(isinstance(row, PairRow) for row in parsed)
    assert read(made / "sft")[0] == "hh"
    assert [row.values for row in read(made / "sft")[1]] == [{"text": row["chosen"]} for row in expected]
    # each prompt once (harmless[0] is there twice), none of the held-out ones (harmless[3]), cut as `rlhf rm` cuts it
    form, prompts = read(made / "rlhf")
    cut = [parse_row(row, form) for row in prompts]
    assert [row.prompt for row in cut if isinstance(row, PromptRow)] == [
        parsed[i].prompt
        for i in (0, 1, 2, 3, 4, 7, 8, 9)  # type: ignore[union-attr]
    ]
    assert len(read(made / "rm/eval")[1]) == 2
    assert len(read(made / "rlhf/eval")[1]) == 1
    assert f"{made}/rm/train.jsonl: 10 rows, 1 left out: no common prompt" in result.stdout
    assert "rlhf/train.jsonl: 8 rows, 1 left out: no common prompt, 2 left out: prompt known already" in result.stdout


def test_imdb(place: Place) -> None:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        for name, text in {
            "train/neg/1_2.txt": "Dull.<br />Very.", "train/neg/0_1.txt": "Bad", "train/pos/0_9.txt": "Fine\n film",
            "train/pos/10_9.txt": "Best", "train/pos/2_9.txt": "Good", "train/unsup/0_0.txt": "No label",
            "test/pos/0_8.txt": "Nice", "test/neg/0_3.txt": "Not nice", "train/pos/../x_1.txt": "no review",
        }.items():  # fmt: skip
            info = tarfile.TarInfo(f"aclImdb/{name}")
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text.encode()))
    result = offer(place, "imdb", {"archive": {"aclImdb.tar.gz": archive.getvalue()}})
    assert result.returncode == 0, result.stderr
    form, rows = read(place.file("made/rm"))
    # positive at 1/6 3/6 5/6, negative at 1/4 3/4
    expected = [
        ("Fine\n film", "positive"), ("Bad", "negative"), ("Good", "positive"), ("Dull.<br />Very.", "negative"),
        ("Best", "positive"),
    ]  # fmt: skip
    parsed = [parse_row(row, form) for row in rows]
    assert [(row.text, row.label) for row in parsed if isinstance(row, LabelledRow)] == expected
    assert place.file("made/rlhf/train.txt").read_text() == "Fine film\nBad\nGood\nDull.<br />Very.\nBest\n"
    assert place.file("made/rlhf/eval/eval.txt").read_text() == "Nice\nNot nice\n"
    assert not (place.root / "x_1.txt").exists()


def test_tldr_and_alpaca(place: Place) -> None:
    post = {"id": "t3_1", "subreddit": "tea", "title": "Hot", "post": "I spilt\nit.", "summary": "Spilt tea."}
    line = (json.dumps(post) + "\n").encode()
    assert offer(place, "tldr", {"train": {"a": line * 3}, "eval": {"b": line}}).returncode == 0
    form, rows = read(place.file("made"))
    assert (form, len(rows)) == ("text2text", 3)
    assert rows[0].values == {
        "prompt": "SUBREDDIT: r/tea\n\nTITLE: Hot\n\nPOST: I spilt\nit.\n\nTL;DR:",
        "response": " Spilt tea.",
    }
    place.file("made").rename(place.file("tldr"))
    instances = [
        {"instruction": "Add.", "input": "1, 2", "output": "3"},
        {"instruction": "Hi", "input": "", "output": ""},
    ]
    assert offer(place, "alpaca", {"train": {"c": json.dumps(instances, indent=4).encode()}}).returncode == 0
    form, rows = read(place.file("made"))
    assert (form, [row.values for row in rows]) == ("text2text", instances)


def test_an_original_of_another_layout_is_named(place: Place) -> None:
    result = offer(place, "tldr", {"train": {"a": b'{"prompt": "p", "label": "l"}\n'}, "eval": {"b": ROWS}})
    assert result.returncode == 1
    assert ".originals/a:1: expected an object with the text 'subreddit', got {\"prompt\"" in result.stderr
    assert not place.file("made").exists()
    assert not place.file(".made.making").exists()


# --- the catalogue in the tree


def test_the_catalogue_is_pinned() -> None:
    catalogue = json.loads((DATA / "catalogue.json").read_text())
    originals = catalogue["originals"]
    used = {name for entry in catalogue["data_sets"].values() for names in entry["files"].values() for name in names}
    assert used == set(originals)
    for name, entry in originals.items():
        assert entry["url"].startswith("https://"), name
        assert entry["sha256"] is None or re.fullmatch("[0-9a-f]{64}", entry["sha256"]), name
        # at a commit, or a file of which the hash is known
        assert re.search(r"/[0-9a-f]{40}/", entry["url"]) or entry["sha256"], name


def test_the_script_reads_the_catalogue_in_the_tree(place: Place) -> None:
    listed = place.call("--list", "--catalogue", str(DATA / "catalogue.json"))
    assert listed.returncode == 0
    for name in ("hh_rlhf", "full_hh_rlhf", "shakespeare", "alpaca", "imdb", "tldr"):
        assert re.search(rf"^{name} ", listed.stdout, re.MULTILINE)
