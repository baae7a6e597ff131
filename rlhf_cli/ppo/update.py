"""The update of an iteration: ppo_epochs passes over its responses, num_mini_batches optimizer steps in each.

Shapes: R responses, T tokens of the longest; B responses of a mini-batch, N tokens of a micro-batch; see ppo.batch.

Which responses make which step is a function of (seed, iteration, epoch). Ranks and micro-batches only divide a step:
every loss is a sum over tokens, divided by the kept tokens of the whole mini-batch on all ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlhf_cli.align.batch import ResponseBatch, collate_responses, share_of_rank
from rlhf_cli.align.forward import token_values
from rlhf_cli.errors import RunFailed
from rlhf_cli.ops.losses import ppo_policy_loss, ppo_value_loss
from rlhf_cli.ops.schedule import learning_rate
from rlhf_cli.ppo.experience import Experience
from rlhf_cli.ppo.ptx import PtxTerm
from rlhf_cli.runtime.distributed import Ranks, sum_over_ranks
from rlhf_cli.runtime.engine import Engine
from rlhf_cli.schema import PpoConfig

# What a step gathers from its micro-batches and ranks: means over the kept tokens of its mini-batch.
POLICY_MEANS = ("loss/policy_avg", "policy/clipfrac_avg", "policy/approxkl_avg", "val/ratio", "ratio_square")
ENTROPY = "policy/entropy_avg"
VALUE_MEANS = ("loss/value_avg", "val/clipfrac_avg")
PTX = "loss/ptx"


class UpdateStats(NamedTuple):
    """figures: means over the kept tokens of all steps, of gradient norms over steps, the same on every rank. steps:
    optimizer steps of the policy. stopped: whether target_kl ended the iteration early."""

    figures: dict[str, float]
    steps: int
    stopped: bool


@dataclass(frozen=True)
class Lesson:
    """What every step of an iteration looks into. advantages, returns (R, T) on the CPU; returns None: no critic."""

    experience: Experience
    advantages: Tensor
    returns: Tensor | None
    config: PpoConfig
    ranks: Ranks
    pad_id: int

    def micro_batches(self, rows: np.ndarray) -> list[ResponseBatch]:
        """This rank's part of the mini-batch of rows (B,)."""
        prompts, responses, ranks = self.experience.prompts, self.experience.responses, self.ranks
        size, keep = self.config.train.micro_batch_size, self.experience.keep_mask
        shares = share_of_rank(prompts, responses, rows, size, ranks.rank, ranks.world_size)
        return [collate_responses(prompts, responses, s, self.pad_id, keep).to(ranks.device) for s in shares]


class _Step(NamedTuple):
    """means by name, of one mini-batch over all ranks; num_tokens: kept ones in it; norms: of the gradients that were
    stepped on, by name; skipped: whether fp16's loss scaler left a model alone."""

    means: dict[str, float]
    num_tokens: int
    norms: dict[str, float]
    skipped: bool


def update(
    policy: Engine,
    critic: Engine | None,
    experience: Experience,
    advantages: Tensor,
    returns: Tensor | None,
    config: PpoConfig,
    iteration: int,
    ranks: Ranks,
    pad_id: int,
    ptx: PtxTerm | None = None,
    after_step: Callable[[], None] | None = None,
) -> UpdateStats:
    """Train policy and critic on the responses of iteration `iteration` (0 is the first). All ranks call it.

    advantages, returns (R, T) of ops.advantages.estimate. Exactly ppo_epochs x num_mini_batches steps, unless a step's
    policy/approxkl_avg is above target_kl, which then is the last one. after_step: called after each.
    Raises RunFailed when a loss or a gradient is no longer a number.
    """
    assert (critic is None) == (returns is None) == (experience.values is None)
    lesson = Lesson(experience, advantages, returns, config, ranks, pad_id)
    settings, first = config.ppo, iteration * config.ppo.ppo_epochs * config.ppo.num_mini_batches
    steps: list[_Step] = []
    stopped = False
    for rows in mini_batches(config, iteration, len(experience)):
        steps.append(_one_step(policy, critic, lesson, rows, first + len(steps), ptx))
        if after_step is not None:
            after_step()
        if settings.target_kl is not None and steps[-1].means["policy/approxkl_avg"] > settings.target_kl:
            stopped = len(steps) < settings.ppo_epochs * settings.num_mini_batches
            break
    rates = learning_rates(config, first + len(steps) - 1)
    return UpdateStats(_figures(steps) | rates, len(steps), stopped)


def mini_batches(config: PpoConfig, iteration: int, num_rows: int) -> Iterator[np.ndarray]:
    """The rows (B,) of every optimizer step of an iteration: each epoch shuffles all responses and cuts them evenly."""
    settings = config.ppo
    for epoch in range(settings.ppo_epochs):
        order = np.random.default_rng([config.train.seed, iteration, epoch]).permutation(num_rows)
        yield from np.split(order, settings.num_mini_batches)


def learning_rates(config: PpoConfig, step: int) -> dict[str, float]:
    """lr, and with a critic critic_lr, of optimizer step `step` of the run (0 is the first)."""
    settings, optim = config.ppo, config.optim
    rates = {"lr": learning_rate(optim, step, settings.total_steps)}
    if settings.has_critic:
        rates["critic_lr"] = learning_rate(
            replace(optim, lr=settings.critic_lr or optim.lr), step, settings.total_steps
        )
    return rates


def _one_step(
    policy: Engine,
    critic: Engine | None,
    lesson: Lesson,
    rows: np.ndarray,
    number: int,
    ptx: PtxTerm | None,
) -> _Step:
    """One optimizer step of policy and critic on the mini-batch of rows (B,); number: of the step within the run."""
    config = lesson.config
    rates = learning_rates(config, number)
    num_tokens = max(1, int(lesson.experience.keep_mask[torch.from_numpy(rows)].sum()))
    batches = lesson.micro_batches(rows)
    names, sums = [*POLICY_MEANS, ENTROPY], [_backward_policy(policy, lesson, batches, num_tokens)]
    if ptx is not None:
        names.append(PTX)
        sums.append(ptx.backward(policy, number, config.train.micro_batch_size, lesson.pad_id)[None])
    norms = {"grad_norm": policy.step(rates["lr"])}
    skipped = policy.skipped
    if critic is not None:
        names += VALUE_MEANS
        sums.append(_backward_critic(critic, lesson, batches, num_tokens))
        norms["critic_grad_norm"] = critic.step(rates["critic_lr"])
        skipped = skipped or critic.skipped
    means = dict(zip(names, sum_over_ranks(torch.cat(sums)).tolist(), strict=True))
    _check_finite(number, means, norms, policy.scales_loss)
    return _Step(means, num_tokens, {n: norm for n, norm in norms.items() if math.isfinite(norm)}, skipped)


def _backward_policy(policy: Engine, lesson: Lesson, batches: list[ResponseBatch], num_tokens: int) -> Tensor:
    """Add the policy loss's gradient. Returns this rank's share of POLICY_MEANS and ENTROPY, (6,) fp64."""
    settings = lesson.config
    means = torch.zeros(len(POLICY_MEANS) + 1, dtype=torch.float64, device=lesson.ranks.device)
    for batch in batches:
        out = policy.forward(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            targets=batch.targets,
            temperature=settings.generation.temperature,
            logprobs=True,
        )
        loss, stats = ppo_policy_loss(
            out.logprobs, batch.at(lesson.experience.logprobs), batch.at(lesson.advantages), _all_kept(out.logprobs),
            settings.ppo.clip_range, num_tokens,
        )  # fmt: skip
        policy.backward(loss)
        means += torch.stack([loss.detach(), *stats, out.entropy.sum() / num_tokens]).double()
    return means


def _backward_critic(critic: Engine, lesson: Lesson, batches: list[ResponseBatch], num_tokens: int) -> Tensor:
    """Add the gradient of value_coef x the value loss. Returns this rank's share of VALUE_MEANS, (2,) fp64."""
    settings, old, returns = lesson.config.ppo, lesson.experience.values, lesson.returns
    assert old is not None
    assert returns is not None
    means = torch.zeros(len(VALUE_MEANS), dtype=torch.float64, device=lesson.ranks.device)
    for batch in batches:
        values = token_values(critic.forward, batch)
        loss, stats = ppo_value_loss(
            values, batch.at(old), batch.at(returns), _all_kept(values), settings.value_clip_range, num_tokens
        )
        critic.backward(loss * settings.value_coef)
        means += torch.stack([loss.detach(), stats.clipfrac]).double()
    return means


def _all_kept(tokens: Tensor) -> Tensor:
    """keep_mask (N,): a batch's targets are kept tokens only."""
    return torch.ones_like(tokens, dtype=torch.bool)


def _check_finite(number: int, means: dict[str, float], norms: dict[str, float], scales_loss: bool) -> None:
    """number: of the step within the run. scales_loss: fp16's scaler is at work, and infinite gradients its way."""
    bad = {name: value for name, value in means.items() if name.startswith("loss/") and not math.isfinite(value)}
    if not scales_loss:
        bad |= {name: norm for name, norm in norms.items() if not math.isfinite(norm)}
    if bad:
        raise RunFailed(
            f"optimizer step {number + 1}: {', '.join(f'{name} {value}' for name, value in bad.items())}: no longer a"
            " number. Checkpoints written before it are kept. Lower optim.lr (or ppo.critic_lr), use model.dtype=bf16"
            " or fp32, or look at the scores of this iteration."
        )


def _figures(steps: list[_Step]) -> dict[str, float]:
    """Means over all tokens of all steps."""
    weights = np.array([step.num_tokens for step in steps], np.float64)
    figures = {
        name: float(np.dot([step.means[name] for step in steps], weights) / weights.sum()) for name in steps[0].means
    }
    if PTX in figures:
        figures[PTX] = float(np.mean([step.means[PTX] for step in steps]))  # of other tokens
    # The variance over tokens of all steps; means of the steps' own variances would leave out how steps differ.
    figures["val/ratio_var"] = figures.pop("ratio_square") - (figures["val/ratio"] - 1) ** 2
    for name in sorted({name for step in steps for name in step.norms}):
        figures[name] = float(np.mean([step.norms[name] for step in steps if name in step.norms]))
    if any(step.skipped for step in steps):
        figures["skipped"] = float(sum(step.skipped for step in steps))
    return figures
