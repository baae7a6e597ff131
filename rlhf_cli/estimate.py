"""What a run would do, from config, data and architecture alone: batch arithmetic, steps, bytes per rank."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from rlhf_cli.data import plan
from rlhf_cli.data.comparisons import PreparedComparisons
from rlhf_cli.data.dataset import Prepared
from rlhf_cli.models.load import resolve_dtype
from rlhf_cli.models.memory import MemoryEstimate, estimate_memory
from rlhf_cli.ops.schedule import warmup_steps
from rlhf_cli.schema import SftConfig, TrainedConfig
from rlhf_cli.schema.stages import grad_accum_steps


class Plan(NamedTuple):
    """A run before it starts. checkpoint_bytes: of one resumable checkpoint; total_steps: optimizer steps."""

    total_steps: int
    memory: MemoryEstimate
    checkpoint_bytes: int
    rows: list[tuple[str, str]]


def plan_run(
    config: TrainedConfig,
    data: Prepared | PreparedComparisons,
    architecture: Any,
    world_size: int,
    for_gpu: bool,
) -> Plan:
    """Estimate a job of `world_size` ranks; for_gpu: model.dtype=auto then means bf16."""
    settings = config.train
    rows = plan.epoch_rows(len(data.train), data.train.repeats)
    steps = plan.num_steps(rows, settings.global_batch_size, settings.epochs, settings.max_steps)
    name = "bf16" if for_gpu and config.model.dtype == "auto" else config.model.dtype
    dtype = resolve_dtype(name, torch.device("cpu"))
    packing = isinstance(config, SftConfig) and config.data.packing
    length = config.data.max_length if packing else int(data.train.lengths.max())
    sequences = 1 if isinstance(data, Prepared) else data.sequences_per_row
    memory = estimate_memory(
        architecture, config.model, config.lora, config.deepspeed, dtype, world_size,
        sequences * settings.micro_batch_size, length, on_cpu=not for_gpu,
    )  # fmt: skip
    checkpoint = 12 * memory.trainable_params
    if config.model.trainable.mode == "lisa":
        checkpoint += dtype.itemsize * memory.total_params
    accumulation = grad_accum_steps(settings.global_batch_size, settings.micro_batch_size, world_size)
    per_epoch = plan.steps_per_epoch(rows, settings.global_batch_size)
    what = "sequences" if isinstance(data, Prepared) else data.kind
    batch = f"{settings.global_batch_size} rows a step = {settings.micro_batch_size} {what} x {num_ranks(world_size)}"
    saved = (
        f"{settings.keep_checkpoints} kept" if settings.save_every else "written when interrupted (train.save_every=0)"
    )
    params = f"{memory.total_params:,} parameters, {memory.trainable_params:,} trained, {dtype}"
    table = [
        ("data", _describe_data(data, rows)),
        ("batch", f"{batch} x {accumulation} accumulation" + (", packed into fewer" if packing else "")),
        ("steps", f"{steps} ({per_epoch} an epoch), {warmup_steps(config.optim, steps)} of them warm-up"),
        ("model", params.replace("torch.", "")),
        ("longest row", f"{length} tokens"),
        ("memory per rank", f"{gib(memory.device)} ({_parts(memory)})"),
        ("host memory", f"{gib(memory.host)} per rank, offloaded" if memory.host else "nothing offloaded"),
        ("one checkpoint", f"{gib(checkpoint)}, {saved}"),
    ]
    return Plan(steps, memory, checkpoint, table)


def _describe_data(data: Prepared | PreparedComparisons, rows: int) -> str:
    kept = f"{len(data.train)} {'sequences' if isinstance(data, Prepared) else data.kind} to train on"
    if rows != len(data.train):
        kept += f" ({rows} an epoch with weights)"
    evaluation = f", {len(data.eval)} to evaluate on" if data.eval is not None else ", none to evaluate on"
    return f"{kept}{evaluation}, mean {data.train.lengths.mean():.0f} tokens"


def _parts(memory: MemoryEstimate) -> str:
    names = ("weights", "gathered", "gradients", "optimizer", "buckets", "activations", "head")
    return ", ".join(f"{name} {gib(getattr(memory, name))}" for name in names if getattr(memory, name))


def num_ranks(count: int) -> str:
    """1 rank, 2 ranks ..."""
    return "1 rank" if count == 1 else f"{count} ranks"


def gib(count: int) -> str:
    """Bytes for people."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**27 else f"{count / 2**20:.1f} MiB"
