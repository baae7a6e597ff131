"""`rlhf rm`: a reward model from pairs, rankings or labelled texts."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

from rlhf_cli.assemble import Task, check_length, load_data, load_text, model_config
from rlhf_cli.comparison_objective import ComparisonObjective
from rlhf_cli.data.comparisons import PreparedComparisons, prepare_comparisons
from rlhf_cli.estimate import plan_run
from rlhf_cli.models.tokenizer import tokenizer_digest
from rlhf_cli.run import open_run
from rlhf_cli.runtime.distributed import Ranks, init, shutdown
from rlhf_cli.runtime.process import RankProcess
from rlhf_cli.runtime.progress import Display
from rlhf_cli.schema import RmConfig
from rlhf_cli.training import train_to_end


def run(config: RmConfig, run_dir: Path, process: RankProcess) -> None:
    """One rank of the stage, from joining the others to leaving them."""
    ranks = init(config.launch.timeout)
    fit(config, run_dir, process, ranks)
    shutdown()


def fit(config: RmConfig, run_dir: Path, process: RankProcess, ranks: Ranks) -> dict[str, float]:
    """Train as the config says. Returns the final figures, which are also in the manifest; {} when interrupted."""
    run = open_run(config, run_dir, process, ranks)
    text = load_text(config, run_dir, run)
    data = load_data(config, text, run)
    assert isinstance(data, PreparedComparisons)
    run.say(describe(data))
    return train_to_end(
        config, run, text, task_of(data), lambda: ComparisonObjective(config, data, text, run), data.digest
    )


def task_of(data: PreparedComparisons) -> Task:
    """One score from comparisons, one logit per label from labels."""
    return Task("sequence_classification", data.labels if data.kind == "labels" else None)


def describe(data: PreparedComparisons) -> str:
    """One line for the user: what is learnt from how many rows."""
    line = f"{data.kind}: {len(data.train)} to train on"
    return line + (f", {len(data.eval)} to evaluate on" if data.eval is not None else ", none to evaluate on")


def dry_run(config: RmConfig, world_size: int) -> None:
    """Open data and model for a job of `world_size` ranks and print what it would do. Weights are not loaded."""
    with tempfile.TemporaryDirectory() as scratch:
        text = load_text(config, Path(scratch), None)
    data = prepare_comparisons(config.data, text.tokenizer, tokenizer_digest(text.tokenizer), text.template, print)
    architecture = model_config(config, text, task_of(data))
    check_length(architecture, config.data.max_length)
    # Several ranks are several GPUs, also when they are planned on a machine without.
    planned = plan_run(config, data, architecture, world_size, for_gpu=torch.cuda.is_available() or world_size > 1)
    Display(sys.stdout, "none", "rm").table("rlhf rm --dry-run: nothing was started", planned.rows)
