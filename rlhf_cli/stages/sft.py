"""`rlhf sft`: supervised fine-tuning of a causal language model, or pre-training from scratch."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

from rlhf_cli.assemble import Task, check_length, load_data, load_text, model_config
from rlhf_cli.data.dataset import Prepared, prepare
from rlhf_cli.estimate import plan_run
from rlhf_cli.lm_objective import LanguageModelObjective
from rlhf_cli.models.tokenizer import tokenizer_digest
from rlhf_cli.run import open_run
from rlhf_cli.runtime.distributed import Ranks, init, shutdown
from rlhf_cli.runtime.process import RankProcess
from rlhf_cli.runtime.progress import Display
from rlhf_cli.schema import SftConfig
from rlhf_cli.training import train_to_end

TASK = Task("causal_lm")


def run(config: SftConfig, run_dir: Path, process: RankProcess) -> None:
    """One rank of the stage, from joining the others to leaving them."""
    ranks = init(config.launch.timeout)
    fine_tune(config, run_dir, process, ranks)
    shutdown()


def fine_tune(config: SftConfig, run_dir: Path, process: RankProcess, ranks: Ranks) -> dict[str, float]:
    """Train as the config says. Returns the final figures, which are also in the manifest; {} when interrupted."""
    run = open_run(config, run_dir, process, ranks)
    text = load_text(config, run_dir, run)
    data = load_data(config, text, run)
    assert isinstance(data, Prepared)
    return train_to_end(config, run, text, TASK, lambda: LanguageModelObjective(config, data, text, run), data.digest)


def dry_run(config: SftConfig, world_size: int) -> None:
    """Open data and model for a job of `world_size` ranks and print what it would do. Weights are not loaded."""
    with tempfile.TemporaryDirectory() as scratch:
        text = load_text(config, Path(scratch), None)
    data = prepare(config.data, text.tokenizer, tokenizer_digest(text.tokenizer), text.template, print)
    architecture = model_config(config, text, TASK)
    check_length(architecture, config.data.max_length)
    # Several ranks are several GPUs, also when they are planned on a machine without.
    planned = plan_run(config, data, architecture, world_size, for_gpu=torch.cuda.is_available() or world_size > 1)
    Display(sys.stdout, "none", "sft").table("rlhf sft --dry-run: nothing was started", planned.rows)
