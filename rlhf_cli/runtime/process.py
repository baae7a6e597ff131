"""The life of one rank as a process: bound to its launcher, its output in its log, its end explained to the front."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import io
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import MutableMapping
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple, NoReturn, TextIO

from rlhf_cli.errors import EXIT_FAILED, RlhfError, RunFailed
from rlhf_cli.jobfiles import (
    FRONT_PID_VARIABLE,
    PLANNED_RANKS_VARIABLE,
    START_MARK,
    TERMINAL_FD_VARIABLE,
    FailureNote,
    launcher_log,
    rank_log,
    write_note,
)
from rlhf_cli.runtime.stop import StopWatch
from rlhf_cli.runtime.terminal import open_terminal

PR_SET_PDEATHSIG = 1  # linux/prctl.h
DISK_FULL = tuple(map(os.strerror, (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)))  # disk, quota, ulimit -f
# tqdm reads its defaults from the environment; in a log one line in ten seconds is enough.
LOG_FRIENDLY = {"TQDM_MININTERVAL": "10", "TQDM_ASCII": "True"}


class RankProcess(NamedTuple):
    """Who this process is in the job. terminal: the stream for our own messages; watch: the wish to stop."""

    rank: int
    local_rank: int
    world_size: int
    terminal: TextIO
    watch: StopWatch


def start_rank(run_dir: Path) -> RankProcess:
    """Make this process a rank. The first thing a worker does, before any heavy import; call once.

    Reads RANK, LOCAL_RANK, WORLD_SIZE (set from Slurm's variables where they are missing), moves everything that is
    printed into logs/rank_N.log, and starts to watch for a stop. Ends with a note for the front where the launcher has
    started another number of ranks than planned: every batch would be another one.
    """
    by_slurm = "RANK" not in os.environ and "SLURM_PROCID" in os.environ
    if by_slurm:
        os.environ.update(slurm_environment(os.environ))
    else:
        bind_to_launcher()  # Slurm itself ends every process of a step
    bind_forked_children()
    rank, local_rank, world_size = (int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    terminal = open_terminal(run_dir, rank)
    redirect(rank_log(run_dir, rank), keep_stdin=rank == 0 and TERMINAL_FD_VARIABLE in os.environ)
    print(
        f"{START_MARK}{datetime.now(timezone.utc):%Y-%m-%d %H:%M:%S} UTC: rank {rank} of {world_size},"
        f" process {os.getpid()} on {socket.gethostname()}"
    )
    planned = os.environ.get(PLANNED_RANKS_VARIABLE, str(world_size))
    if planned != str(world_size):
        end_rank(report_failure(run_dir, RunFailed(_other_number(planned, world_size, run_dir))))
    set_up_logging()
    watch = StopWatch(run_dir, rank)
    if by_slurm:
        watch.listen_to_slurm()
    watch.start()
    return RankProcess(rank, local_rank, world_size, terminal, watch)


def _other_number(planned: str, started: int, run_dir: Path) -> str:
    return (
        f"{planned} ranks were planned, but the launcher started {started}: {launcher_log(run_dir)} has its command."
        " Under Slurm an option of srun (SLURM_* in the environment) disagrees with the allocation; ask sbatch for"
        " --ntasks-per-node=RANKS, or set launch.num_processes"
    )


def report_failure(run_dir: Path, error: BaseException) -> int:
    """Leave this rank's note for the front and the traceback in the log. Returns the exit code to end with."""
    text = "".join(traceback.format_exception(error))
    # By its words, because safetensors and others raise it as an error of their own.
    if any(words in str(error) for words in DISK_FULL) and not isinstance(error, RlhfError):
        error = RunFailed(f"the disk is full ({error}); make room in {run_dir} and start the same command again")
    by_user = isinstance(error, RlhfError)
    exit_code = error.exit_code if isinstance(error, RlhfError) else EXIT_FAILED
    note = FailureNote(
        time=time.time(),
        rank=int(os.environ["RANK"]),
        host=socket.gethostname(),
        kind="user" if by_user else "crash",
        message=str(error) if by_user else "".join(traceback.format_exception_only(error)).strip(),
        traceback="" if by_user else text,
        exit_code=exit_code,
    )
    # First the note: the launcher may end us as soon as a peer notices that we are gone.
    for leave in (lambda: write_note(run_dir, note), lambda: print(text, file=sys.stderr, flush=True)):
        with contextlib.suppress(OSError):  # no room even for that; the other one may still fit
            leave()
    return exit_code


def end_rank(exit_code: int) -> NoReturn:
    """End a broken rank now. The ordinary end would wait for threads and collectives that cannot finish any more."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # a full disk
            stream.flush()
    os._exit(exit_code)


def bind_to_launcher() -> None:
    """Have the kernel kill this process when its launcher dies."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))
    front = os.environ.get(FRONT_PID_VARIABLE)
    if front is not None and _grandparent() != int(front):
        os._exit(EXIT_FAILED)  # the launcher died before the request above


def bind_forked_children() -> None:
    """Have the kernel kill what this process forks (data-loader workers, a pool of tokenizers) when this process dies.

    The kernel counts the end of the *thread* that forked as the parent's death, so children of other threads than the
    main one are left out.
    """
    prctl = ctypes.CDLL(None).prctl
    by_main_thread = False

    def before() -> None:
        nonlocal by_main_thread
        by_main_thread = threading.current_thread() is threading.main_thread()

    def in_child() -> None:
        if by_main_thread:
            prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))

    os.register_at_fork(before=before, after_in_child=in_child)


def _grandparent() -> int:
    """The launcher's parent; 0 when the launcher is gone."""
    try:
        stat = Path(f"/proc/{os.getppid()}/stat").read_text()
    except FileNotFoundError:
        return 0
    return int(stat.rpartition(")")[2].split()[1])  # proc(5): pid (name) state parent ...


def redirect(log: Path, *, keep_stdin: bool) -> None:
    """Send descriptors 1 and 2 to the end of a file, for C libraries and children too.

    keep_stdin: leave the terminal behind descriptor 0, where rich asks for its width; Python's own stdin is empty in
    any case, so that nothing can wait for the user to type.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    fd = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    for target in (1, 2):
        os.dup2(fd, target)
    os.close(fd)
    for stream in (sys.stdout, sys.stderr):
        assert isinstance(stream, io.TextIOWrapper), "start_rank runs in a fresh interpreter"
        stream.reconfigure(encoding="utf-8", errors="replace", line_buffering=True)
    sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115
    if not keep_stdin:
        os.dup2(sys.stdin.fileno(), 0)


def set_up_logging() -> None:
    """Libraries at WARNING, ourselves at INFO, warnings in the same form; all of it lands in the rank's log."""
    logging.basicConfig(
        level=logging.WARNING,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stderr,
    )
    logging.getLogger("rlhf_cli").setLevel(logging.INFO)
    logging.captureWarnings(True)
    for name, value in LOG_FRIENDLY.items():
        os.environ.setdefault(name, value)


def slurm_environment(env: MutableMapping[str, str]) -> dict[str, str]:
    """torch.distributed's variables from Slurm's, for a task that srun started."""
    nodes = env.get("SLURM_STEP_NODELIST") or env["SLURM_JOB_NODELIST"]
    return {
        "RANK": env["SLURM_PROCID"],
        "LOCAL_RANK": env["SLURM_LOCALID"],
        "WORLD_SIZE": env["SLURM_NTASKS"],
        "MASTER_ADDR": env.get("MASTER_ADDR") or first_host(nodes),
        # The front sends a free port along; by hand, one that differs between jobs and is the same in all tasks.
        "MASTER_PORT": env.get("MASTER_PORT") or str(20000 + int(env["SLURM_JOB_ID"]) % 10000),
    }


def first_host(nodes: str) -> str:
    """The first machine of a Slurm host list: "gpu[03-05,9],cpu1" -> "gpu03", "a-[1-2]-x" -> "a-1-x"."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    assert first is not None, f"an empty host list: {nodes!r}"
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0])
