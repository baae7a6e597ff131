"""Which of several ends is the cause, and how it is told."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from rlhf_cli.jobfiles import FailureNote, launcher_log, rank_log, request_stop, write_note
from rlhf_cli.launch.failure import Death, find_deaths, first_failure, launcher_failure
from rlhf_cli.launch.job import judge
from rlhf_cli.launch.watch import Ended


def note(run_dir: Path, rank: int, message: str, when: float, kind: str = "crash") -> None:
    assert kind in ("user", "crash", "interrupted")
    text = "" if kind != "crash" else f"Traceback (most recent call last):\n  frame of {rank}\n{message}\n"
    write_note(run_dir, FailureNote(when, rank, "host", kind, message, text, 2 if kind == "user" else 1))  # type: ignore[arg-type]


def elastic_report(failures: dict[int, int], closed: tuple[int, ...] = ()) -> str:
    """torch's own report of ranks that ended with these codes (pid = 1000 + rank); closed: those the agent ended."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    told = "".join(
        f"W1120 10:46:06.142000 4301 torch/distributed/elastic/multiprocessing/api.py:1028]"
        f" Sending process {1000 + rank} closing signal SIGTERM\n"
        for rank in closed
    )
    ends = {rank: ProcessFailure(rank, 1000 + rank, code, "/no/such/file") for rank, code in failures.items()}
    return f"{told}{ChildFailedError('worker', ends)}" if ends else told


def test_torch_elastics_report_reads_as_expected() -> None:
    """Canary: made by the installed torch."""
    report = elastic_report({0: -15, 1: -9, 2: 3, 10: -15}, closed=(0,))
    assert set(find_deaths(report)) == {Death(1, -9), Death(2, 3), Death(10, -15)}


def test_sruns_report() -> None:
    report = (
        "srun: error: node2: task 3: Out Of Memory\n"
        "srun: error: node2: tasks 4,6-7: Segmentation fault (core dumped)\n"
        "srun: error: node1: task 0: Exited with exit code 1\n"
        "srun: error: node1: tasks 1-2: Terminated\n"  # by --kill-on-bad-exit
    )
    segv = [Death(rank, -11) for rank in (4, 6, 7)]
    assert find_deaths(report) == [Death(3, -9), *segv, Death(0, 1)]


def test_deepspeeds_report() -> None:
    line = "node2: [2026-11-20 10:00:00] [ERROR] [launch.py:325:sigkill_handler] ['python'] exits with return code = -9"
    assert find_deaths(line) == [Death(None, -9)]


def test_the_earliest_exception_wins(tmp_path: Path) -> None:
    note(tmp_path, 0, "ValueError: late", 20.0)
    note(tmp_path, 3, "ValueError: early", 10.0)
    failure = first_failure(tmp_path, "", 0.0)
    assert failure is not None
    log = tmp_path / "logs" / "rank_3.log"
    traceback = "Traceback (most recent call last):\n  frame of 3"
    assert failure == (1, f"rank 3 failed: ValueError: early\n{traceback}\nfull log: {log}")


@pytest.mark.parametrize(
    "echo",
    [
        "RuntimeError: [../gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1234",
        "torch.distributed.DistBackendError: NCCL error, remote process exited or there was a network error",
        "RuntimeError: Socket Timeout",
        "RuntimeError: local rank 0 failed: DataError: rows.jsonl:3: empty",
        "ConnectionResetError: [Errno 104] Connection reset by peer",
        "torch.distributed.DistNetworkError: The client socket has timed out",
    ],
)
def test_an_echo_of_a_lost_peer_never_wins(tmp_path: Path, echo: str) -> None:
    note(tmp_path, 0, echo, 10.0)
    note(tmp_path, 1, "ValueError: the cause, written later", 11.0)
    failure = first_failure(tmp_path, "", 0.0)
    assert failure is not None
    assert failure.message.startswith("rank 1 failed: ValueError")
    # An abort explains an echo as well.
    (tmp_path / "logs" / "error_rank_1.json").unlink()
    failure = first_failure(tmp_path, elastic_report({1: -6}), 0.0)
    assert failure is not None
    assert failure.message.startswith("rank 1 was killed by SIGABRT")
    # Alone, the echo is all there is to say.
    failure = first_failure(tmp_path, "", 0.0)
    assert failure is not None
    assert failure.message.startswith("rank 0 failed")


def test_a_kill_comes_before_exceptions_and_an_abort_after(tmp_path: Path) -> None:
    note(tmp_path, 0, "RuntimeError: some collective broke", 10.0)
    killed = first_failure(tmp_path, elastic_report({0: 1, 1: -9}), 0.0)
    assert killed is not None
    assert killed.message.startswith("rank 1 was killed by SIGKILL: probably out of memory")
    aborted = first_failure(tmp_path, elastic_report({0: 1, 1: -6}), 0.0)
    assert aborted is not None
    assert aborted.message.startswith("rank 0 failed: RuntimeError: some collective broke")


def test_a_crash_at_the_very_end_of_a_rank_with_a_note_is_not_another_cause(tmp_path: Path) -> None:
    note(tmp_path, 1, "data.path: no such file", 10.0, "user")
    assert first_failure(tmp_path, elastic_report({1: -11}), 0.0) == (2, "data.path: no such file")


def test_the_last_words_are_those_of_this_start(tmp_path: Path) -> None:
    log = rank_log(tmp_path, 1)
    log.parent.mkdir()
    log.write_text("===== first start\nold words\n===== second start\nnew words\n")
    now = time.time()
    failure = first_failure(tmp_path, elastic_report({1: 3}), now - 5)
    assert failure == (1, f"rank 1 ended with exit code 3; its last words:\n  new words\nfull log: {log}")
    # The rank did not get as far as its log this time.
    os.utime(log, (now - 60, now - 60))
    output = f"python: no module named x\nE1120 10:46:06.142000 4301 torch failed\n{elastic_report({1: 3})}"
    failure = first_failure(tmp_path, output, now - 5)
    words = "rank 1 ended with exit code 3; its last words:\n  python: no module named x\n"
    assert failure == (1, f"{words}full log: {launcher_log(tmp_path)}")


def test_a_launcher_that_breaks(tmp_path: Path) -> None:
    assert first_failure(tmp_path, "ssh: no route to host\n", 0.0) is None
    failure = launcher_failure(tmp_path, "ssh: no route to host\n", 255)
    log = launcher_log(tmp_path)
    assert failure.message == (
        f"the launcher ended with exit code 255; its last words:\n  ssh: no route to host\nfull log: {log}"
    )


def test_what_an_ended_job_means(tmp_path: Path) -> None:
    def exit_code(returncode: int, stop_signal: int = 0, forced: bool = False, output: str = "") -> int:
        return judge(tmp_path, output, Ended(returncode, stop_signal, forced), 0.0).exit_code

    assert exit_code(0) == 0
    assert exit_code(1) == 1
    assert exit_code(-9) == 1
    assert exit_code(0, signal.SIGINT) == 130
    assert exit_code(0, signal.SIGHUP) == 129
    assert exit_code(-9, signal.SIGTERM, forced=True) == 143
    assert exit_code(-9, signal.SIGTERM) == 1  # the launcher was killed while ranks were saving
    request_stop(tmp_path, signal.SIGTERM)  # Slurm told the ranks, not us
    assert exit_code(0) == 143
    assert exit_code(1) == 143
    assert exit_code(1, output="srun: error: node1: task 1: Killed\n") == 1
    note(tmp_path, 0, "RuntimeError: Connection closed by peer", 10.0)
    assert exit_code(1) == 1
    note(tmp_path, 1, "stopped by SIGTERM before the first step", 11.0, "interrupted")
    assert exit_code(1) == 143
    assert exit_code(143, output="srun: error: node1: task 1: Exited with exit code 143\n") == 143
    assert exit_code(1, output=elastic_report({1: 143, 0: -15}, closed=(0,))) == 143
