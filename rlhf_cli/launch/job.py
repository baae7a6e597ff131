"""One job from start to exit code: choose the launcher, start the ranks, wait, say what went wrong."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal, NamedTuple

from rlhf_cli.errors import EXIT_DONE
from rlhf_cli.jobfiles import START_MARK, forget_earlier_start, launcher_log, read_notes, stop_requested
from rlhf_cli.launch.command import JobCommand
from rlhf_cli.launch.devices import num_processes
from rlhf_cli.launch.elastic import elastic_command
from rlhf_cli.launch.failure import Failure, first_failure, launcher_failure
from rlhf_cli.launch.multinode import (
    deepspeed_command,
    describe,
    hostfile_world_size,
    slurm_command,
    slurm_nodes,
    slurm_world_size,
)
from rlhf_cli.launch.watch import Ended, supervise
from rlhf_cli.schema import LaunchConfig

Launcher = Literal["elastic", "deepspeed", "slurm"]


class JobResult(NamedTuple):
    """exit_code: for the shell; stop_signal: the signal that interrupted the job, or 0; failure: what broke it."""

    exit_code: int
    stop_signal: int = 0
    failure: Failure | None = None


def choose_launcher(launch: LaunchConfig) -> Launcher:
    """What launch.launcher=auto means here: a hostfile, then a Slurm allocation of several machines, then this one."""
    if launch.launcher != "auto":
        return launch.launcher
    if launch.hostfile:
        return "deepspeed"
    return "slurm" if slurm_nodes() > 1 else "elastic"


def world_size(launch: LaunchConfig) -> int:
    """Ranks of the whole job, before any is started. Raises ConfigError when they cannot be had."""
    counts = {"elastic": num_processes, "deepspeed": hostfile_world_size, "slurm": slurm_world_size}
    return counts[choose_launcher(launch)](launch)


def run_job(
    config_path: Path,
    run_dir: Path,
    launch: LaunchConfig,
    echo: Callable[[str], None],
    module: str = "rlhf_cli.worker",
) -> JobResult:
    """Run `python -m module config_path` in every rank until the job is done, broken or stopped.

    echo: shows one message to the user; the failing rank's error goes through it, once.
    Exit code: 0, the failing rank's (2 for a request that is wrong, else 1), or 128 + the signal that stopped the job.
    """
    forget_earlier_start(run_dir)
    log_path = launcher_log(run_dir)
    log_path.parent.mkdir(parents=True, exist_ok=True)
    say = _surviving_lost_terminal(echo, log_path)
    started = time.time()
    with tempfile.TemporaryDirectory(prefix="rlhf-launch-") as scratch, log_path.open("ab") as log:
        command = job_command(launch, module, config_path, Path(scratch))
        for note in command.notes:
            say(note)
        log.write(f"{START_MARK}{datetime.now(timezone.utc):%Y-%m-%d %H:%M:%S} UTC: {describe(command)}\n".encode())
        log.flush()
        start = log.tell()
        ended = supervise(command, run_dir, log, say)
    with log_path.open("rb") as log:
        log.seek(start)
        output = log.read().decode("utf-8", errors="replace")
    result = judge(run_dir, output, ended, started)
    if result.failure:
        say(f"error: {result.failure.message}")
    return result


def job_command(launch: LaunchConfig, module: str, config_path: Path, scratch: Path) -> JobCommand:
    """The launcher's command for this config."""
    launcher = choose_launcher(launch)
    if launcher == "deepspeed":
        return deepspeed_command(launch, module, config_path, scratch)
    if launcher == "slurm":
        return slurm_command(launch, module, config_path)
    return elastic_command(launch, num_processes(launch), module, config_path, scratch)


def judge(run_dir: Path, launcher_output: str, ended: Ended, started: float) -> JobResult:
    """What an ended job means. A rank that breaks while it saves is a failure, also after a stop request; a rank that
    stopped before there was anything to save takes its peers' connections with it, which is none."""
    # Under Slurm the ranks may have been told directly; the request is then theirs.
    stop_signal = ended.stop_signal or stop_requested(run_dir)
    interrupted = JobResult(128 + stop_signal, stop_signal)
    if ended.forced:
        return interrupted
    if ended.returncode == 0:
        return interrupted if stop_signal else JobResult(EXIT_DONE)
    if stop_signal and any(note.kind == "interrupted" for note in read_notes(run_dir)):
        return interrupted
    failure = first_failure(run_dir, launcher_output, started)
    if failure is None and stop_signal and ended.returncode > 0:
        return interrupted  # srun is not content with a step that was told to end, even when every task saved
    failure = failure or launcher_failure(run_dir, launcher_output, ended.returncode)
    return JobResult(failure.exit_code, stop_signal, failure)


def _surviving_lost_terminal(echo: Callable[[str], None], log_path: Path) -> Callable[[str], None]:
    """A message that a closed terminal (SIGHUP) or a closed pipe refuses goes to the log; the job goes on."""

    def say(message: str) -> None:
        try:
            echo(message)
        except OSError as error:
            with log_path.open("a", encoding="utf-8") as log:
                log.write(f"not shown ({error}): {message}\n")

    return say
