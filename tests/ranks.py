"""Several ranks for tests: pools of processes that live as long as the pytest session and run functions by name.

Ranks are forked from a server that has imported everything, which takes seconds, once; a pool of each size lives on.
A case that fails or takes too long ends its pool, because its other ranks may hang in a collective; the next case gets
a new one.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# What a rank imports sooner or later, its first run included: 8 seconds of one core.
IMPORTED = [
    *("deepspeed", "peft", "transformers", "hydra", "rich.live", "torch._inductor.compile_fx"),
    *("matplotlib.figure", "matplotlib.backends.backend_agg", "rlhf_cli.runtime.plots"),
    *(f"rlhf_cli.stages.{stage}" for stage in ("sft", "rm", "ppo", "raft")),
]
START_SECONDS = 180.0  # imports, on a machine that may be busy
END_SECONDS = 5.0


class RankFailed(AssertionError):
    """A case raised, died or took too long on some rank; the message has every rank's story."""


class Pools:
    """run(world_size, "package.module:function", **json_args) -> the results in rank order.

    The function is called as function(ranks, **json_args) on every rank.
    """

    def __init__(self) -> None:
        self._pools: dict[int, _Pool] = {}

    def run(self, world_size: int, case: str, timeout: float = 120.0, **kwargs: Any) -> list[Any]:
        pool = self._pools.get(world_size)
        if pool is None:
            # Half a gigabyte per rank: at most one large pool at a time.
            for size in [size for size in self._pools if size > 2 and world_size > 2]:
                self._pools.pop(size).close()
            pool = self._pools[world_size] = _Pool(world_size)
        try:
            return pool.run(case, kwargs, timeout)
        except BaseException:
            self._pools.pop(world_size).close()
            raise

    def close(self) -> None:
        while self._pools:
            self._pools.popitem()[1].close()


class _Pool:
    def __init__(self, world_size: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(IMPORTED)
        with _environment(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES=""):  # as what is imported finds it
            forkserver.ensure_running()
        self.logs = tempfile.TemporaryDirectory(prefix="rlhf-test-ranks-")
        self.processes: list[Any] = []
        self.pipes: list[Connection] = []
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        for rank in range(world_size):
            env = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "LOCAL_WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, env, self._log(rank)), daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self.pipes.append(ours)
        self._collect(START_SECONDS, "start")

    def run(self, case: str, kwargs: dict[str, Any], timeout: float) -> list[Any]:
        for pipe in self.pipes:
            pipe.send((case, kwargs))
        return self._collect(timeout, case)

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.close()  # a rank that waits for a case ends by itself, so that its coverage can be kept
        for process in self.processes:
            if "COVERAGE_PROCESS_CONFIG" in os.environ:
                process.join(END_SECONDS)
            process.kill()
        for process in self.processes:
            process.join()
        self.logs.cleanup()

    def _log(self, rank: int) -> str:
        return os.path.join(self.logs.name, f"rank_{rank}.log")

    def _collect(self, timeout: float, case: str) -> list[Any]:
        answers: dict[int, tuple[bool, Any]] = {}
        deadline = time.monotonic() + timeout
        waiting = {id(pipe): rank for rank, pipe in enumerate(self.pipes)}
        while waiting and time.monotonic() < deadline:
            pipes = [pipe for pipe in self.pipes if id(pipe) in waiting]
            for pipe in multiprocessing.connection.wait(pipes, timeout=max(0.0, deadline - time.monotonic())):
                rank = waiting.pop(id(pipe))
                try:
                    answers[rank] = pipe.recv()
                except EOFError:
                    answers[rank] = (False, "the process died")
                if not answers[rank][0]:
                    # The others wait for this rank: give them a moment to fail by themselves, for their traceback.
                    deadline = min(deadline, time.monotonic() + 2.0)
        if len(answers) == len(self.pipes) and all(good for good, _ in answers.values()):
            return [answers[rank][1] for rank in range(len(self.pipes))]
        raise RankFailed("\n".join(self._story(rank, answers.get(rank), case) for rank in range(len(self.pipes))))

    def _story(self, rank: int, answer: tuple[bool, Any] | None, case: str) -> str:
        if answer is not None and answer[0]:
            return f"rank {rank}: {case} finished"
        what = "no answer" if answer is None else answer[1]
        tail = ""
        with contextlib.suppress(FileNotFoundError):
            tail = "\n".join(Path(self._log(rank)).read_text(errors="replace").splitlines()[-15:])
        return f"rank {rank}: {case}: {what}\n--- end of its log ---\n{tail}"


@contextlib.contextmanager
def _environment(**variables: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    yield
    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value


def _serve(pipe: Connection, env: dict[str, str], log: str) -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: a killed pytest leaves no rank behind
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.update(env)
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    ranks = None
    while True:
        try:
            if ranks is None:
                from rlhf_cli.runtime import distributed

                ranks, result = distributed.init(timeout_seconds=60.0), None
            else:
                case, kwargs = pipe.recv()
                module, _, function = case.partition(":")
                result = getattr(importlib.import_module(module), function)(ranks, **kwargs)
            pipe.send((True, result))
        except (EOFError, KeyboardInterrupt):
            return
        except BaseException:
            pipe.send((False, traceback.format_exc()))
