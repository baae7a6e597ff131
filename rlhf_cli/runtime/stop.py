"""A rank's eye on the wish to stop: the front's stop file, and under Slurm a signal that reaches the rank directly."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from types import FrameType

from rlhf_cli.jobfiles import FailureNote, read_notes, request_stop, stop_requested, write_note

POLL_SECONDS = 0.2


class StopWatch:
    """Watches from a daemon thread.

    Before `loop_started` there is nothing to save and the process ends at once; after it, the loop looks at `requested`
    at its step boundaries (ranks see a request at different moments, so they agree on it there), saves and returns.
    """

    def __init__(self, run_dir: Path, rank: int):
        self._run_dir = run_dir
        self._rank = rank
        self._told = 0
        self._requested = 0
        self._in_loop = False
        self._lock = threading.Lock()

    @property
    def requested(self) -> int:
        """The signal behind the wish to stop, or 0."""
        return self._requested

    def start(self) -> None:
        """Begin to watch."""
        threading.Thread(target=self._watch, name="stop-watch", daemon=True).start()

    def listen_to_slurm(self) -> None:
        """Take Slurm's SIGTERM (time limit, preemption, scancel) and SIGUSR1 (sbatch --signal) as the wish to stop."""
        for signum in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(signum, self._take)

    def loop_started(self) -> None:
        """From here on a stop is the loop's business."""
        with self._lock:
            self._in_loop = True

    def _take(self, signum: int, frame: FrameType | None) -> None:
        # SIGUSR1 is the early form of SIGTERM; the exit code should not tell them apart.
        self._told = signal.SIGTERM

    def _watch(self) -> None:
        while not self._requested:
            if self._told:
                self._pass_on(self._told)
            signum = stop_requested(self._run_dir)
            if signum:
                self._stop(signum)
            time.sleep(POLL_SECONDS)

    def _pass_on(self, signum: int) -> None:
        """Tell the other ranks, unless Slurm ends us because one of them failed: they have nothing to save then."""
        if any(note.kind != "interrupted" for note in read_notes(self._run_dir)):
            os._exit(1)
        request_stop(self._run_dir, signum)

    def _stop(self, signum: int) -> None:
        with self._lock:
            self._requested = signum
            if self._in_loop:
                return
            code = 128 + signum
            message = f"stopped by {signal.Signals(signum).name} before the first step; there is nothing to save"
            host = socket.gethostname()
            write_note(self._run_dir, FailureNote(time.time(), self._rank, host, "interrupted", message, "", code))
            print(message, file=sys.stderr, flush=True)
            # Not 0: a peer that is ahead of us would wait in a collective for one that its launcher calls finished.
            os._exit(code)
