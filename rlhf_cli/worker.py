"""One rank of a job, from the frozen YAML: `python -m rlhf_cli.worker RUN_DIR/config.yaml`.

With `--dry-run N` it is the one process that opens data and model for an estimate of a job of N ranks.
"""

from __future__ import annotations

import importlib
import logging
import sys
from pathlib import Path
from typing import Any

import yaml

from rlhf_cli.errors import RlhfError
from rlhf_cli.schema import STAGES, from_file


def main(argv: list[str]) -> int:
    """Entry point of a rank. Returns the exit code."""
    config_path = Path(argv[0])
    stage = STAGES[yaml.safe_load(config_path.read_text(encoding="utf-8"))["stage"]]
    if argv[1:2] == ["--dry-run"]:
        return _dry_run(stage.module, from_file(stage.config, config_path), int(argv[2]))
    return _run(stage.module, stage.config, config_path)


def _run(module: str, config_class: type, config_path: Path) -> int:
    # Before the slow imports: from here on output goes to the rank's log, and a stop is heard.
    from rlhf_cli.runtime.process import end_rank, report_failure, start_rank

    run_dir = config_path.parent
    process = start_rank(run_dir)
    try:
        importlib.import_module(module).run(from_file(config_class, config_path), run_dir, process)
    except BaseException as error:  # whatever it is, the front has to show it
        end_rank(report_failure(run_dir, error))
    return 0


def _dry_run(module: str, config: Any, world_size: int) -> int:
    logging.disable(logging.WARNING)  # libraries' remarks have no log to go to here
    try:
        importlib.import_module(module).dry_run(config, world_size)
    except RlhfError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
