"""`rlhf rm`: a reward model from pairs, rankings or labelled texts."""

from __future__ import annotations

from pathlib import Path

from rlhf_cli import training
from rlhf_cli.assemble import Reading, Task, load_data, load_text
from rlhf_cli.comparison_objective import ComparisonObjective
from rlhf_cli.data.comparison_stream import comparison_texts
from rlhf_cli.data.comparisons import PreparedComparisons, prepare_comparisons
from rlhf_cli.run import open_run
from rlhf_cli.runtime.distributed import Ranks, init, shutdown
from rlhf_cli.runtime.process import RankProcess
from rlhf_cli.schema import RmConfig

READING = Reading(prepare_comparisons, comparison_texts)


def run(config: RmConfig, run_dir: Path, process: RankProcess) -> None:
    """One rank of the stage, from joining the others to leaving them."""
    ranks = init(config.launch.timeout)
    fit(config, run_dir, process, ranks)
    shutdown()


def fit(config: RmConfig, run_dir: Path, process: RankProcess, ranks: Ranks) -> dict[str, float]:
    """Train as the config says. Returns the final figures, which are also in the manifest; {} when interrupted."""
    run = open_run(config, run_dir, process, ranks)
    text = load_text(config, run_dir, run, READING)
    data = load_data(config, text, run, READING)
    run.say(describe(data))
    objective = lambda architecture: ComparisonObjective(config, data, text, run, architecture)
    return training.train_to_end(config, run, text, task_of(data), objective, data.digest)


def task_of(data: PreparedComparisons) -> Task:
    """One score from comparisons, one logit per label from labels."""
    return Task("sequence_classification", data.labels if data.kind == "labels" else None)


def describe(data: PreparedComparisons) -> str:
    """One line for the user: what is learnt from how many rows."""
    line = f"{data.kind}: {len(data.train)} to train on"
    return line + (f", {len(data.eval)} to evaluate on" if data.eval is not None else ", none to evaluate on")


def dry_run(config: RmConfig, world_size: int) -> None:
    """Print what a job of `world_size` ranks would do."""
    training.dry_run(config, world_size, READING, task_of)
