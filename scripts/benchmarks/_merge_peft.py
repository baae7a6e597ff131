"""Merging as PEFT's documentation does it: load everything, merge_and_unload, save."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from _probe import high_water_mib, job_from_argv
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.llama import modeling_llama  # noqa: F401  before memory is read: the import is lazy


def main(job: dict[str, Any]) -> None:
    imports, started = high_water_mib(), time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(job["base"], dtype="auto")
    merged = PeftModel.from_pretrained(model, job["adapter"]).merge_and_unload()
    merged.save_pretrained(job["out"], max_shard_size=job["shard"])
    AutoTokenizer.from_pretrained(job["adapter"]).save_pretrained(job["out"])
    figures = {
        "imports_mib": imports,
        "peak_mib": high_water_mib(),
        "seconds": time.perf_counter() - started,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__},
    }
    Path(job["result"]).write_text(json.dumps(figures), encoding="utf-8")


if __name__ == "__main__":
    main(job_from_argv())
