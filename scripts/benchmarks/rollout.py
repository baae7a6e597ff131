#!/usr/bin/env python3
"""Tokens/s of rlhf's sampler, beside model.generate and transformers' continuous batching.

    python scripts/benchmarks/rollout.py                              a small Llama on CPU, fp32 and bf16
    python scripts/benchmarks/rollout.py --dtype bf16 --runs 5 --threads 2
    python scripts/benchmarks/rollout.py --gpu                        a 1B Llama in bf16; needs CUDA
    python scripts/benchmarks/rollout.py --quick                      seconds; tries the path, says nothing about speed

All sample from the same random model, at temperature 1 without filters, with the same rows at a time. Fixed: one batch,
every response as long as allowed. Ragged: several batches, with so many end tokens that responses have a given mean
length, which no program knows beforehand. Tokens are those of responses, up to the first end token; the time is from
prompts to responses, reading the prompts included. In turn, several times; medians. A ratio is taken within each run,
between neighbours in time, so that what else the machine does touches both; shown are its median and its range.

The bounds are of this machine, measured in the same run: the work of all matrix products at the speed of a large one,
and the weights and caches that each step has to read at the speed of a copy.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import transformers

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
sys.path.insert(0, str(HERE.parents[1]))

import _rollout_programs as programs  # noqa: E402
from _rollout_programs import PROGRAMS, Shape, Task  # noqa: E402

from rlhf_cli.runtime.flops import measured_peak_flops  # noqa: E402

QUICK = Shape(hidden=32, layers=2, heads=2, kv_heads=2, vocab=128, batch=4, prompt=8, new=8, mean=3, ragged_prompts=8)
# TinyLlama-1.1B's sizes (arXiv 2401.02385, table 2), and lengths of a dialogue.
LARGE = Shape(2048, 22, 32, 4, 32000, batch=64, prompt=256, new=256, mean=96, ragged_prompts=256)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
COPIED_BYTES = 1 << 28  # far beyond any cache


class Speed(NamedTuple):
    """Tokens/s of each run."""

    fixed: list[float]
    ragged: list[float]


class Bounds(NamedTuple):
    """What the machine allows, in tokens/s; see `bounds`."""

    compute: float
    bandwidth: float


def main() -> int:
    options = parse()
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if options.gpu else "cpu")
    shape = QUICK if options.quick else LARGE if options.gpu else Shape()
    figures: dict[str, Any] = {"options": {k: str(v) for k, v in vars(options).items()}}
    for dtype in options.dtype:
        print(heading(shape, dtype, device, options))
        speeds = measure(options, shape, DTYPES[dtype], device)
        limits = machine_limits(DTYPES[dtype], device)
        size = DTYPES[dtype].itemsize
        fixed, ragged = (bounds(shape, mean, size, *limits) for mean in (shape.new, shape.mean))
        print(table(speeds, fixed, ragged), "\n")
        print(f"{limits[0] / 1e9:,.0f} GFLOP/s in a large matrix product, {limits[1] / 1e9:,.1f} GB/s in a copy\n")
        figures[dtype] = {name: speed._asdict() for name, speed in speeds.items()}
        figures[dtype]["bounds"] = {"fixed": fixed._asdict(), "ragged": ragged._asdict()}
    print(f"load average at the end: {os.getloadavg()[0]:.1f}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1), encoding="utf-8")
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=["fp32", "bf16"])
    parser.add_argument("--programs", nargs="+", choices=list(PROGRAMS), default=list(PROGRAMS))
    parser.add_argument("--runs", type=int, default=3, help="of each program, in turn; default 3")
    parser.add_argument("--threads", type=int, default=2, help="default 2")
    parser.add_argument(
        "--cpu-time", action="store_true", help="of all threads instead of wall time: on a busy machine"
    )
    parser.add_argument("--gpu", action="store_true", help="a 1B shape in bf16 on the first CUDA device")
    parser.add_argument("--quick", action="store_true", help="a toy, once")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    options = parser.parse_args()
    if options.gpu and not torch.cuda.is_available():
        parser.error("--gpu: no CUDA device is visible")
    if options.gpu:
        options.dtype = ["bf16"]
    if options.quick:
        options.runs = 1
    return options


def heading(shape: Shape, dtype: str, device: torch.device, options: argparse.Namespace) -> str:
    words = [
        f"Llama hidden {shape.hidden}, {shape.layers} layers, {shape.heads} heads ({shape.kv_heads} of keys)",
        f"vocabulary {shape.vocab}; {dtype} on {device}; {shape.batch} rows at a time",
        f"prompts of {shape.prompt // 2} to {shape.prompt} tokens; fixed: {shape.batch} responses of {shape.new}",
        f"ragged: {shape.ragged_prompts} of {shape.mean} on average, {shape.new} at most; {options.runs} runs, in turn",
        f"{options.threads} threads on {os.cpu_count()} cores, {'CPU' if options.cpu_time else 'wall'} time",
        f"load average at the start {os.getloadavg()[0]:.1f}",
        f"torch {torch.__version__}, transformers {transformers.__version__}\n",
    ]
    return ", ".join(words)


def measure(options: argparse.Namespace, shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Speed]:
    """Each program warms up on the toy lengths of a first call, then takes its turns. One that fails is left out."""
    model, tokenizer = programs.make_model(shape, dtype, device), programs.make_tokenizer(shape)
    clock = time.process_time if options.cpu_time else time.perf_counter
    found = {name: Speed([], []) for name in options.programs}
    for run in range(-1, options.runs):
        tasks = programs.fixed_task(shape, run + 1), programs.ragged_task(shape, run + 1)
        for kind, task in zip(Speed._fields, tasks, strict=True):
            for name in list(found):
                try:
                    speed = rate(name, model, tokenizer, shape, task, run + 1, clock)
                except Exception as error:  # a backend that cannot run here: said, and the others go on
                    print(f"{name}: left out: {type(error).__name__}: {str(error)[:300]}", file=sys.stderr)
                    del found[name]
                    continue
                if run >= 0:
                    getattr(found[name], kind).append(speed)
    return found


def rate(name: str, model: Any, tokenizer: Any, shape: Shape, task: Task, seed: int, clock: Any) -> float:
    """Tokens/s."""
    seconds, tokens = programs.timed(PROGRAMS[name], model, tokenizer, shape, task, seed, clock=clock)
    return tokens / seconds


def machine_limits(dtype: torch.dtype, device: torch.device) -> tuple[float, float]:
    """FLOP/s of a large matrix product; bytes/s of a copy, what is read and what is written."""
    source = torch.zeros(COPIED_BYTES, dtype=torch.uint8, device=device)
    target, best = torch.empty_like(source), float("inf")
    for _ in range(5):
        began = time.perf_counter()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return measured_peak_flops(device, dtype), 2 * COPIED_BYTES / best


def bounds(shape: Shape, mean: float, item_size: int, flops: float, bandwidth: float) -> Bounds:
    """Tokens/s if only matrix products cost time, and if only reading weights and caches does.

    Prompts are 3/4 of shape.prompt on average. A response of `mean` tokens takes the head for each, the rest of the
    model for the prompt as well, and attention to all that stands before: 4 · hidden operations for each pair. Each
    step of a full batch reads all weights once, and the keys and values of every row.
    """
    prompt = 0.75 * shape.prompt
    head = shape.vocab * shape.hidden
    pairs = (prompt + mean) ** 2 / 2
    work = (
        2 * (shape.matrix_parameters - head) * (prompt + mean)
        + 2 * head * mean
        + 4 * shape.layers * shape.hidden * pairs
    )
    kept = 2 * shape.layers * shape.hidden * shape.kv_heads / shape.heads * (prompt + mean / 2)
    bytes_per_token = item_size * (shape.matrix_parameters / shape.batch + kept)
    return Bounds(mean * flops / work, bandwidth / bytes_per_token)


def table(speeds: dict[str, Speed], fixed: Bounds, ragged: Bounds) -> str:
    """Markdown: medians, the spread (fastest - slowest) / median, and ratios to generate run by run."""
    lines = [
        "| program | fixed, tokens/s | spread | ÷ generate | ragged, tokens/s | spread | ÷ generate |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    base = speeds.get("generate")
    for name, speed in speeds.items():
        cells = []
        for rates, others in zip(speed, base or ([], []), strict=True):
            middle = median(rates)
            cells += [f"{middle:,.0f}", f"{(max(rates) - min(rates)) / middle:.0%}", ratios(rates, others)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    for kind in Bounds._fields:
        cells = [f"{getattr(fixed, kind):,.0f}", "", "", f"{getattr(ragged, kind):,.0f}", "", ""]
        lines.append(f"| bound by {kind} | {' | '.join(cells)} |")
    return "\n".join(lines)


def ratios(rates: list[float], others: list[float]) -> str:
    """Median and range of rates[i] / others[i]; nothing without others."""
    if not others:
        return ""
    found = [a / b for a, b in zip(rates, others, strict=True)]
    return f"{median(found):.2f} ({min(found):.2f} to {max(found):.2f})"


if __name__ == "__main__":
    sys.exit(main())
