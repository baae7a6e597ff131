"""The job: how it is spread over ranks, started and shown."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from rlhf_cli.errors import Problem
from rlhf_cli.schema.fields import opt


@dataclass
class DeepspeedConfig:
    """How the training is spread over the ranks; chosen by one word, e.g. deepspeed=zero3."""

    name: str = opt("zero2", "the chosen group: zero0 zero1 zero2 zero3 zero2_offload zero3_offload")
    json: dict[str, Any] = opt(
        {},
        "DeepSpeed's own settings, passed through; batch sizes, accumulation, precision, optimizer,"
        " scheduler and clipping are derived",
    )

    OWNED = (
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "optimizer",
        "scheduler",
        "bf16",
        "fp16",
        "gradient_clipping",
        "managed_gradient_accumulation",
        "data_types",
        "prescale_gradients",
        "gradient_predivide_factor",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
        "amp",
        "torch_autocast",
        "communication_data_type",
        "fp32_allreduce",
    )
    # Parts of ZeRO that keep optimizer state where our checkpoints do not look, or in another form.
    UNSUPPORTED = ("zenflow", "elastic_checkpoint", "zeropp_loco_param")

    @property
    def zero_stage(self) -> int:
        """The ZeRO stage that was asked for, 0 to 3."""
        return int((self.json.get("zero_optimization") or {}).get("stage", 0))

    def check(self) -> Iterator[Problem]:
        for key in self.OWNED:
            if key in self.json:
                yield Problem(f"json.{key}", "is derived from model, optim and train; remove it")
        stage = (self.json.get("zero_optimization") or {}).get("stage", 0)
        if stage not in (0, 1, 2, 3):
            yield Problem("json.zero_optimization.stage", f"is {stage!r}; allowed: 0, 1, 2, 3")
        yield from self._check_zero(self.json.get("zero_optimization") or {}, stage)

    def _check_zero(self, zero: dict[str, Any], stage: int) -> Iterator[Problem]:
        for key in ("offload_optimizer", "offload_param"):
            offload = zero.get(key) or {}
            if offload.get("device", "none") not in ("none", "cpu"):
                yield Problem(
                    f"json.zero_optimization.{key}.device", f"is {offload['device']!r}; allowed: none, cpu (no nvme)"
                )
            if offload.get("super_offload") or offload.get("ratio", 1.0) != 1.0:
                yield Problem(f"json.zero_optimization.{key}", "super_offload and ratio are not supported; remove them")
        for key in self.UNSUPPORTED:
            if zero.get(key):
                yield Problem(f"json.zero_optimization.{key}", "is not supported; remove it")
        if zero.get("overlap_comm") and stage in (0, 1):
            yield Problem("json.zero_optimization.overlap_comm", f"needs stage 2 or 3, but stage is {stage}")


@dataclass
class LaunchConfig:
    """How the ranks are started."""

    num_processes: int | Literal["auto"] = opt(
        "auto", "ranks on this machine; auto = every visible GPU, or 1 on CPU", ge=1
    )
    launcher: Literal["auto", "elastic", "deepspeed", "slurm"] = opt(
        "auto", "elastic: this machine; deepspeed: the nodes of hostfile; slurm: srun inside an allocation"
    )
    hostfile: str | None = opt(None, "DeepSpeed hostfile for several machines")
    master_port: int | Literal["auto"] = opt("auto", "port of rank 0; auto = a free one", ge=1, le=65535)
    timeout: float = opt(1800.0, "seconds after which a collective that does not answer fails", gt=0)

    def check(self) -> Iterator[Problem]:
        if self.launcher == "deepspeed" and not self.hostfile:
            yield Problem("hostfile", "is required with launch.launcher=deepspeed")
        if self.hostfile and self.launcher in ("elastic", "slurm"):
            yield Problem("hostfile", f"is not used by launch.launcher={self.launcher}; drop it or use deepspeed")


@dataclass
class ProgressConfig:
    """Where progress is shown."""

    progress: Literal["auto", "bar", "lines", "none"] = opt("auto", "auto = a bar in a terminal, lines elsewhere")


@dataclass
class LoggingConfig(ProgressConfig):
    """Where progress is shown; metrics.jsonl is always written."""

    tensorboard: bool = opt(True, "write tensorboard/ in the run directory")
    wandb: bool = opt(False, "log to Weights & Biases (pip install wandb)")
    wandb_project: str = opt("rlhf", "project in Weights & Biases")
