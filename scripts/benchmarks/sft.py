#!/usr/bin/env python3
"""Speed and memory of `rlhf sft`, side by side with TRL's SFTTrainer and a plain transformers loop.

    python scripts/benchmarks/sft.py                              the comparison and 1 -> 2 ranks, on CPU
    python scripts/benchmarks/sft.py --variants ours,trl --runs 5
    python scripts/benchmarks/sft.py --trl-env ~/trl-env          keep TRL's environment for the next time
    python scripts/benchmarks/sft.py --gpu                        MFU at 1B and 7B shapes; does nothing without CUDA

All programs train the same random Llama on the same ragged documents in the same order, with the same batches, learning
rate and number of threads, one after the other, several times in turn. Prints Markdown tables, writes all figures as
JSON. Speed is the real tokens (no padding) per second of wall clock between the ends of steps, the first left out;
memory is the most that the training process held by the end of its last step, less what its imports take.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import _compare  # noqa: E402
import _mfu  # noqa: E402
from _compare import Job, Variant  # noqa: E402
from _process import directory  # noqa: E402

VARIANTS = {
    "ours": Variant("ours", {}),
    "ours+packing": Variant("ours", {"packing": True}),
    "ours+checkpointing": Variant("ours", {"checkpointing": True}),
    "trl": Variant("trl", {}),
    "trl+packing": Variant("trl", {"packing": True}),
    "trl-defaults": Variant("trl", {"defaults": True}),  # gradient checkpointing, bf16 autocast
    "plain": Variant("plain", {}),
}


def main() -> int:
    options = parse()
    with directory(options.work) as work:
        env = _compare.environment(options, work)
        if options.gpu is not None:
            return gpu(options, env, work)
        _compare.make_material(options, ragged(options), env, work, work)
        parameters = _compare.backbone_parameters(options) + options.vocab * options.hidden
        rows = f"documents of {options.min_length} to {options.max_length} tokens"
        print(_compare.describe(options, parameters, rows), flush=True)
        jobs = {name: (VARIANTS[name].program, job_of(options, name, work)) for name in options.variants}
        _compare.run_all(options, jobs, common_job(options, work), env, work, parameters)
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    _compare.shape_options(parser, {"min-length": 16, "median-length": 120})
    _compare.work_options(parser, VARIANTS)
    return _compare.parse(parser, VARIANTS)


def ragged(options: argparse.Namespace) -> Job:
    """The documents of the comparison."""
    return {
        "documents": options.steps * options.global_batch,
        "min_length": options.min_length,
        "median_length": options.median_length,
    }


def common_job(options: argparse.Namespace, work: Path) -> Job:
    """What every program trains."""
    return _compare.training_job(options, "sft", work / "documents.jsonl", work)


def job_of(options: argparse.Namespace, name: str, work: Path) -> Job:
    """What a variant trains."""
    job = common_job(options, work) | VARIANTS[name].settings
    return job | packed_batch(job) if VARIANTS[name].program == "trl" and job["packing"] else job


def packed_batch(job: Job) -> dict[str, int]:
    """TRL's batch counts packed rows: as many as hold about the tokens of a global batch of documents."""
    tokens = json.loads(Path(job["rows"]).with_name("tokens.json").read_text(encoding="utf-8"))
    rows = max(1, round(tokens / job["steps"] / job["max_length"]))
    forwards = -(-rows // job["micro_batch"])
    micro = -(-rows // forwards)
    return {"micro_batch": micro, "global_batch": micro * forwards}


def gpu(options: argparse.Namespace, env: dict[str, str], work: Path) -> int:
    """MFU at the asked shapes."""
    shapes = _compare.gpu_shapes(options)
    for name, shape in shapes.items():
        full = {
            "weights": False, "vocab": shape.vocab, "max_length": shape.length, "min_length": shape.length,
            "median_length": shape.length, "documents": 2 * shape.micro_batch * options.steps,
        }  # fmt: skip
        _compare.make_material(options, full, env, work / name, work)
    if shapes:
        job = common_job(options, work)
        del job["model"]
        print(_mfu.measure(shapes, job, env, work))
    return 0


if __name__ == "__main__":
    sys.exit(main())
