"""Tasks so small that every answer can be listed: so the optimum of reward − β KL is known, and how near a policy is.

Four tokens, one of which ends an answer, and at most four of them in an answer: 121 answers to a prompt. Their rewards
are random numbers. The policy is a small GPT-2; it is trained by the production code, from the forward pass that
measures log-probabilities to the engine's steps. Only answers are drawn from the list instead of token by token.

Shapes: Y answers to all prompts together, T tokens of the longest, R drawn ones.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

from rlhf_cli.align.forward import response_logprobs, response_values
from rlhf_cli.models.head import enable_loss
from rlhf_cli.models.reward import enable_scores
from rlhf_cli.ops.advantages import estimate, token_rewards
from rlhf_cli.ppo.experience import Experience
from rlhf_cli.ppo.update import update
from rlhf_cli.runtime.distributed import Ranks
from rlhf_cli.runtime.engine import Engine, make_engine, param_groups
from rlhf_cli.schema import AlgorithmConfig, DeepspeedConfig, OptimConfig, PpoConfig, RlTrainConfig, RolloutConfig
from tests.ppo_cases import whole_mask

END, PAD = 3, 0
TOKENS = range(4)
GROUP = 8  # answers that rloo and grpo compare


class Task(NamedTuple):
    """seed: of rewards and of the policy that training starts from; length: of the longest answers; beta: weight of
    KL; prompts: tokens of each. width: of the model, which has to tell all beginnings of an answer apart; iterations,
    batch: as many as the slowest of the estimators needs."""

    seed: int
    length: int
    iterations: int
    beta: float = 0.5
    temperature: float = 1.0
    prompts: tuple[tuple[int, ...], ...] = ((0,),)
    width: int = 48
    batch: int = 256


TASKS = {
    "long": Task(seed=0, length=4, iterations=70, width=64, batch=512),
    "short": Task(seed=1, length=2, iterations=20),
    "weak penalty": Task(seed=2, length=3, iterations=28, beta=0.4),
    "cold": Task(seed=3, length=3, iterations=30, temperature=0.7),
    "two prompts": Task(seed=4, length=2, iterations=28, prompts=((1, 2), (2, 0, 1))),
}


class Answers(NamedTuple):
    """All answers to all prompts. prompts, tokens: Y of each; groups (Y,): number of the prompt; rewards (Y,) fp64."""

    prompts: list[np.ndarray]
    tokens: list[np.ndarray]
    groups: Tensor
    rewards: Tensor


class Closeness(NamedTuple):
    """start, reached, best: reward − β KL, a mean over prompts; kl: KL(π‖π*), likewise."""

    start: float
    reached: float
    best: float
    kl: float

    @property
    def recovered(self) -> float:
        """Share of what there is to gain."""
        return (self.reached - self.start) / (self.best - self.start)


def all_answers(task: Task) -> Answers:
    """Every sequence that ends with END, or is as long as can be."""
    one = [
        np.array(tokens)
        for length in range(1, task.length + 1)
        for tokens in itertools.product(TOKENS, repeat=length)
        if END not in tokens[:-1] and (tokens[-1] == END or length == task.length)
    ]
    prompts = [np.array(prompt) for prompt in task.prompts for _ in one]
    groups = torch.arange(len(task.prompts)).repeat_interleave(len(one))
    draw = np.random.default_rng(task.seed)
    return Answers(prompts, one * len(task.prompts), groups, torch.from_numpy(draw.normal(0, 1, len(prompts))))


def small_model(kind: type, task: Task, seed: int, **more: int) -> torch.nn.Module:
    """GPT-2, because it knows positions: to a Llama the prefixes 0 and 0 0 look the same, with one token to see."""
    torch.manual_seed(seed)
    return kind(
        GPT2Config(
            vocab_size=len(TOKENS),
            n_embd=task.width,
            n_layer=2,
            n_head=2,
            n_positions=8,
            initializer_range=0.1,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            use_cache=False,
            bos_token_id=None,
            eos_token_id=END,
            **more,
        )
    )


def solve(ranks: Ranks, name: str, advantage: str) -> Closeness:
    """How near the production update comes to the optimum of a task."""
    torch.set_num_threads(1)
    task = TASKS[name]
    config = PpoConfig(
        generation=RolloutConfig(temperature=task.temperature),
        ppo=AlgorithmConfig(
            num_iterations=task.iterations, rollout_batch_size=task.batch, samples_per_prompt=GROUP, ppo_epochs=2,
            num_mini_batches=2, kl_coef=task.beta, advantage=advantage, critic_lr=1e-2,  # type: ignore[arg-type]
        ),
        optim=OptimConfig(lr=1e-3, eps=1e-5, schedule="linear", min_lr_ratio=0.0, warmup_ratio=0.0),
        train=RlTrainConfig(micro_batch_size=task.batch, seed=task.seed),
    )  # fmt: skip
    policy, critic = open_engines(ranks, config, task)
    answers = all_answers(task)
    reference = measured(policy, answers, config, ranks)
    for iteration in range(task.iterations):
        experience = drawn(policy, critic, answers, reference, config, iteration, ranks)
        rewards = token_rewards(
            experience.scores, experience.logprobs, experience.ref_logprobs, experience.keep_mask, task.beta
        )
        advantages, returns = estimate(rewards, experience.values, experience.keep_mask, experience.groups, config.ppo)
        update(policy, critic, experience, advantages, returns, config, iteration, ranks, PAD)
    result = closeness(measured(policy, answers, config, ranks), reference, answers, task)
    for engine in (policy, critic):
        if engine is not None:
            engine.destroy()
    return result


def open_engines(ranks: Ranks, config: PpoConfig, task: Task) -> tuple[Engine, Engine | None]:
    zero = DeepspeedConfig(name="zero1", json={"zero_optimization": {"stage": 1}})
    model = small_model(GPT2LMHeadModel, task, task.seed)
    enable_loss(model)
    policy = make_engine(model, param_groups(model, 0.0), config.optim, zero, torch.float32, ranks)
    if not config.ppo.has_critic:
        return policy, None
    critic = small_model(GPT2ForSequenceClassification, task, task.seed + 1, num_labels=1)
    enable_scores(critic)
    return policy, make_engine(critic, param_groups(critic, 0.0), config.optim, zero, torch.float32, ranks)


def measured(policy: Engine, answers: Answers, config: PpoConfig, ranks: Ranks) -> Tensor:
    """Log-probability of every token of every answer, (Y, T)."""
    return response_logprobs(
        policy.forward, answers.prompts, answers.tokens, PAD, len(answers.tokens), ranks,
        temperature=config.generation.temperature,
    )  # fmt: skip


def drawn(
    policy: Engine, critic: Engine | None, answers: Answers, reference: Tensor, config: PpoConfig, iteration: int,
    ranks: Ranks,
) -> Experience:  # fmt: skip
    """R answers of the policy, as many to each prompt."""
    logprobs = measured(policy, answers, config, ranks)
    chances = logprobs.double().sum(1).exp().numpy()
    draw, groups = np.random.default_rng([config.train.seed, iteration]), answers.groups.numpy()
    rows = []
    for group in np.unique(groups):
        members = np.flatnonzero(groups == group)
        of_group = chances[members]
        assert abs(of_group.sum() - 1) < 1e-4  # these are all answers there are, each counted once
        share = config.ppo.rollout_batch_size // len(np.unique(groups))
        rows.append(draw.choice(members, share, p=of_group / of_group.sum()))
    picked = np.concatenate(rows)
    values = None
    if critic is not None:
        values = response_values(critic.forward, answers.prompts, answers.tokens, PAD, len(answers.tokens), ranks)
        values = values[picked]
    return Experience(
        [answers.prompts[i] for i in picked], [answers.tokens[i] for i in picked], whole_mask(answers.tokens)[picked],
        logprobs[picked], reference[picked], values, answers.rewards[picked].float(),
        torch.arange(len(picked)) // GROUP,
    )  # fmt: skip


def closeness(logprobs: Tensor, reference: Tensor, answers: Answers, task: Task) -> Closeness:
    """π* ∝ π_ref e^(r/β), whose value is J* = β log Σ π_ref e^(r/β); a mean over prompts."""
    log_policy, log_ref = logprobs.double().sum(1), reference.double().sum(1)  # (Y,)
    per_prompt = [answers.groups == group for group in range(len(task.prompts))]
    of_prompts = [_closeness(log_policy[rows], log_ref[rows], answers.rewards[rows], task.beta) for rows in per_prompt]
    return Closeness(*torch.stack(of_prompts).mean(0).tolist())


def _closeness(log_policy: Tensor, log_ref: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """Closeness as (4,) for one prompt, whose answers these are, (Y,) each."""

    def value(log_p: Tensor) -> Tensor:
        return (log_p.exp() * (rewards - beta * (log_p - log_ref))).sum()

    best = beta * torch.logsumexp(log_ref + rewards / beta, 0)
    optimum = log_ref + (rewards - best) / beta
    assert abs(float(value(optimum) - best)) < 1e-6  # J* is the value of π*, so both formulas are right or none is
    return torch.stack([value(log_ref), value(log_policy), best, (log_policy.exp() * (log_policy - optimum)).sum()])
