"""A front process around `run_job`: `python -m tests.launch_front RUN_DIR [launch options as YAML]`."""

from __future__ import annotations

import sys
from pathlib import Path

import yaml

from rlhf_cli.cli import flushed
from rlhf_cli.launch import run_job
from rlhf_cli.schema import LaunchConfig

if __name__ == "__main__":
    run_dir = Path(sys.argv[1])
    launch = LaunchConfig(**yaml.safe_load(sys.argv[2]))
    module = sys.argv[3] if len(sys.argv) > 3 else "tests.launch_worker"
    result = run_job(
        run_dir / "config.yaml", run_dir, launch, lambda message: print(message, flush=True), module=module
    )
    assert "torch" not in sys.modules
    sys.exit(flushed(result.exit_code))
