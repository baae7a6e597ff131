"""A table of responses for people to read, in the terminal and in TensorBoard."""

from __future__ import annotations

from collections.abc import Sequence

from rlhf_cli.run import Run
from rlhf_cli.runtime.metrics import MetricsLog

SHOWN_CHARS = 240  # of a prompt's end and a response in the terminal


def show_samples(
    names: Sequence[str], rows: Sequence[Sequence[str]], iteration: int, run: Run, log: MetricsLog
) -> None:
    """Some of the rows (prompt, response, figures ...), under `names`. Rank 0 only."""
    # Spread over the responses: neighbours may answer the same prompt.
    count = min(run.config.logging.num_log_samples, len(rows))
    shown = [rows[i * len(rows) // count] for i in range(count)]
    cells = [[_end(prompt), _start(response), *figures] for prompt, response, *figures in shown]
    assert run.display is not None
    run.display.grid(f"iteration {iteration}", list(names), cells)
    lines = [names, ["---"] * len(names), *([_cell(c) for c in row] for row in cells)]
    log.text("samples", "\n".join(f"| {' | '.join(line)} |" for line in lines), iteration)


def _end(text: str) -> str:
    return text if len(text) <= SHOWN_CHARS else "…" + text[-SHOWN_CHARS:]


def _start(text: str) -> str:
    return text if len(text) <= SHOWN_CHARS else text[:SHOWN_CHARS] + "…"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", "<br>")
