"""What a config asks of the machine and of its installed packages."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

from rlhf_cli.errors import Problem
from rlhf_cli.schema import LoadedModelConfig, LoggingConfig


def check_machine(model: LoadedModelConfig, logging: LoggingConfig, has_gpu: bool) -> Iterator[Problem]:
    """Optional packages, and what a CPU cannot do. has_gpu: also True where nothing is to be computed."""
    if logging.wandb and find_spec("wandb") is None:
        yield Problem("logging.wandb", "needs a package that is not installed: pip install 'rlhf-cli[wandb]'")
    if not has_gpu:
        yield from _check_cpu(model)


def _check_cpu(model: LoadedModelConfig) -> Iterator[Problem]:
    if model.quantization == "nf4":
        yield Problem("model.quantization", "nf4 needs a GPU and none is visible; use lora=r16 without quantisation")
    if model.dtype == "fp16":
        yield Problem("model.dtype", "fp16 needs a GPU and none is visible; use fp32 or bf16")
    if model.attn_implementation.startswith("flash"):
        yield Problem(
            "model.attn_implementation", f"{model.attn_implementation} needs a GPU and none is visible; use sdpa"
        )
