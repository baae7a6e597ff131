"""Model FLOP utilisation of sft and rm at real Llama shapes, against this machine's own matrix product."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from _ours import ROOT, run_ours
from _table import speed


class Shape(NamedTuple):
    """A Llama of full_layers layers. length, micro_batch: of the rows it is trained on. scores: the rows are pairs, and
    each sequence gets one score instead of a logit for each token and word."""

    hidden: int
    heads: int
    intermediate: int
    full_layers: int
    vocab: int
    length: int
    micro_batch: int
    scores: bool = False


SHAPES = {
    "1b": Shape(2048, 16, 5632, 22, 32000, 2048, 8),  # TinyLlama-1.1B without grouped heads (arXiv 2401.02385, table 2)
    "7b": Shape(4096, 32, 11008, 32, 32000, 2048, 4),  # Llama-7B (arXiv 2302.13971, table 2)
    "tiny": Shape(64, 4, 192, 2, 512, 64, 2),  # tries the path without a GPU
}
# bf16 weight and gradient, fp32 gradient sum, master weight and two moments; then room for activations.
BYTES_PER_PARAMETER, SHARE_OF_MEMORY = 20, 0.85
MEASURE = """
import sys, torch
from rlhf_cli.runtime.flops import measured_peak_flops
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 1 << 34
print(torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU")
print(measured_peak_flops(device, torch.bfloat16), memory)
"""


def measure(shapes: Mapping[str, Shape], job: dict[str, Any], env: dict[str, str], work: Path) -> str:
    """A Markdown table, one line per shape. A shape that does not fit is trained with as many layers as do."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE], env=env, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    )
    device, figures = done.stdout.splitlines()[-2:]
    peak, memory = (float(word) for word in figures.split())
    lines = [
        f"{device}: {peak / 1e12:,.3g} TFLOP/s in an 8192³ bf16 matrix product (768³ on CPU)\n",
        "| shape | layers | tokens/s | TFLOP/s | MFU | peak GiB |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, shape in shapes.items():
        layers = min(shape.full_layers, layers_that_fit(shape, memory * SHARE_OF_MEMORY))
        run_dir = work / f"mfu-{name}"
        probe = run_ours(job | training(shape, layers, work / name), env, run_dir)
        rate = speed(probe, job["skip"])
        done_flops = rate * flops_per_token(shape, layers)
        lines.append(
            f"| {name} | {layers} of {shape.full_layers} | {rate:,.0f} | {done_flops / 1e12:,.3g} |"
            f" {done_flops / peak:.1%} | {probe.peak_mib / 1024:,.1f} |"
        )
        shutil.rmtree(run_dir)  # the model of a 7B shape is 13 GB
    return "\n".join(lines)


def of_pairs(shape: Shape) -> Shape:
    """The shape of a reward model that sees as many sequences at a time."""
    return shape._replace(micro_batch=shape.micro_batch // 2, scores=True)


def training(shape: Shape, layers: int, material: Path) -> dict[str, Any]:
    """What a shape changes in the job: a model from scratch, full-length rows."""
    arch = {
        "hidden_size": shape.hidden,
        "num_heads": shape.heads,
        "intermediate_size": shape.intermediate,
        "num_layers": layers,
        "max_positions": shape.length,
    }
    return {
        "rows": str(material / ("pairs.jsonl" if shape.scores else "documents.jsonl")),
        "max_length": shape.length,
        "global_batch": 2 * shape.micro_batch,
        "micro_batch": shape.micro_batch,
        "dtype": "bf16",
        "checkpointing": True,
        "packing": False,
        "overrides": [
            "model.init=scratch",
            "model.arch.type=llama",
            f"model.tokenizer.path={material / 'model'}",
            *(f"model.arch.{key}={value}" for key, value in arch.items()),
        ],
    }


def parameters(shape: Shape, layers: int) -> int:
    """Weights of the matrices: attention, gated MLP, both embeddings."""
    return layers * block(shape) + 2 * shape.vocab * shape.hidden


def block(shape: Shape) -> int:
    return 4 * shape.hidden**2 + 3 * shape.hidden * shape.intermediate


def flops_per_token(shape: Shape, layers: int) -> float:
    """Forward and backward, without what checkpointing computes again: 6 per multiplied weight, and per layer
    6 · length · hidden for causal attention, half of the full square (PaLM, arXiv 2204.02311, appendix B, halved)."""
    multiplied = layers * block(shape) + (0 if shape.scores else shape.vocab * shape.hidden)
    return 6.0 * multiplied + 6.0 * layers * shape.length * shape.hidden


def layers_that_fit(shape: Shape, memory: float) -> int:
    """Layers whose weights, gradients and Adam state fill at most `memory` bytes, at least one."""
    left = memory / BYTES_PER_PARAMETER - 2 * shape.vocab * shape.hidden
    return max(1, int(left // block(shape)))
