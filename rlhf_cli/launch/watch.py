"""Start a launcher, wait for it, pass stop requests on, and leave nothing behind."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

from rlhf_cli.jobfiles import console_log, request_stop
from rlhf_cli.launch.command import JobCommand

POLL_SECONDS = 0.05
# timeout(1) and wrappers that pass Ctrl-C on deliver one wish twice, within microseconds; fingers are slower.
SAME_WISH_SECONDS = 0.3
# How long an end_signal may take on other machines before the local launcher is killed.
END_SECONDS = 5.0
# linux/prctl.h
PR_SET_PDEATHSIG = 1


class Ended(NamedTuple):
    """returncode: of the launcher, negative for a signal; stop_signal: the first that reached us, or 0;
    forced: a second one ended the job at once."""

    returncode: int
    stop_signal: int
    forced: bool


def supervise(command: JobCommand, run_dir: Path, log: IO[bytes], echo: Callable[[str], None]) -> Ended:
    """Run a job to its end. SIGINT, SIGTERM or SIGHUP ask the ranks to save and stop; a second one kills them."""
    with _catch_signals() as received:
        launcher = _start(command, log)
        copied = console_log(run_dir).stat().st_size if console_log(run_dir).exists() else 0
        stop_signal, stop_time = 0, 0.0
        try:
            while launcher.poll() is None:
                if received and not stop_signal:
                    stop_signal, stop_time = received[0][0], received[0][1]
                    request_stop(run_dir, stop_signal)
                    echo("\nstopping: saving what is done; again to quit at once")
                if any(when > stop_time + SAME_WISH_SECONDS for _, when in received):
                    end_at_once(launcher, command)
                    return Ended(launcher.returncode, stop_signal, forced=True)
                if not command.shares_terminal:
                    copied = _copy_console(run_dir, copied, echo)
                time.sleep(POLL_SECONDS)
            if not command.shares_terminal:
                _copy_console(run_dir, copied, echo)
            return Ended(launcher.returncode, stop_signal, forced=False)
        finally:
            if launcher.poll() is None:
                end_at_once(launcher, command)


def end_at_once(launcher: subprocess.Popen[bytes], command: JobCommand) -> None:
    """End the launcher and everything below it, now."""
    below = descendants(launcher.pid)
    if command.end_signal != signal.SIGKILL:
        launcher.send_signal(command.end_signal)
        with contextlib.suppress(subprocess.TimeoutExpired):
            launcher.wait(END_SECONDS)
    launcher.kill()
    for pid in below:
        # Most are gone already: ranks ask the kernel to end them with their launcher.
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    launcher.wait()


def descendants(pid: int) -> list[int]:
    """Children of a process, their children, and so on, from /proc."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            # A process may end while we look at it.
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                children.setdefault(_parent((entry / "stat").read_text()), []).append(int(entry.name))
    found = children.get(pid, [])
    for child in found:
        found += children.get(child, [])
    return found


def _parent(stat: str) -> int:
    """proc(5): `pid (name) state parent ...`; a name may hold spaces and parentheses."""
    return int(stat.rpartition(")")[2].split()[1])


@contextlib.contextmanager
def _catch_signals() -> Iterator[list[tuple[int, float]]]:
    """Collect (signal, time) while the body runs. Python allows handlers in the main thread only; elsewhere (the API
    called from a thread) signals stay with the caller."""
    received: list[tuple[int, float]] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    signums = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup ignores it on purpose
        signums.append(signal.SIGHUP)
    handler = lambda signum, frame: received.append((signum, time.monotonic()))
    previous = [(signum, signal.signal(signum, handler)) for signum in signums]
    try:
        yield received
    finally:
        for signum, old in previous:
            signal.signal(signum, old)


def _start(command: JobCommand, log: IO[bytes]) -> subprocess.Popen[bytes]:
    """Start the launcher in a session of its own (so that Ctrl-C reaches only us), bound to our life.

    The launcher hands only descriptors 0, 1 and 2 down to its ranks, and 1 and 2 are the log: our terminal
    travels as 0.
    """
    death_signal = command.end_signal if command.end_signal == signal.SIGKILL else signal.SIGTERM
    prctl = ctypes.CDLL(None).prctl  # loaded here: little is safe between fork and exec
    front = os.getpid()

    def bind_to_front() -> None:
        prctl(PR_SET_PDEATHSIG, int(death_signal))
        if os.getppid() != front:  # we died before the line above
            os._exit(1)

    return subprocess.Popen(
        command.argv,
        env={**os.environ, **command.env},
        stdin=_terminal_fd() if command.shares_terminal else subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        start_new_session=True,
        preexec_fn=bind_to_front,
    )


def _terminal_fd() -> int:
    """The descriptor behind our standard output; 1 when Python's is replaced by something without one (a notebook)."""
    sys.stdout.flush()
    try:
        return sys.stdout.fileno()
    except OSError:  # io.UnsupportedOperation
        return 1


def _copy_console(run_dir: Path, copied: int, echo: Callable[[str], None]) -> int:
    """Show rank 0's new lines; returns how far the file has been shown."""
    path = console_log(run_dir)
    if not path.exists():
        return copied
    with path.open("rb") as file:
        file.seek(copied)
        whole = file.read().rpartition(b"\n")[0]
    if not whole:
        return copied
    for line in whole.decode("utf-8", errors="replace").split("\n"):
        echo(line)
    return copied + len(whole) + 1
