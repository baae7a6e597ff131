"""What a person sees while a run goes on: a bar in a terminal, lines elsewhere. Rank 0 only."""

from __future__ import annotations

import time
from typing import Literal, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

LINE_SECONDS = 10.0  # between two lines when there is no bar


class Display:
    """Shows steps, and prints what is said in between without breaking the bar."""

    def __init__(self, terminal: TextIO, mode: Literal["auto", "bar", "lines", "none"], title: str):
        self.console = Console(file=terminal, highlight=False, soft_wrap=True)
        if mode == "auto":
            mode = "bar" if terminal.isatty() else "lines"
        self.mode, self.title = mode, title
        self._bar: Progress | None = None
        self._last_line = 0.0

    def start(self, done: int, total: int, unit: str = "step") -> None:
        """Begin at step `done` of `total`; unit: what a step is."""
        self._unit = unit
        self._started, self._start_step, self._total = time.monotonic(), done, total
        if self.mode == "bar":
            self._bar = Progress(
                TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn(),
                TextColumn("{task.fields[figures]}"), console=self.console, transient=True,
                redirect_stdout=False, redirect_stderr=False,  # what libraries print belongs into the rank's log
            )  # fmt: skip
            self._task = self._bar.add_task(self.title, total=total, completed=done, figures="")
            self._bar.start()

    def step(self, done: int, figures: dict[str, str]) -> None:
        """Show that `done` steps are behind us, with figures such as {"loss": "3.214"}."""
        text = "  ".join(f"{k} {v}" for k, v in figures.items())
        if self._bar is not None:
            self._bar.update(self._task, completed=done, figures=f"{text}  left {self._left(done)}")
        elif self.mode == "lines":
            now = time.monotonic()
            if now - self._last_line >= LINE_SECONDS or done in (self._start_step + 1, self._total):
                self._last_line = now
                self.say(f"{self.title} {self._unit} {done}/{self._total}  {text}  left {self._left(done)}")

    def phase(self, text: str) -> None:
        """Show what goes on inside a long step."""
        if self._bar is not None:
            self._bar.update(self._task, figures=text)
        elif self.mode == "lines" and time.monotonic() - self._last_line >= LINE_SECONDS:
            self._last_line = time.monotonic()
            self.say(f"{self.title} {text}")

    def _left(self, done: int) -> str:
        ran = done - self._start_step
        seconds = (time.monotonic() - self._started) / max(1, ran) * (self._total - done)
        return f"{int(seconds // 3600)}:{int(seconds // 60 % 60):02d}:{int(seconds % 60):02d}"

    def say(self, text: str) -> None:
        """Print a line."""
        self.console.print(text, markup=False)

    def table(self, title: str, rows: list[tuple[str, str]]) -> None:
        """A two-column summary."""
        table = Table(title=title, show_header=False, title_justify="left")
        for name, value in rows:
            table.add_row(name, value)
        self.console.print(table)

    def grid(self, title: str, names: list[str], rows: list[list[str]]) -> None:
        """A table with a line between its rows, which may be texts of several lines; not shown with progress=none."""
        if self.mode == "none":
            return
        table = Table(*names, title=title, title_justify="left", show_lines=True)
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))  # Text: brackets in a response are no markup
        self.console.print(table)

    def stop(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
