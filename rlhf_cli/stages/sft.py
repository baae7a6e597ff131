"""`rlhf sft`: supervised fine-tuning of a causal language model, or pre-training from scratch."""

from __future__ import annotations

from pathlib import Path

from rlhf_cli import training
from rlhf_cli.assemble import Reading, Task, load_data, load_text
from rlhf_cli.data.dataset import prepare
from rlhf_cli.data.stream import train_texts
from rlhf_cli.lm_objective import LanguageModelObjective
from rlhf_cli.run import open_run
from rlhf_cli.runtime.distributed import Ranks, init, shutdown
from rlhf_cli.runtime.process import RankProcess
from rlhf_cli.schema import SftConfig

TASK = Task("causal_lm")
READING = Reading(prepare, train_texts)


def run(config: SftConfig, run_dir: Path, process: RankProcess) -> None:
    """One rank of the stage, from joining the others to leaving them."""
    ranks = init(config.launch.timeout)
    fine_tune(config, run_dir, process, ranks)
    shutdown()


def fine_tune(config: SftConfig, run_dir: Path, process: RankProcess, ranks: Ranks) -> dict[str, float]:
    """Train as the config says. Returns the final figures, which are also in the manifest; {} when interrupted."""
    run = open_run(config, run_dir, process, ranks)
    text = load_text(config, run_dir, run, READING)
    data = load_data(config, text, run, READING)
    objective = lambda _: LanguageModelObjective(config, data, text, run)
    return training.train_to_end(config, run, text, TASK, objective, data.digest)


def dry_run(config: SftConfig, world_size: int) -> None:
    """Print what a job of `world_size` ranks would do."""
    training.dry_run(config, world_size, READING, lambda _: TASK)
