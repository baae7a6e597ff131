"""Which rank failed first, and how to say it: from the notes that ranks leave and from what the launcher printed."""

from __future__ import annotations

import re
import signal
from pathlib import Path
from typing import NamedTuple

from rlhf_cli.errors import EXIT_FAILED
from rlhf_cli.jobfiles import START_MARK, FailureNote, launcher_log, rank_log, read_notes

# torch elastic's summary (torch/distributed/elastic/multiprocessing/errors/__init__.py) and the line it prints before
# it ends the ranks that are left.
ELASTIC_RANK = re.compile(r"rank\s+: (\d+) \(local_rank: \d+\)\s+exitcode\s+: (-?\d+) \(pid: (\d+)\)")
ELASTIC_CLOSING = re.compile(r"Sending process (\d+) closing signal")
# The agent logs errors in glog's format, after whatever a rank printed before it had a log of its own.
ELASTIC_ERROR = re.compile(r"^E\d{4} \d\d:\d\d", re.MULTILINE)
# srun's own: "srun: error: node2: tasks 4,6-7: Killed".
SRUN_TASKS = re.compile(
    r"srun: error: \S+: tasks? ([\d,\-]+): (Exited with exit code (\d+)|[A-Z][A-Za-z]*(?: [A-Za-z]+)*)"
)
# deepspeed/launcher/launch.py; it knows the machine (pdsh's prefix), not the rank.
DEEPSPEED_EXIT = re.compile(r"exits with return code = (-?\d+)")

# strsignal's words, which srun prints.
SIGNAL_WORDS = {
    "Killed": signal.SIGKILL,
    "Out Of Memory": signal.SIGKILL,
    "Terminated": signal.SIGTERM,
    "Segmentation fault": signal.SIGSEGV,
    "Aborted": signal.SIGABRT,
    "Bus error": signal.SIGBUS,
    "Illegal instruction": signal.SIGILL,
    "Floating point exception": signal.SIGFPE,
}

LIKELY_REASON = {
    signal.SIGKILL: "probably out of memory: see `dmesg -T | grep -i oom`; smaller batches (train.micro_batch_size,"
    " reward.batch_size), shorter texts or another deepspeed group need less",
    signal.SIGSEGV: "a crash in native code",
    signal.SIGBUS: "probably shared memory is full: see `df -h /dev/shm`",
    signal.SIGABRT: "native code gave up; its log says why",
    signal.SIGILL: "native code built for another processor",
    signal.SIGTERM: "somebody, or a scheduler, ended it",
}

# Words of an error that is only the echo of another rank's end.
ECHO_OF_PEER = re.compile(
    r"connection (was )?(closed|reset|refused)|broken pipe|closed by (remote )?peer|remote process exited"
    r"|local rank 0 failed"  # runtime/distributed.py, local_first
    r"|socket ?timeout|timed out waiting|ncclRemoteError|ncclSystemError|DistNetworkError|recvValue failed",
    re.IGNORECASE,
)

TRACEBACK_LINES = 6
LOG_LINES = 10


class Death(NamedTuple):
    """A rank that ended badly. rank: None when the launcher does not tell; exit_code: negative for a signal."""

    rank: int | None
    exit_code: int


class Failure(NamedTuple):
    """What ended the job. exit_code: of the front; message: ready to be shown."""

    exit_code: int
    message: str


def first_failure(run_dir: Path, launcher_output: str, started: float) -> Failure | None:
    """The cause among everything that went wrong; None when neither a rank nor the launcher names one.

    A signal that only the kernel or native code sends comes first (no other rank can cause it), then exceptions by
    time, then aborts (native code aborts when a peer is gone), then exceptions that name a lost peer.
    launcher_output: what the launcher printed since started, in seconds since the epoch.
    """
    notes = [note for note in read_notes(run_dir) if note.kind != "interrupted"]
    explained = {note.rank for note in notes}
    deaths = [death for death in find_deaths(launcher_output) if death.rank not in explained]
    echoes = [note for note in notes if note.kind == "crash" and ECHO_OF_PEER.search(note.message)]
    causes = [note for note in notes if note not in echoes]
    aborts = [death for death in deaths if death.exit_code == -signal.SIGABRT]
    kills = [death for death in deaths if death.exit_code < 0 and death not in aborts]
    in_order: list[Death | FailureNote] = [*kills, *causes, *aborts, *deaths, *echoes]
    if not in_order:
        return None
    if isinstance(in_order[0], FailureNote):
        return _from_note(run_dir, in_order[0])
    return _from_death(run_dir, in_order[0], launcher_output, started)


def launcher_failure(run_dir: Path, launcher_output: str, code: int) -> Failure:
    """The launcher itself broke. code: its exit code, negative for a signal."""
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return _with_last_words(f"the launcher {how}", _end(launcher_output), launcher_log(run_dir))


def find_deaths(launcher_output: str) -> list[Death]:
    """Ranks that the launcher reports as ended badly, without those that it ended itself."""
    closed = set(ELASTIC_CLOSING.findall(launcher_output))
    deaths = [
        Death(int(rank), int(code)) for rank, code, pid in ELASTIC_RANK.findall(launcher_output) if pid not in closed
    ]
    for tasks, words, code in SRUN_TASKS.findall(launcher_output):
        # srun says "Terminated" of the tasks that --kill-on-bad-exit ended.
        if words in SIGNAL_WORDS and words != "Terminated":
            deaths += [Death(rank, -SIGNAL_WORDS[words]) for rank in _expand(tasks)]
        elif code:
            deaths += [Death(rank, int(code)) for rank in _expand(tasks)]
    deaths += [Death(None, int(code)) for code in DEEPSPEED_EXIT.findall(launcher_output)]
    return list(dict.fromkeys(deaths))


def _expand(tasks: str) -> list[int]:
    """ "4,6-7" -> [4, 6, 7]."""
    bounds = [part.split("-") for part in tasks.split(",") if part]
    return [rank for pair in bounds for rank in range(int(pair[0]), int(pair[-1]) + 1)]


def _from_note(run_dir: Path, note: FailureNote) -> Failure:
    if note.kind == "user":
        return Failure(note.exit_code, note.message)
    # The last line of a traceback is the message again.
    frames = note.traceback.rstrip().splitlines()[:-1][-TRACEBACK_LINES:]
    log = rank_log(run_dir, note.rank)
    return Failure(EXIT_FAILED, "\n".join([f"rank {note.rank} failed: {note.message}", *frames, f"full log: {log}"]))


def _from_death(run_dir: Path, death: Death, launcher_output: str, started: float) -> Failure:
    log = launcher_log(run_dir) if death.rank is None else rank_log(run_dir, death.rank)
    who = "a rank" if death.rank is None else f"rank {death.rank}"
    if death.exit_code < 0:
        number = -death.exit_code
        known = number in set(signal.Signals)
        name = signal.Signals(number).name if known else f"signal {number}"
        reason = LIKELY_REASON.get(signal.Signals(number), "") if known else ""
        return Failure(EXIT_FAILED, f"{who} was killed by {name}{': ' if reason else ''}{reason}\nfull log: {log}")
    how = f"{who} ended with exit code {death.exit_code}"
    if death.rank is None or not log.exists() or log.stat().st_mtime < started:  # it did not get as far as its own log
        return _with_last_words(how, _end(ELASTIC_ERROR.split(launcher_output)[0]), launcher_log(run_dir))
    newest_start = log.read_text(encoding="utf-8", errors="replace").rpartition(START_MARK)[2]
    return _with_last_words(how, _end(newest_start.partition("\n")[2]), log)


def _with_last_words(how: str, words: str, log: Path) -> Failure:
    return Failure(EXIT_FAILED, f"{how}{'; its last words:' if words else ''}\n{words}full log: {log}")


def _end(text: str) -> str:
    """The last lines, indented."""
    return "".join(f"  {line}\n" for line in text.rstrip().splitlines()[-LOG_LINES:])
