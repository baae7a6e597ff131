"""Rewards from a server: a real one on this machine, with the faults that servers have."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from rlhf_cli.data.rows import Message
from rlhf_cli.errors import ConfigError, RunFailed
from rlhf_cli.reward.http import HttpSource, open_http
from rlhf_cli.reward.source import ScoredText, no_progress
from rlhf_cli.schema import RewardSourceConfig

TEXTS = [ScoredText((Message("user", f"q{i}"),), "x" * i, {"id": i}) for i in range(5)]


class Server:
    """answers: taken one after the other, the last one again and again; each is (status, body) or a function of the
    question. asked: the questions so far."""

    def __init__(self) -> None:
        self.answers: list[Any] = [lambda question: {"rewards": [len(r) for r in question["responses"]]}]
        self.asked: list[dict[str, Any]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.asked.append(question)
                answer = outer.answers.pop(0) if len(outer.answers) > 1 else outer.answers[0]
                answer = answer(question) if callable(answer) else answer
                if answer is None:  # hang up without a word
                    self.connection.close()
                    return
                status, body = answer if isinstance(answer, tuple) else (200, json.dumps(answer))
                self.send_response(status)
                self.end_headers()
                self.wfile.write(body.encode())

            def log_message(self, *_: Any) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/score"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.server.shutdown()
    made.server.server_close()


def client(url: str, waits: list[float] | None = None, **options: Any) -> HttpSource:
    """waits: where the pauses between tries are noted instead of taken."""
    config = RewardSourceConfig(type="http", url=url, **options)
    opened = open_http(config, "judge", "reward.sources[0]", batch_size=2)
    return replace(opened, sleep=(waits if waits is not None else []).append)


def test_batches_in_order(server: Server) -> None:
    done: list[int] = []
    assert client(server.url).score(TEXTS, done.append) == [0, 1, 2, 3, 4]
    assert server.asked[0] == {"prompts": ["q0", "q1"], "responses": ["", "x"], "columns": {"id": [0, 1]}}
    assert [len(question["responses"]) for question in server.asked] == [2, 2, 1]
    assert done == [2, 2, 1]


@pytest.mark.parametrize("fault", [(500, "oops"), (503, ""), (429, "slow down"), lambda question: None])
def test_trouble_that_passes_is_waited_for(server: Server, fault: Any) -> None:
    server.answers = [fault, fault, *server.answers]
    waits: list[float] = []
    assert client(server.url, waits).score(TEXTS[:2], no_progress) == [0, 1]
    assert waits == [1.0, 2.0]
    assert server.asked[0] == server.asked[1] == server.asked[2]


@pytest.mark.parametrize("code", [503, 400])
def test_an_error_whose_body_breaks_off_is_one_all_the_same(code: int) -> None:
    """A server that promises more than it sends, as one does that is killed."""
    cut_off = f"HTTP/1.1 {code} Trouble\r\nContent-Length: 100\r\n\r\nhalf".encode()
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            for _ in range(2 if code == 503 else 1):
                connection, _ = listening.accept()
                with connection:
                    connection.recv(65536)
                    connection.sendall(cut_off)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        said = "no answer in 2 tries: HTTP 503" if code == 503 else "refused the request: HTTP 400"
        with pytest.raises(RunFailed, match=said):
            client(f"http://127.0.0.1:{listening.getsockname()[1]}/", retries=1, timeout=2.0).score(TEXTS, no_progress)
        thread.join(5)


def test_a_slow_body_of_an_error_is_waited_for_no_longer_than_an_answer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 503 Busy\r\nContent-Length: 100\r\n\r\nhalf")
                time.sleep(1)

        threading.Thread(target=serve, daemon=True).start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/"
        with pytest.raises(RunFailed, match=r"HTTP 503 Busy: \(its body could not be read: TimeoutError\)"):
            client(url, retries=0, timeout=0.2).score(TEXTS, no_progress)


def test_trouble_that_stays_is_told(server: Server) -> None:
    server.answers = [(500, "out of memory " * 40)]
    waits: list[float] = []
    with pytest.raises(
        RunFailed, match=r"'judge' \(http://127.*\) gave no answer in 4 tries: HTTP 500 .*out of memory"
    ) as e:
        client(server.url, waits, retries=3).score(TEXTS, no_progress)
    assert waits == [1.0, 2.0, 4.0]
    assert len(str(e.value)) < 450


@pytest.mark.parametrize("status", [400, 401, 404, 422])
def test_a_refusal_is_final(server: Server, status: int) -> None:
    server.answers = [(status, '{"detail": "no such model"}')]
    waits: list[float] = []
    with pytest.raises(RunFailed, match=f"refused the request: HTTP {status} .*no such model"):
        client(server.url, waits).score(TEXTS, no_progress)
    assert (waits, len(server.asked)) == ([], 1)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"rewards": [1]}, r"2 responses, 1 numbers\. The answer: '\{\"rewards\""),
        ({"rewards": [1, None]}, "gave None, no finite number, for sample 1, which starts 'q1'"),
        ((200, '{"rewards": [1, NaN]}'), "gave nan"),
        ({"scores": [1, 2]}, r'must answer \{"rewards": \[...\]\}, got .*scores'),
        ([1, 2], "must answer"),
        ((200, "<html>Welcome"), "answered no JSON: '<html>Welcome'"),
    ],
)
def test_answers_of_no_use(server: Server, answer: Any, message: str) -> None:
    server.answers = [answer]
    with pytest.raises(RunFailed, match=message):
        client(server.url).score(TEXTS, no_progress)
    assert len(server.asked) == 1


def test_a_slow_server(server: Server) -> None:
    def slow(question: Any) -> Any:
        time.sleep(0.5)
        return {"rewards": [0, 0]}

    server.answers = [slow]
    began = time.monotonic()
    with pytest.raises(RunFailed, match=r"no answer in 2 tries: no answer within 0\.1 s"):
        client(server.url, timeout=0.1, retries=1).score(TEXTS[:2], no_progress)
    assert time.monotonic() - began < 0.45, "the timeout was not heeded"


def test_nobody_there() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    waits: list[float] = []
    with pytest.raises(RunFailed, match=r"no answer in 3 tries: .*refused"):
        client(f"http://127.0.0.1:{port}/", waits, retries=2).score(TEXTS, no_progress)
    assert waits == [1.0, 2.0]


def test_between_tries_the_caller_may_stop(server: Server) -> None:
    class Stop(Exception):
        pass

    def progress(scored: int) -> None:
        raise Stop

    server.answers = [(500, "")]
    with pytest.raises(Stop):
        client(server.url).score(TEXTS, progress)
    assert len(server.asked) == 1


@pytest.mark.parametrize("url", ["file:///etc/passwd", "localhost:8000", "ftp://x/y"])
def test_only_http(url: str) -> None:
    with pytest.raises(ConfigError, match=r"sources\[0\]\.url: got .*allowed: http://"):
        client(url)
