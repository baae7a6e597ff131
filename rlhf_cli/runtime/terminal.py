"""The user's terminal as a rank sees it: rank 0's own messages go there and into its log; nothing else does."""

from __future__ import annotations

import io
import locale
import os
import re
import sys
from pathlib import Path
from typing import TextIO, cast

from rlhf_cli.jobfiles import TERMINAL_FD_VARIABLE, console_log

# ECMA-48 control sequences (colours, cursor) and the OSC ones (titles, links).
ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\^_])")


class Terminal(io.TextIOBase):
    """A text stream to the terminal that also keeps the finished lines in the log.

    Like a terminal, the log forgets what a carriage return overwrites, so a progress bar leaves only its last state.
    A terminal that goes away (closed window, closed pipe) is dropped; the log goes on.
    """

    def __init__(self, fd: int, log: TextIO):
        self._fd = fd
        self._log = log
        self._lost = False
        self._line = ""
        # Asked once: a terminal does not turn into a file, and progress bars ask at each frame.
        self._isatty = os.isatty(fd)

    @property
    def encoding(self) -> str:  # type: ignore[override]  # progress bars choose their characters by it
        return locale.getpreferredencoding(False)

    def isatty(self) -> bool:
        return self._isatty

    def fileno(self) -> int:
        return self._fd

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self._keep(text)
        data = text.encode(self.encoding, errors="replace")
        while data and not self._lost:
            try:
                data = data[os.write(self._fd, data) :]
            except OSError as error:
                self._lost = True
                self._log.write(f"the terminal is gone ({error}); messages go to this log only\n")
        return len(text)

    def flush(self) -> None:
        self._log.flush()

    def _keep(self, text: str) -> None:
        *finished, self._line = (self._line + text).split("\n")
        for line in finished:
            # "\r\n" is one line end; any other "\r" starts the line again.
            self._log.write(ESCAPES.sub("", line.rstrip("\r").rpartition("\r")[2]) + "\n")
        self._line = self._line.rpartition("\r")[2] if not self._line.endswith("\r") else self._line


def open_terminal(run_dir: Path, rank: int) -> TextIO:
    """The stream for our messages. Call once, before descriptors 0 to 2 change; see `redirect` in process.py.

    Rank 0 on the front's machine: the front's terminal. Rank 0 elsewhere: a file that the front copies to its terminal.
    Other ranks: their log.
    """
    if rank != 0:
        return sys.stdout
    inherited = os.environ.get(TERMINAL_FD_VARIABLE)
    if inherited is not None:
        fd = os.dup(int(inherited))
    else:
        fd = os.open(console_log(run_dir), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    return cast(TextIO, Terminal(fd, sys.stdout))
