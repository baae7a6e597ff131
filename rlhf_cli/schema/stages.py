"""One dataclass per stage: its sections, and the checks that span several of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from rlhf_cli.errors import Problem
from rlhf_cli.schema.fields import opt, section
from rlhf_cli.schema.sections import (
    DataConfig,
    DeepspeedConfig,
    GenerationConfig,
    LaunchConfig,
    LoggingConfig,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)


@dataclass
class SftConfig:
    """Supervised fine-tuning of a causal language model, or pre-training from scratch."""

    stage: Literal["sft"] = opt("sft", "the stage this config is for")
    run_dir: str | None = opt(None, "where the run writes; null = runs/sft/<recipe>-<UTC time>")
    resume: Literal["auto", "never"] = opt(
        "auto", "auto: leave a finished run alone, continue an unfinished one; never: refuse a directory with a run"
    )
    model: ModelConfig = section(ModelConfig, "the model to start from")
    lora: LoraConfig = section(LoraConfig, "low-rank adapters")
    data: DataConfig = section(DataConfig, "what is read and how it becomes tokens")
    optim: OptimConfig = section(OptimConfig, "AdamW and its schedule")
    train: TrainConfig = section(TrainConfig, "length and rhythm of the training")
    deepspeed: DeepspeedConfig = section(DeepspeedConfig, "how the training is spread over the ranks")
    launch: LaunchConfig = section(LaunchConfig, "how the ranks are started")
    generation: GenerationConfig = section(GenerationConfig, "sample texts at each evaluation")
    logging: LoggingConfig = section(LoggingConfig, "where progress is shown")

    def check(self) -> Iterator[Problem]:
        yield from check_adapters(self.model, self.lora, self.deepspeed)
        if self.data.format in ("prompts", "labelled") and not self.data.row_format:
            yield Problem(
                "data.format",
                f"{self.data.format} has no text to train on; set data.row_format,"
                " or use text_only, text2text, conversation, paired, ranked or hh",
            )
        if self.train.early_stopping.patience and not has_eval(self.data):
            yield Problem(
                "train.early_stopping.patience",
                "needs evaluation data: set data.validation_split_percentage or data.eval_path",
            )


def has_eval(data: DataConfig) -> bool:
    """Whether there is anything to evaluate on."""
    return bool(data.eval_path) or data.validation_split_percentage > 0


def check_adapters(model: ModelConfig, lora: LoraConfig, deepspeed: DeepspeedConfig) -> Iterator[Problem]:
    """What LoRA, quantisation, selective training and ZeRO rule out in each other."""
    if lora.enabled and model.trainable.mode != "all":
        yield Problem("model.trainable.mode", f"{model.trainable.mode} and lora.enabled=true exclude each other")
    if lora.enabled and model.init == "scratch":
        yield Problem("lora.enabled", "an adapter on random weights learns nothing; drop it or model.init=scratch")
    if model.quantization == "nf4" and not lora.enabled:
        yield Problem("model.quantization", "nf4 weights cannot be trained; set lora.enabled=true (QLoRA)")
    if model.quantization == "nf4" and deepspeed.zero_stage == 3:
        yield Problem("deepspeed", "zero3 cannot shard nf4 weights; use deepspeed=zero2")
    offload = (deepspeed.json.get("zero_optimization") or {}).get("offload_optimizer") or {}
    if model.dtype == "fp16" and offload.get("device", "none") != "none":
        yield Problem("model.dtype", "fp16 with an offloaded optimizer is not supported; use bf16")


def grad_accum_steps(global_batch_size: int, micro_batch_size: int, world_size: int) -> int | Problem:
    """global_batch_size / (micro_batch_size x world size), exact, or the problem that states the three numbers."""
    per_forward = micro_batch_size * world_size
    if global_batch_size % per_forward:
        fits = sorted(
            {
                max(per_forward, global_batch_size // per_forward * per_forward),
                (global_batch_size // per_forward + 1) * per_forward,
            }
        )
        return Problem(
            "train.global_batch_size",
            f"{global_batch_size} is not a multiple of train.micro_batch_size x number of ranks ="
            f" {micro_batch_size} x {world_size} = {per_forward}; allowed: {' or '.join(map(str, fits))},"
            " or another train.micro_batch_size",
        )
    return global_batch_size // per_forward


class StageInfo(NamedTuple):
    """name: as typed; config: its dataclass; summary: one line; groups: config groups it is composed of;
    module: the training module, named and not imported so that help stays fast; examples: for the help page."""

    name: str
    config: type
    summary: str
    groups: tuple[str, ...]
    module: str
    examples: tuple[str, ...]


STAGES: dict[str, StageInfo] = {
    "sft": StageInfo(
        "sft",
        SftConfig,
        "supervised fine-tuning: full, LoRA, QLoRA, partly frozen, LISA; also pre-training from scratch",
        ("model", "lora", "data", "optim", "deepspeed", "launch"),
        "rlhf_cli.stages.sft",
        (
            "rlhf sft conf=shakespeare_bpe data.path=tinyshakespeare.txt run_dir=runs/plays",
            "rlhf sft conf=hh_rlhf_llama_7b model.path=/models/llama-7b data.path=data/hh_rlhf/sft optim.lr=1e-5",
            "rlhf sft model.path=runs/plays data.path=mine.jsonl lora=r16 deepspeed=zero3 launch.num_processes=2",
            "rlhf sft -m conf=my/own.yaml optim.lr=1e-5,3e-5",
        ),
    ),
}
