"""The stages from Python: `sft(compose("sft", ["conf=shakespeare_bpe", "data.path=plays.txt"]))`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_cli import job
from rlhf_cli.config.compose import compose_stage
from rlhf_cli.errors import ConfigError, Problem, RunFailed
from rlhf_cli.report.write import write_report
from rlhf_cli.rundir import read_manifest
from rlhf_cli.schema import (
    STAGES,
    MergeLoraConfig,
    PpoConfig,
    RaftConfig,
    RmConfig,
    ScoreConfig,
    SftConfig,
    build,
    to_dict,
)


def compose(stage: str, overrides: list[str]) -> Any:
    """The typed config that `rlhf STAGE *overrides` would run with (conf=... included).

    Raises ConfigError with all problems of these words. What is still missing may be set on the result; the stage that
    it is given to checks the whole.
    """
    name = stage.replace("_", "-")  # as the function of this module is called
    if name not in STAGES:
        raise ConfigError([Problem("", f"no stage {stage!r}; stages: {', '.join(STAGES)}")])
    composed = compose_stage(name, overrides)
    if composed.problems:
        raise ConfigError(composed.problems)
    return composed.config


def sft(config: SftConfig) -> Path:
    """Supervised fine-tuning, in processes of its own as on the command line. Returns the run directory.

    Raises ConfigError when the request is wrong, RunFailed when the run broke; so do the other stages.
    """
    return _run("sft", config)


def rm(config: RmConfig) -> Path:
    """Reward model from pairs, rankings or labels. Returns the run directory."""
    return _run("rm", config)


def merge_lora(config: MergeLoraConfig) -> Path:
    """Adapter + base -> plain model. Returns the run directory."""
    return _run("merge-lora", config)


def ppo(config: PpoConfig) -> Path:
    """PPO against reward sources. Returns the run directory, whose model is the policy."""
    return _run("ppo", config)


def raft(config: RaftConfig) -> Path:
    """Reward-ranked fine-tuning. Returns the run directory, whose model is the policy."""
    return _run("raft", config)


def score(config: ScoreConfig) -> Path:
    """Rewards of a file's rows. Returns the run directory, which holds scores.jsonl.

    To score texts at hand: rlhf_cli.reward.open_reward.
    """
    return _run("score", config)


def metrics(run_dir: Path | str) -> dict[str, float]:
    """The final figures of a finished run."""
    return read_manifest(Path(run_dir)).get("metrics") or {}


def report(run_dirs: Sequence[Path | str], out: Path | str = "report.html") -> Path:
    """One HTML page about runs, given outright or as folders that hold some. Returns its path.

    Raises DataError when there is no run, or when the page cannot be written.
    """
    return write_report([Path(place).expanduser() for place in run_dirs], Path(out).expanduser()).path


def _run(stage: str, config: Any) -> Path:
    expected = STAGES[stage].config
    if not isinstance(config, expected):
        got = type(config).__name__
        raise ConfigError(
            [Problem("", f"`rlhf {stage}` takes a {expected.__name__}, as compose({stage!r}, ...) makes it; got {got}")]
        )
    values = to_dict(config)
    checked = build(type(config), values)
    problems = job.request_problems(checked)
    if problems:
        raise ConfigError(problems)
    outcome = job.start(stage, values, checked, None, lambda text: print(text, file=sys.stderr))
    if outcome.exit_code:
        raise RunFailed(f"`rlhf {stage}` ended with exit code {outcome.exit_code}; see {outcome.run_dir}/logs")
    return outcome.run_dir
