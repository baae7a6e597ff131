"""Supervised training: its objective's options, the optimizer, length and rhythm."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from rlhf_cli.errors import Problem
from rlhf_cli.schema.fields import opt, section


@dataclass
class OptimConfig:
    """AdamW and its schedule."""

    lr: float = opt(2e-5, "highest learning rate", gt=0)
    betas: list[float] = opt([0.9, 0.999], "Adam's decay rates", ge=0, lt=1)
    eps: float = opt(1e-8, "Adam's epsilon", gt=0)
    weight_decay: float = opt(0.0, "decoupled decay of matrices (not of biases and norms)", ge=0)
    schedule: Literal["constant", "linear", "cosine", "inverse_sqrt"] = opt(
        "cosine", "after the warm-up: constant, linear to min_lr_ratio, cosine to it, or 1/sqrt(step) (Noam)"
    )
    min_lr_ratio: float | None = opt(
        None, "lr at the end / lr; null = 0 for linear, 0.1 for cosine (as Llama 2 has it)", ge=0, le=1
    )
    warmup_ratio: float = opt(0.03, "share of the steps with growing lr", ge=0, le=1)
    min_warmup_steps: int = opt(5, "at least so many steps of warm-up when warmup_ratio > 0", ge=0)
    max_grad_norm: float = opt(1.0, "gradients are scaled down to this norm; 0 = never", ge=0)

    @property
    def last_ratio(self) -> float:
        """min_lr_ratio, or what the schedule stands for."""
        return {"cosine": 0.1}.get(self.schedule, 0.0) if self.min_lr_ratio is None else self.min_lr_ratio

    def check(self) -> Iterator[Problem]:
        if len(self.betas) != 2:
            yield Problem("betas", f"needs two numbers, got {len(self.betas)}")


@dataclass
class EarlyStoppingConfig:
    """Stop when the evaluation loss no longer falls."""

    patience: int = opt(0, "evaluations without a better loss until the run stops; 0 = never stop", ge=0)
    min_delta: float = opt(0.0, "a smaller fall does not count as better", ge=0)


@dataclass
class TrainConfig:
    """Length and rhythm of the training."""

    epochs: float = opt(1.0, "passes over the data", gt=0)
    max_steps: int | None = opt(None, "optimizer steps; overrides epochs (the data repeats)", ge=1)
    global_batch_size: int = opt(64, "rows per optimizer step, over all ranks", ge=1)
    micro_batch_size: int = opt(
        8,
        "rows per forward pass of one rank, on average: fewer of the long ones, more of the short;"
        " rm: a ranking of K answers counts as K / 2 pairs",
        ge=1,
    )
    eval_every: int = opt(0, "steps between evaluations; 0 = at the end only", ge=0)
    save_every: int = opt(0, "steps between checkpoints; 0 = only when the run is interrupted", ge=0)
    log_every: int = opt(1, "steps between lines in metrics.jsonl", ge=1)
    keep_checkpoints: int = opt(2, "newest checkpoints that stay on disk", ge=1)
    seed: int = opt(0, "order of the data, initial weights, dropout", ge=0)
    early_stopping: EarlyStoppingConfig = section(EarlyStoppingConfig, "stop when evaluation no longer improves")

    def check(self) -> Iterator[Problem]:
        if self.early_stopping.patience and not self.eval_every:
            yield Problem("early_stopping.patience", "needs evaluations: set train.eval_every")


@dataclass
class ComparisonConfig:
    """What a reward model learns from comparisons and labels, and how its scores are described."""

    center_coef: float = opt(
        0.0, "pairs and rankings: weight of (r_better + r_worse)^2, which keeps scores around 0; 0.01 is usual", ge=0
    )
    share_prompts: Literal["auto", "never"] = opt(
        "auto", "pairs and rankings: compute a prompt once for all its answers, where the model allows it and it pays"
    )
    class_weights: Literal["none", "balanced"] = opt("none", "labels: balanced = every class weighs the same")
    reference: Literal["chosen", "rejected", "all"] = opt(
        "chosen", "responses of the evaluation rows whose score mean and std are stored for ppo and raft"
    )
    num_worst: int = opt(20, "worst-ranked evaluation rows written to samples/ at each evaluation", ge=0)
