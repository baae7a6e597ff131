"""TRL's trainer of a stage on the same rows. Runs in an environment of its own, which need not have our package."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
import transformers
import trl
from _probe import Probe, high_water_mib, job_from_argv
from datasets import Dataset, load_dataset
from transformers import AutoTokenizer, TrainerCallback
from transformers.models.llama import modeling_llama  # noqa: F401  before memory is read: the import is lazy
from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

STAGES: dict[str, tuple[Any, Any]] = {"sft": (SFTConfig, SFTTrainer), "rm": (RewardConfig, RewardTrainer)}


class Watch(TrainerCallback):
    """Times at the end of each optimizer step, losses as the trainer reports them."""

    def __init__(self, probe: Probe):
        self.probe = probe

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.probe.step_ended()

    def on_log(self, *_: Any, logs: dict[str, Any], **__: Any) -> None:
        if "loss" in logs:
            self.probe.losses.append(float(logs["loss"]))


def settings(job: dict[str, Any], scratch: str) -> dict[str, Any]:
    """TRL's own defaults, except for what all compared programs must have in common."""
    shared = {
        "output_dir": scratch,
        "max_length": job["max_length"],
        "per_device_train_batch_size": job["micro_batch"],
        "gradient_accumulation_steps": job["global_batch"] // job["micro_batch"],
        "max_steps": job["steps"],
        "learning_rate": job["lr"],
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",  # the file is shuffled already
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": job["seed"],
        "model_init_kwargs": {"dtype": "float32"},
    }
    if job["stage"] == "sft":
        shared["packing"] = job["packing"]
    if not job["defaults"]:
        shared |= {"gradient_checkpointing": False, "bf16": job["dtype"] == "bf16"}
    return shared


def main(job: dict[str, Any]) -> None:
    versions = {m.__name__: m.__version__ for m in (torch, transformers, trl)}
    probe = Probe(high_water_mib(), versions=versions)
    config, trainer_of_stage = STAGES[job["stage"]]
    rows = load_dataset("json", data_files=job["data"], split="train")
    with tempfile.TemporaryDirectory() as scratch:
        trainer = trainer_of_stage(
            model=job["model"],
            args=config(**settings(job, scratch)),
            train_dataset=rows,
            processing_class=AutoTokenizer.from_pretrained(job["model"]),
            callbacks=[Watch(probe)],
        )
        trainer.train()
    lengths = row_lengths(job["stage"], trainer.train_dataset)
    size = job["global_batch"] // job["micro_batch"] * job["micro_batch"]
    # Fewer rows than steps x size means a second epoch in the same order, of which the last batch may be smaller.
    batches = [lengths[start : start + size] for start in range(0, len(lengths), size)]
    steps = [batches[step % len(batches)] for step in range(len(probe.times))]
    probe.tokens, probe.samples = [sum(batch) for batch in steps], [len(batch) for batch in steps]
    probe.write(job["result"])


def row_lengths(stage: str, rows: Dataset) -> list[int]:
    """Tokens of each row as the trainer has prepared it."""
    names = {"sft": ["input_ids"], "rm": ["chosen_ids", "rejected_ids"]}[stage]
    return [sum(map(len, sides)) for sides in zip(*(rows[name] for name in names), strict=True)]


if __name__ == "__main__":
    main(job_from_argv())
