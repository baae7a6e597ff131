"""Jobs of fake ranks (no torch in them) under a real front and a real launcher: output, failures, stops, orphans."""

from __future__ import annotations

import json
import os
import pty
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import pytest

from rlhf_cli.jobfiles import FailureNote, rank_log, request_stop, write_note
from rlhf_cli.launch.elastic import free_port
from rlhf_cli.launch.watch import _catch_signals, descendants
from tests.launch_case import Job, gone, until

pytestmark = pytest.mark.distributed

TWO = {"num_processes": 2}


@pytest.mark.parametrize("ranks", [1, 2])
def test_only_our_messages_reach_the_terminal(tmp_path: Path, ranks: int) -> None:
    # What an earlier start left: a stop request and a note to be forgotten, and a log to be kept.
    request_stop(tmp_path, signal.SIGTERM)
    write_note(tmp_path, FailureNote(1.0, 0, "host", "interrupted", "stopped", "", 0))
    rank_log(tmp_path, 0).write_text("earlier\n")
    job = Job(tmp_path, {"do": "talk"}, {"num_processes": ranks})
    assert job.wait() == 0
    assert job.output == "hello from rank 0 tty=False\n"
    assert job.log(0).startswith("earlier\n")
    for rank in range(ranks):
        lines = job.log(rank).removeprefix("earlier\n").splitlines()
        assert lines[0].startswith("===== ")
        assert f"rank {rank} of {ranks}" in lines[0]
        assert lines[1:] == ["chatter on stdout", "chatter from a child", f"hello from rank {rank} tty=False"]
        assert job.env(rank)["WORLD_SIZE"] == str(ranks)
        assert job.env(rank)["LOCAL_RANK"] == str(rank)


def test_a_crash_shows_the_first_failing_rank_only(tmp_path: Path) -> None:
    job = Job(tmp_path, {"do": "crash", "rank": 1}, TWO)
    assert job.wait() == 1
    assert job.output.startswith("error: rank 1 failed: ValueError: the sum is odd\n")
    assert f"full log: {tmp_path}/logs/rank_1.log" in job.output
    assert "launch_worker.py" in job.output  # the frames
    assert "Connection closed" not in job.output
    assert "ValueError: the sum is odd" in job.log(1)
    note = json.loads((tmp_path / "logs" / "error_rank_1.json").read_text())
    assert (note["rank"], note["kind"], note["exit_code"]) == (1, "crash", 1)


def test_a_user_error_shows_its_message_and_nothing_else(tmp_path: Path) -> None:
    job = Job(tmp_path, {"do": "user error", "rank": 1}, TWO)
    assert job.wait() == 2
    assert job.output == "error: data.path: rows.jsonl:3: no field 'prompt'; allowed: prompt, response\n"


def test_a_killed_rank_ends_the_job_within_seconds(tmp_path: Path) -> None:
    job = Job(tmp_path, {"do": "train"}, TWO)
    job.wait_for_files("in_loop_0", "in_loop_1")
    os.kill(job.pid(1), signal.SIGKILL)
    assert job.wait(5) == 1
    assert job.output.startswith("error: rank 1 was killed by SIGKILL: probably out of memory")
    assert job.output.endswith(f"full log: {tmp_path}/logs/rank_1.log\n")
    assert gone(job.pid(0))


def test_a_rank_that_leaves_without_a_word(tmp_path: Path) -> None:
    job = Job(tmp_path, {"do": "exit", "rank": 1}, TWO)
    assert job.wait() == 1
    log = f"{tmp_path}/logs/rank_1.log"
    assert job.output == (
        f"error: rank 1 ended with exit code 3; its last words:\n  last words before the exit\nfull log: {log}\n"
    )


def test_a_rank_that_breaks_before_it_has_a_log(tmp_path: Path) -> None:
    job = Job(tmp_path, {}, {"num_processes": 1}, module="tests.no_such_module")
    assert job.wait() == 1
    assert job.output.startswith("error: rank 0 ended with exit code 1; its last words:\n")
    assert "No module named tests.no_such_module" in job.output
    assert job.output.endswith(f"full log: {tmp_path}/logs/launcher.log\n")


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stop_saves_and_ends_every_rank(tmp_path: Path, signum: int, code: int) -> None:
    job = Job(tmp_path, {"do": "train"}, TWO)
    job.wait_for_files("in_loop_0", "in_loop_1")
    below = descendants(job.front.pid)
    assert {job.pid(0), job.pid(1)} < set(below)
    # Sent twice within microseconds, as timeout(1) does: one wish.
    job.front.send_signal(signum)
    job.front.send_signal(signum)
    assert job.wait(10) == code
    assert [(tmp_path / f"saved_{rank}").read_text() for rank in (0, 1)] == [str(int(signum))] * 2
    assert job.output == "\nstopping: saving what is done; again to quit at once\n"
    assert all(gone(pid) for pid in below)


def test_a_second_signal_ends_the_job_at_once(tmp_path: Path) -> None:
    job = Job(tmp_path, {"do": "fork"}, TWO)  # children of ranks, too
    job.wait_for_files("pid_child_0", "pid_child_1", "in_loop_0", "in_loop_1")
    # A rank that cannot look at the stop request.
    os.kill(job.pid(1), signal.SIGSTOP)
    below = descendants(job.front.pid)
    assert {job.pid("child_0"), job.pid("child_1")} < set(below)
    job.front.send_signal(signal.SIGINT)
    time.sleep(0.5)
    before = time.monotonic()
    job.front.send_signal(signal.SIGINT)
    assert job.wait(10) == 130
    assert time.monotonic() - before < 1
    until(lambda: all(gone(pid) for pid in below), 1)


def test_a_stop_before_the_loop_has_nothing_to_save(tmp_path: Path) -> None:
    job = Job(tmp_path, {"do": "before loop"}, TWO)
    job.wait_for_files("waiting_0", "waiting_1")
    job.front.send_signal(signal.SIGTERM)
    assert job.wait(5) == 143
    note = json.loads((tmp_path / "logs" / "error_rank_0.json").read_text())
    assert note["kind"] == "interrupted"
    assert (tmp_path / ".stop").read_text() == "15\n"


def test_a_stop_while_the_ranks_are_at_different_places(tmp_path: Path) -> None:
    job = Job(tmp_path, {"do": "before loop", "rank": 1}, TWO)
    job.wait_for_files("waiting_0", "waiting_1")
    below = descendants(job.front.pid)
    job.front.send_signal(signal.SIGTERM)
    assert job.wait(10) == 143
    assert job.output == "\nstopping: saving what is done; again to quit at once\n"
    assert all(gone(pid) for pid in below)


def test_a_rank_that_breaks_while_it_saves_is_a_failure(tmp_path: Path) -> None:
    job = Job(tmp_path, {"do": "crash on stop"}, {"num_processes": 1})
    job.wait_for_files("in_loop_0")
    job.front.send_signal(signal.SIGINT)
    assert job.wait(10) == 1
    assert "error: the disk is full ([Errno 28] No space left on device" in job.output


def test_a_killed_front_leaves_no_orphan(tmp_path: Path) -> None:
    job = Job(tmp_path, {"do": "fork"}, TWO)
    job.wait_for_files("pid_child_0", "pid_child_1", "in_loop_0", "in_loop_1")
    below = descendants(job.front.pid)
    assert len(below) == 5  # agent, two ranks, a child of each
    job.front.kill()
    until(lambda: all(gone(pid) for pid in below), 3)


def test_a_killed_agent_ends_the_job(tmp_path: Path) -> None:
    job = Job(tmp_path, {"do": "train"}, TWO)
    job.wait_for_files("in_loop_0", "in_loop_1")
    below = descendants(job.front.pid)
    os.kill(below[0], signal.SIGKILL)
    assert job.wait(5) == 1
    assert job.output.startswith("error: the launcher was killed by SIGKILL\n")
    until(lambda: all(gone(pid) for pid in below), 3)


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        job = Job(tmp_path, {"do": "talk"}, {"num_processes": 1, "master_port": port})
        assert job.wait() == 0
    note = f"launch.master_port: {port} is taken; using a free port instead\n"
    assert job.output == note + "hello from rank 0 tty=False\n"
    assert job.env(0)["MASTER_PORT"] != str(port)


def test_a_port_that_is_asked_for(tmp_path: Path) -> None:
    port = free_port()
    job = Job(tmp_path, {"do": "talk"}, {"num_processes": 1, "master_port": port})
    assert job.wait() == 0
    assert job.env(0)["MASTER_PORT"] == str(port)


def terminal_job(tmp_path: Path, deed: dict, columns: int) -> tuple[Job, int]:
    """A job whose front leads a session with a terminal of its own; also the other end of that terminal."""
    import fcntl
    import struct
    import termios

    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))

    def own_the_terminal() -> None:
        fcntl.ioctl(slave, termios.TIOCSCTTY, 0)

    job = Job(
        tmp_path,
        deed,
        TWO,
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
        preexec_fn=own_the_terminal,
        env={"TERM": "xterm", "NO_COLOR": "1", "COLUMNS": ""},
    )
    os.close(slave)
    return job, master


def read_all(master: int) -> str:
    """What the terminal showed, until nobody holds its other end."""
    shown = b""
    while True:
        try:
            part = os.read(master, 65536)
        except OSError:  # EIO: the last holder is gone
            return shown.decode()
        if not part:
            return shown.decode()
        shown += part


def test_rank_0_draws_a_bar_on_the_terminal(tmp_path: Path) -> None:
    job, master = terminal_job(tmp_path, {"do": "bar"}, columns=101)
    shown = read_all(master)
    assert job.wait() == 0
    assert "steps" in shown
    assert "100%" in shown
    assert shown.count("message 1") == 1  # rank 1 has a bar, too; its own log is where it goes
    assert "width=101 tty=True" in job.log(0)
    # The log keeps the messages and the last state of the bar, without control codes.
    kept = [line for line in job.log(0).splitlines() if line.startswith(("message", "steps"))]
    assert kept[:3] == ["message 0", "message 1", "message 2"]
    assert len(kept) == 4
    assert "100%" in kept[3]
    assert "\x1b" not in job.log(0)


def test_ctrl_c_in_a_terminal_stops_and_saves(tmp_path: Path) -> None:
    job, master = terminal_job(tmp_path, {"do": "train"}, columns=80)
    job.wait_for_files("in_loop_0", "in_loop_1")
    os.write(master, b"\x03")
    shown = read_all(master)
    assert job.wait(10) == 130
    assert "stopping: saving what is done" in shown
    assert (tmp_path / "saved_0").exists()
    assert (tmp_path / "saved_1").exists()


def test_a_closed_terminal_stops_and_saves(tmp_path: Path) -> None:
    job, master = terminal_job(tmp_path, {"do": "talk then train"}, columns=80)
    job.wait_for_files("in_loop_0", "in_loop_1")
    os.close(master)  # SIGHUP to the front; rank 0 and the front can no longer write
    assert job.wait(10) == 129
    assert (tmp_path / "saved_0").exists()
    assert (tmp_path / "saved_1").exists()
    assert "the terminal is gone" in job.log(0)
    assert "saving at a closed terminal" in job.log(0)
    assert "not shown" in (tmp_path / "logs" / "launcher.log").read_text()


def test_signal_handlers_are_put_back() -> None:
    before = [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    ignored = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    try:
        with _catch_signals() as received:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGHUP)
            until(lambda: len(received) > 0, 1)
        assert [signum for signum, _ in received] == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGHUP, ignored)
    assert [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before


def test_a_job_may_run_outside_the_main_thread() -> None:
    seen: list[list] = []

    def body() -> None:
        with _catch_signals() as received:
            seen.append(received)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [[]]


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """The environment of an allocation of two machines with one task each, and an srun that runs them here.

    SLURM_NTASKS is what sbatch makes of --ntasks-per-node=1.
    """
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "srun").symlink_to(Path(__file__).parent / "fake_srun.py")
    return {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "77",
        "SLURM_NNODES": "2",
        "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_NTASKS": "2",
    }


def test_slurm_tasks_find_their_ranks(tmp_path: Path, slurm: dict[str, str]) -> None:
    job = Job(tmp_path, {"do": "talk"}, {}, env=slurm)
    assert job.wait() == 0
    assert job.output == "hello from rank 0 tty=False\n"  # by way of logs/console.log
    for rank in (0, 1):
        env = job.env(rank)
        assert (env["RANK"], env["LOCAL_RANK"], env["WORLD_SIZE"]) == (str(rank), "0", "2")
        assert env["MASTER_ADDR"] == "localhost"
        assert env["MASTER_PORT"] == job.env(0)["MASTER_PORT"]


def test_slurm_starts_the_ranks_that_are_asked_for(tmp_path: Path, slurm: dict[str, str]) -> None:
    """Whatever sbatch was told: SLURM_NTASKS is srun's --ntasks unless the command line has one."""
    job = Job(tmp_path, {"do": "talk"}, {"num_processes": 2}, env=slurm | {"SLURM_CPUS_ON_NODE": "24"})
    assert job.wait() == 0, job.output
    places = [(job.env(rank)["LOCAL_RANK"], job.env(rank)["WORLD_SIZE"]) for rank in range(4)]
    assert places == [("0", "4"), ("1", "4")] * 2


def test_slurm_starts_another_number_of_ranks(tmp_path: Path, slurm: dict[str, str]) -> None:
    srun = tmp_path / "bin" / "srun"
    srun.unlink()
    fake = Path(__file__).parent / "fake_srun.py"
    srun.write_text(f'#!/bin/bash\nexec {sys.executable} {fake} "${{@/--ntasks=4/--ntasks=2}}"\n')
    srun.chmod(0o755)
    job = Job(tmp_path, {"do": "talk"}, {"num_processes": 2}, env=slurm)
    assert job.wait() == 1
    assert job.output.startswith("error: 4 ranks were planned, but the launcher started 2: ")
    assert "hello" not in job.output


def test_slurm_tells_a_rank_to_stop(tmp_path: Path, slurm: dict[str, str]) -> None:
    job = Job(tmp_path, {"do": "train"}, {}, env=slurm)
    job.wait_for_files("in_loop_0", "in_loop_1")
    os.kill(job.pid(1), signal.SIGUSR1)  # one is told, all save
    assert job.wait(10) == 143
    assert (tmp_path / "saved_0").read_text() == (tmp_path / "saved_1").read_text() == "15"


def test_slurm_stops_ranks_at_different_places(tmp_path: Path, slurm: dict[str, str]) -> None:
    job = Job(tmp_path, {"do": "before loop", "rank": 1}, {}, env=slurm)
    job.wait_for_files("waiting_0", "waiting_1")
    os.kill(job.pid(1), signal.SIGTERM)
    assert job.wait(10) == 143
    assert "error" not in job.output


def test_slurm_kills_a_task(tmp_path: Path, slurm: dict[str, str]) -> None:
    job = Job(tmp_path, {"do": "train"}, {}, env=slurm)
    job.wait_for_files("in_loop_0", "in_loop_1")
    os.kill(job.pid(1), signal.SIGKILL)
    assert job.wait(10) == 1
    assert job.output.startswith("error: rank 1 was killed by SIGKILL")


def test_slurm_second_signal(tmp_path: Path, slurm: dict[str, str]) -> None:
    job = Job(tmp_path, {"do": "train"}, {}, env=slurm)
    job.wait_for_files("in_loop_0", "in_loop_1")
    below = descendants(job.front.pid)
    os.kill(job.pid(1), signal.SIGSTOP)
    job.front.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    job.front.send_signal(signal.SIGTERM)
    assert job.wait(5) == 143
    assert all(gone(pid) for pid in below)
