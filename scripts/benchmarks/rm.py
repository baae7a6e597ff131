#!/usr/bin/env python3
"""Speed and memory of `rlhf rm`, side by side with TRL's RewardTrainer and a plain transformers loop.

    python scripts/benchmarks/rm.py                              the comparison and 1 -> 2 ranks, on CPU
    python scripts/benchmarks/rm.py --variants ours,trl --runs 5
    python scripts/benchmarks/rm.py --trl-env ~/trl-env          keep TRL's environment for the next time
    python scripts/benchmarks/rm.py --gpu                        MFU at 1B and 7B shapes; does nothing without CUDA

All programs train the same random Llama with the same head on the same ragged pairs in the same order, with the same
batches, learning rate and number of threads, one after the other, several times in turn. Prints Markdown tables, writes
all figures as JSON. Speed is pairs and their real tokens (no padding, the prompt counted in both sequences of a pair)
per second of wall clock between the ends of steps, the first left out; memory is the most that the training process
held by the end of its last step, less what its imports take.
"""

from __future__ import annotations

import argparse
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
    "ours-apart": Variant("ours", {"overrides": ["rm.share_prompts=never"]}),
    "ours+checkpointing": Variant("ours", {"checkpointing": True}),
    "trl": Variant("trl", {}),
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
        parameters = _compare.backbone_parameters(options) + options.hidden
        print(_compare.describe(options, parameters, describe_pairs(options)), flush=True)
        job = _compare.training_job(options, "rm", work / "pairs.jsonl", work)
        jobs = {name: (VARIANTS[name].program, job | VARIANTS[name].settings) for name in options.variants}
        _compare.run_all(options, jobs, job, env, work, parameters, samples="pairs")
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    _compare.shape_options(parser, {"mean-prompt": 120, "mean-answer": 60})
    _compare.work_options(parser, VARIANTS)
    return _compare.parse(parser, VARIANTS)


def ragged(options: argparse.Namespace) -> Job:
    """The pairs of the comparison."""
    return {
        "pairs": options.steps * options.global_batch,
        "min_length": 1,
        "mean_prompt": options.mean_prompt,
        "mean_answer": options.mean_answer,
    }


def describe_pairs(options: argparse.Namespace) -> str:
    return (
        f"pairs with prompts of {options.mean_prompt} and answers of {options.mean_answer} tokens on average, together"
        f" at most {options.max_length}"
    )


def gpu(options: argparse.Namespace, env: dict[str, str], work: Path) -> int:
    """MFU at the asked shapes, with pairs whose sequences all have full length."""
    shapes = {name: _mfu.of_pairs(shape) for name, shape in _compare.gpu_shapes(options).items()}
    for name, shape in shapes.items():
        full = {
            "weights": False, "vocab": shape.vocab, "max_length": shape.length, "min_length": shape.length,
            "mean_prompt": shape.length // 2, "mean_answer": shape.length // 2,
            "pairs": 2 * shape.micro_batch * options.steps,
        }  # fmt: skip
        _compare.make_material(options, full, env, work / name, work)
    if shapes:
        job = _compare.training_job(options, "rm", work / "pairs.jsonl", work)
        del job["model"]
        print(_mfu.measure(shapes, job, env, work))
    return 0


if __name__ == "__main__":
    sys.exit(main())
