"""metrics.jsonl (always), TensorBoard and Weights & Biases (as configured). Rank 0 only."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from rlhf_cli.errors import CheckpointError, RunFailed
from rlhf_cli.files import write_text
from rlhf_cli.schema import LoggingConfig


def read_metrics(run_dir: Path) -> Iterator[dict[str, Any]]:
    """The complete lines of metrics.jsonl; a last line that a kill cut off is left out.

    Raises CheckpointError for another line that cannot be read.
    """
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        return
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], start=1):
        try:
            yield json.loads(line)
        except ValueError as error:
            raise CheckpointError(f"{path}:{number} is damaged ({error}); mend or remove that line") from None


class MetricsLog:
    """Writes one JSON object per logged step.

    Opening it at `step` removes what was logged after that step by a run that was killed, so each step stands once.
    """

    def __init__(self, run_dir: Path, logging: LoggingConfig, step: int, name: str, config: dict[str, Any]):
        kept = [line for line in read_metrics(run_dir) if line["step"] <= step]
        write_text(run_dir / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in kept))
        self._file: TextIO = (run_dir / "metrics.jsonl").open("a", encoding="utf-8")
        self._tensorboard = _open_tensorboard(run_dir, step) if logging.tensorboard else None
        self._wandb = _open_wandb(run_dir, logging.wandb_project, name, config) if logging.wandb else None

    def write(self, line: dict[str, Any]) -> None:
        """line: `step` and the metrics of it; numbers also go to the trackers."""
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        numbers = {k: v for k, v in line.items() if isinstance(v, int | float) and k != "step"}
        if self._tensorboard is not None:
            for key, value in numbers.items():
                self._tensorboard.add_scalar(key, value, line["step"])
        if self._wandb is not None:
            self._wandb.log(numbers, step=line["step"])

    def text(self, name: str, markdown: str, step: int) -> None:
        """A piece of text for TensorBoard."""
        if self._tensorboard is not None:
            self._tensorboard.add_text(name, markdown, step)

    def close(self) -> None:
        """Flush everything."""
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def _open_tensorboard(run_dir: Path, step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1)


def _open_wandb(run_dir: Path, project: str, name: str, config: dict[str, Any]) -> Any:
    try:
        import wandb
    except ImportError:
        raise RunFailed("logging.wandb=true needs the package: pip install 'rlhf-cli[wandb]'") from None
    return wandb.init(project=project, name=name, config=config, dir=str(run_dir), resume="allow")
