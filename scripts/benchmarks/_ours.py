"""`rlhf sft` and `rlhf rm` as a user starts them, and what their run directory tells about them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

from _probe import Probe
from _process import run_quietly

ROOT = Path(__file__).resolve().parents[2]
# The rank's imports and no work. The model's module and the trackers would be imported later, by the work itself.
IMPORTS = """
import rlhf_cli.worker, rlhf_cli.stages.{stage}, torch.utils.tensorboard, matplotlib.pyplot
from transformers.models.llama import modeling_llama
from _probe import high_water_mib
print(high_water_mib())
"""


def run_ours(job: dict[str, Any], env: dict[str, str], run_dir: Path, ranks: int = 1) -> Probe:
    """Train through the command line into an empty run directory."""
    shutil.rmtree(run_dir, ignore_errors=True)
    run_quietly([*command(job, run_dir, ranks), *job.get("overrides", ())], env, ROOT)
    return read_run(run_dir)


def command(job: dict[str, Any], run_dir: Path, ranks: int) -> list[str]:
    """The command line for a job; everything else is the program's default."""
    settings = {
        "run_dir": run_dir,
        "resume": "never",
        "data.path": job["rows"],
        "data.max_length": job["max_length"],
        "optim.lr": job["lr"],
        "optim.schedule": "constant",
        "optim.warmup_ratio": 0,
        "train.max_steps": job["steps"],
        "train.global_batch_size": job["global_batch"],
        "train.micro_batch_size": job["micro_batch"],
        "train.seed": job["seed"],
        "model.dtype": job["dtype"],
        "model.gradient_checkpointing": str(job["checkpointing"]).lower(),
        "launch.num_processes": ranks,
        "logging.progress": "none",
    } | stage_settings(job)
    if "model" in job:
        settings["model.path"] = job["model"]
    return [sys.executable, "-m", "rlhf_cli", job["stage"], *(f"{key}={value}" for key, value in settings.items())]


def stage_settings(job: dict[str, Any]) -> dict[str, Any]:
    """What only this stage has to be told."""
    if job["stage"] == "rm":
        return {"data.format": "paired"}
    packing = str(job["packing"]).lower()
    return {"data.format": "text_only", "data.packing": packing, "generation.num_prompts": 0}


def read_run(run_dir: Path) -> Probe:
    """Times from TensorBoard's file, which has the wall clock of each step's end; the rest from metrics.jsonl."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return Probe(
        peak_mib=max(line["perf/peak_memory_gb"] for line in lines) * 1024,
        times=wall_times(run_dir / "tensorboard"),
        tokens=per_step(lines, "num_tokens"),
        samples=per_step(lines, "samples"),
        losses=[line["loss"] for line in lines],
        versions=json.loads((run_dir / "manifest.json").read_text(encoding="utf-8"))["versions"],
    )


def per_step(lines: list[dict[str, Any]], name: str) -> list[int]:
    """What each step adds to a running count."""
    return [after - before for before, after in pairwise([0, *(line[name] for line in lines)])]


def wall_times(directory: Path, tag: str = "loss") -> list[float]:
    """Wall-clock second at which each step's figure of this name was logged."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    (file,) = directory.glob("events.*")
    return [event.wall_time for event in EventFileLoader(str(file)).Load() if _is_about(event, tag)]


def _is_about(event: Any, tag: str) -> bool:
    return any(value.tag == tag for value in event.summary.value)


def imports_mib(stage: str, env: dict[str, str]) -> float:
    """Memory of a process that imports what a rank of this stage imports."""
    path = {"PYTHONPATH": f"{ROOT}:{Path(__file__).parent}"}
    program = [sys.executable, "-c", IMPORTS.format(stage=stage)]
    done = subprocess.run(program, env=env | path, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])
