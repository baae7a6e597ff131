"""PPO: the objective and its estimators, what is watched while it runs, rhythm."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Literal

from rlhf_cli.errors import Problem
from rlhf_cli.schema.data import PtxDataConfig
from rlhf_cli.schema.fields import opt, section, unread
from rlhf_cli.schema.job import LoggingConfig

MISSING_EOS = re.compile(r"none|(set|subtract):(-?\d+(\.\d*)?(e-?\d+)?)", re.IGNORECASE)


@dataclass
class PtxConfig:
    """Language-model loss on pretraining text in the same optimizer step (InstructGPT's PPO-ptx, arXiv 2203.02155)."""

    coef: float = opt(0.0, "weight of its loss beside the policy loss; 0 = off (InstructGPT: 27.8)", ge=0)
    batch_size: int = opt(64, "rows per optimizer step, over all ranks", ge=1)
    reduction: Literal["token_mean", "row_mean"] = opt(
        "token_mean", "mean over all trained tokens, or mean over rows of the sum of their token losses"
    )
    data: PtxDataConfig = section(PtxDataConfig, "the text")

    def check(self) -> Iterator[Problem]:
        if self.coef > 0 and not self.data.path:
            yield Problem("data.path", "is required by ppo.ptx.coef > 0: text as for `rlhf sft`")
        if self.coef == 0 and self.data.path:
            yield Problem("coef", "is 0, so ppo.ptx.data would not be read; set it, or drop ppo.ptx.data.path")
        if self.coef == 0:
            yield from unread(self, ("batch_size", "reduction"), "ppo.ptx.coef > 0")
            of_data = tuple(field.name for field in fields(self.data) if field.name != "path")
            yield from unread(self.data, of_data, "ppo.ptx.coef > 0", "data.")


@dataclass
class AlarmConfig:
    """Signs of over-optimisation, each against the first iterations of the run."""

    action: Literal["warn", "stop"] = opt("warn", "warn: say so, go on; stop: end the run with the best policy so far")
    kl_budget: float | None = opt(None, "objective/kl above this, in nats per response", gt=0)
    distinct_2_drop: float = opt(0.5, "distinct-2 fallen by this share of its start; 0 = not watched", ge=0, le=1)
    separator_drop: float = opt(0.5, "the separator ratio fallen by this share; 0 = not watched", ge=0, le=1)
    length_drift: float = opt(0.0, "mean length changed by this share, up or down; 0 = not watched", ge=0)
    window: int = opt(3, "iterations that are averaged, at the start and now", ge=1)


@dataclass
class AlignmentConfig:
    """What ppo and raft have alike: iterations of writing, scoring and learning, and what is watched meanwhile."""

    num_iterations: int = opt(100, "rollouts, each followed by learning from it", ge=1)
    sharing: Literal["separate", "hydra"] = opt(
        "separate",
        "separate: each model has its own weights; hydra: one frozen base, with the policy, reward models and ppo's"
        " critic as adapters (arXiv 2309.00754)",
    )
    ref: str | None = opt(None, "what KL is measured to: run directory, local directory, hub id; null = model.path")
    frozen: Literal["auto", "keep", "shard", "offload"] = opt(
        "auto",
        "reference and reward models: whole on every device, sharded over the ranks, or in the machine's memory,"
        " between uses; auto = shard with ZeRO-3 on several ranks, else keep",
    )
    alarms: AlarmConfig = section(AlarmConfig, "signs of over-optimisation")


@dataclass
class AlgorithmConfig(AlignmentConfig):
    """Proximal policy optimisation (arXiv 1707.06347) with a KL penalty to the reference, and its relatives."""

    rollout_batch_size: int = opt(128, "responses of an iteration, over all ranks", ge=1)
    samples_per_prompt: int | None = opt(None, "responses to each prompt; null = 1, or 4 for rloo and grpo", ge=1)
    ppo_epochs: int = opt(4, "passes over the responses of an iteration", ge=1)
    num_mini_batches: int = opt(1, "optimizer steps in a pass", ge=1)
    kl_coef: float = opt(0.05, "weight of the KL penalty; with the adaptive controller the first one", ge=0)
    kl_controller: Literal["fixed", "adaptive"] = opt("fixed", "adaptive: towards kl_target (arXiv 1909.08593, 2.2)")
    kl_target: float = opt(6.0, "adaptive: wanted KL in nats per response", gt=0)
    kl_horizon: int = opt(10000, "adaptive: responses in which the coefficient can change by e^0.2", ge=1)
    kl_estimator: Literal["k1", "k2", "k3"] = opt(
        "k1", "estimate in the reward; k1 alone has the right optimum, all three are logged"
    )
    advantage: Literal["gae", "rloo", "grpo", "reinforce++"] = opt(
        "gae", "gae: with a critic; rloo, grpo: against other responses to the prompt; reinforce++: against the batch"
    )
    gamma: float = opt(1.0, "discount per token", gt=0, le=1)
    lam: float = opt(0.95, "gae: decay of later errors", ge=0, le=1)
    clip_range: float = opt(0.2, "the probability ratio moves the loss only this far from 1", gt=0)
    value_clip_range: float = opt(0.2, "the value moves its loss only this far from the old value", gt=0)
    value_coef: float = opt(
        0.1,
        "weight of the value loss; the critic has an AdamW of its own, which does not mind the scale, so this acts"
        " through gradient clipping and eps only",
        gt=0,
    )
    whiten_advantages: Literal["auto", "always", "never"] = opt(
        "auto", "mean 0, std 1 over all tokens of the iteration; auto = for gae and reinforce++"
    )
    whiten_rewards: bool = opt(False, "std 1 of the rewards per token (the mean stays); biased by ragged lengths")
    missing_eos: str = opt(
        "none", "a response that reached its longest length: none; set:VALUE the score; subtract:VALUE from it"
    )
    critic: str = opt(
        "auto", "starts from: reward (the first reward model), policy, or a path; auto = reward where it fits"
    )
    critic_lr: float | None = opt(None, "highest learning rate of the critic; null = optim.lr", gt=0)
    target_kl: float | None = opt(None, "end the iteration's updates when policy/approxkl_avg is above", gt=0)
    ema: float | None = opt(
        None,
        "decay of an average of the policy's weights, which then is the result (DeepSpeed-Chat: 0.992)",
        gt=0,
        lt=1,
    )
    ptx: PtxConfig = section(PtxConfig, "language-model loss beside it")

    def check(self) -> Iterator[Problem]:
        if not MISSING_EOS.fullmatch(self.missing_eos):
            yield Problem("missing_eos", f"got {self.missing_eos!r}; allowed: none, set:VALUE, subtract:VALUE")
        if self.rollout_batch_size % self.group_size:
            yield Problem(
                "rollout_batch_size",
                f"{self.rollout_batch_size} is not a multiple of samples_per_prompt = {self.group_size}",
            )
        if self.rollout_batch_size % self.num_mini_batches:
            yield Problem(
                "rollout_batch_size",
                f"{self.rollout_batch_size} is not a multiple of num_mini_batches = {self.num_mini_batches}",
            )
        if self.advantage in ("rloo", "grpo") and self.group_size < 2:
            yield Problem("samples_per_prompt", f"{self.advantage} compares responses to one prompt: at least 2")
        if self.advantage in ("rloo", "grpo") and self.gamma != 1:
            yield Problem("gamma", f"{self.advantage} rewards whole responses: only 1 is possible")
        if not self.has_critic:
            yield from unread(self, ("lam", "critic_lr", "value_coef", "value_clip_range"), "ppo.advantage=gae")
        if self.kl_controller == "fixed":
            yield from unread(self, ("kl_target", "kl_horizon"), "ppo.kl_controller=adaptive")
        if self.kl_controller == "adaptive" and self.rollout_batch_size >= 5 * self.kl_horizon:
            yield Problem(
                "kl_horizon",
                f"{self.kl_horizon}: one step of {self.rollout_batch_size} responses (ppo.rollout_batch_size) could"
                " make the coefficient zero or negative; allowed: more than a fifth of that number",
            )

    @property
    def group_size(self) -> int:
        """Responses to each prompt."""
        return self.samples_per_prompt or (4 if self.advantage in ("rloo", "grpo") else 1)

    @property
    def has_critic(self) -> bool:
        """Whether values are learnt."""
        return self.advantage == "gae"

    @property
    def whitens(self) -> bool:
        """Whether advantages are whitened."""
        by_default = self.advantage in ("gae", "reinforce++")
        return by_default if self.whiten_advantages == "auto" else self.whiten_advantages == "always"

    @property
    def total_steps(self) -> int:
        """Optimizer steps, unless target_kl ends some iterations early."""
        return self.num_iterations * self.ppo_epochs * self.num_mini_batches

    def scored_ending(self, score: float) -> float:
        """The score of a response that reached its longest length without an end."""
        kind, _, value = self.missing_eos.lower().partition(":")
        return {"none": lambda: score, "set": lambda: float(value), "subtract": lambda: score - float(value)}[kind]()


@dataclass
class RlTrainConfig:
    """Rhythm of a stage whose steps are rollouts."""

    micro_batch_size: int = opt(8, "responses per forward pass of one rank, on average", ge=1)
    eval_every: int = opt(0, "iterations between evaluations; 0 = at the start and at the end", ge=0)
    save_every: int = opt(0, "iterations between checkpoints; 0 = only when the run is interrupted", ge=0)
    keep_checkpoints: int = opt(2, "newest checkpoints that stay on disk", ge=1)
    seed: int = opt(0, "order of the prompts, sampling, new weights", ge=0)


@dataclass
class EvalConfig:
    """What is measured beside the reward of the rollouts."""

    num_prompts: int = opt(64, "held-out prompts that are answered at each evaluation", ge=1)
    temperature: float | None = opt(None, "of these answers; null = generation.temperature", ge=0)
    tax_path: str | list[str] | None = opt(
        None, "held-out text as for `rlhf sft`, whose loss before and after is the alignment tax"
    )
    tax_rows: int = opt(256, "rows of it that are used", ge=1)


@dataclass
class RlLoggingConfig(LoggingConfig):
    """Where progress and samples are shown; metrics.jsonl is always written."""

    log_samples_every: int = opt(10, "iterations between tables of sample responses; 0 = never", ge=0)
    num_log_samples: int = opt(4, "rows of such a table in the terminal (samples/ has all responses)", ge=1)
