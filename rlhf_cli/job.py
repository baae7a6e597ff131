"""One run of a stage, from the words of a command line to an exit code: compose, check, freeze, launch."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_cli.config.compose import Composed, compose_stage
from rlhf_cli.config.freeze import claim, default_run_dir, freeze, standing
from rlhf_cli.config.requests import check_request
from rlhf_cli.errors import EXIT_DONE, ConfigError, Problem
from rlhf_cli.launch import JobResult, run_job, visible_gpus, world_size
from rlhf_cli.rundir import read_manifest, update_manifest
from rlhf_cli.schema import LaunchConfig

Echo = Callable[[str], None]


class Outcome(NamedTuple):
    """exit_code: as of the process; run_dir: where the run wrote."""

    exit_code: int
    run_dir: Path


def request_problems(config: Any, *, weights_needed: bool = True) -> list[Problem]:
    """What is wrong with a typed config on this machine: files, batch arithmetic, missing GPUs."""
    return list(check_request(config, world_size(launch_of(config)), visible_gpus() > 0, weights_needed))


def launch_of(config: Any) -> LaunchConfig:
    """How the ranks of a stage are started; one process where the config does not speak of ranks."""
    return getattr(config, "launch", LaunchConfig(num_processes=1, launcher="elastic"))


def checked(composed: Composed, *, weights_needed: bool = True) -> Any:
    """The typed config, or ConfigError with every problem of the request together."""
    problems = composed.problems + composed.unmet
    if composed.config is not None:
        problems += request_problems(composed.config, weights_needed=weights_needed)
    if problems:
        raise ConfigError(problems)
    return composed.config


def run(stage: str, words: list[str], echo: Echo, run_dir: Path | None = None) -> Outcome:
    """Run a stage to its end.

    words: the command line after the stage. run_dir: overrides the config's (sweeps).
    Raises ConfigError when the request is wrong; nothing was started then.
    """
    composed = compose_stage(stage, words)
    config = checked(composed)
    return start(stage, composed.values, config, composed.recipe, echo, run_dir)


def start(
    stage: str, values: dict[str, Any], config: Any, recipe: str | None, echo: Echo, run_dir: Path | None = None
) -> Outcome:
    """Freeze a checked config and start its ranks; a finished run of the same config is left alone."""
    where = run_dir or (Path(config.run_dir).expanduser() if config.run_dir else default_run_dir(stage, recipe))
    values = {**values, "run_dir": str(where)}
    found = standing(where, values, config.resume)
    if found.state == "finished":
        echo(f"{where}: finished already, nothing to do (another run_dir= runs it again)")
        return Outcome(EXIT_DONE, where)
    held, frozen = claim(where, found.state, values)
    with held:
        for note in found.notes:
            echo(f"{where}: {note}")
        ranks = world_size(launch_of(config))
        echo(f"{where}: {found.state} run, {ranks} {'rank' if ranks == 1 else 'ranks'}")
        result = run_job(frozen, where, launch_of(config), echo)
        return Outcome(_settle(where, result, echo), where)


def _settle(run_dir: Path, result: JobResult, echo: Echo) -> int:
    """Let the manifest tell how the run ended where no rank could; returns the exit code."""
    status = read_manifest(run_dir).get("status")
    if status == "complete" and result.failure is None:
        return EXIT_DONE  # a stop that came after the last step stopped nothing
    if status == "running":
        try:
            update_manifest(run_dir, status="failed" if result.failure else "interrupted")
        except OSError as error:
            echo(f"{run_dir}/manifest.json still says `running`: {error}")
    return result.exit_code


def dry_run(stage: str, words: list[str], echo: Echo) -> int:
    """Check everything, open the data and the model, estimate steps and memory; start and write nothing."""
    composed = compose_stage(stage, words)
    config = checked(composed, weights_needed=False)
    where = Path(config.run_dir).expanduser() if config.run_dir else default_run_dir(stage, composed.recipe)
    values = {**composed.values, "run_dir": str(where)}
    found = standing(where, values, config.resume)
    echo(f"run_dir: {where} ({found.state})")
    with tempfile.TemporaryDirectory() as scratch:
        frozen = freeze(Path(scratch), values)
        command = [
            sys.executable,
            "-m",
            "rlhf_cli.worker",
            str(frozen),
            "--dry-run",
            str(world_size(launch_of(config))),
        ]
        return subprocess.run(command, env={**os.environ, "TOKENIZERS_PARALLELISM": "true"}, check=False).returncode
