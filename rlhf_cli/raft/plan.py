"""What a RAFT run would do and need, from configs alone: responses, steps, and bytes by phase (align.plan)."""

from __future__ import annotations

from rlhf_cli.align.origins import find_origins
from rlhf_cli.align.plan import Plan, longest_prompt, make_plan, show_plan
from rlhf_cli.align.plan_models import Table, plan_policy, plan_reads, plan_size
from rlhf_cli.assemble import Text
from rlhf_cli.data.prompts import PreparedPrompts
from rlhf_cli.estimate import num_ranks
from rlhf_cli.ops.best_of import best_of_n_kl
from rlhf_cli.ops.schedule import warmup_steps
from rlhf_cli.raft.tune import planned_steps
from rlhf_cli.schema import RaftConfig
from rlhf_cli.schema.stages import grad_accum_steps


def print_plan(config: RaftConfig, text: Text, prompts: PreparedPrompts, world_size: int, for_gpu: bool) -> None:
    """The dry run's table. for_gpu: model.dtype=auto then means bf16."""
    plan = plan_run(config, text, longest_prompt(prompts), world_size, for_gpu)
    show_plan(config, plan, describe_rhythm(config, len(prompts.train), world_size), prompts)


def plan_run(config: RaftConfig, text: Text, longest: int, world_size: int, for_gpu: bool) -> Plan:
    """Bytes by phase. longest: tokens of the longest prompt. Reads configs of the models; no weights. Raises ModelError
    as opening them would."""
    size = plan_size(config, longest, config.raft.num_samples, world_size, for_gpu)
    origins = find_origins(config, text)
    policy = plan_policy(config, text, origins.policy, size, size.length)
    return make_plan(config, [policy], plan_reads(config, origins, policy.config, size), size)


def describe_rhythm(config: RaftConfig, num_prompts: int, world_size: int) -> Table:
    """What is written, how it is ranked, and what is learnt from it. num_prompts: to learn from, in all."""
    settings, train, longest = config.raft, config.train, config.generation.max_new_tokens
    in_all = settings.num_iterations * settings.num_samples
    walks = settings.num_iterations * settings.num_prompts / num_prompts
    rows = [
        (
            "responses",
            f"{settings.num_iterations} x {settings.num_samples:,} ({settings.num_prompts:,} prompts x"
            f" {settings.samples_per_prompt}), at most {longest} tokens each; {in_all:,} responses,"
            f" {in_all * longest:,} tokens in all; {walks:,.1f} times through the prompts",
        ),
        ("ranked by", _measure(config)),
        ("selected", _selection(config)),
    ]
    each = planned_steps(config)
    total = settings.num_iterations * each
    if settings.optimizer == "fresh":
        warm_up = f"{warmup_steps(config.optim, each)} of each iteration warm-up"
    else:
        warm_up = f"{warmup_steps(config.optim, total)} of them warm-up"
    accumulation = grad_accum_steps(train.global_batch_size, train.micro_batch_size, world_size)
    return [
        *rows,
        ("steps", f"{each} an iteration, {total:,} in all, {warm_up}; fewer where responses are discarded"),
        (
            "batch",
            f"{train.global_batch_size} responses a step = {train.micro_batch_size} x {num_ranks(world_size)} x"
            f" {accumulation} accumulation",
        ),
    ]


def _measure(config: RaftConfig) -> str:
    measured = "reward" if config.reward.sources else "the policy's own mean log-probability of a token"
    return measured + (f" - {config.raft.kl_coef:g} x log(policy / reference)" if config.raft.kl_coef else "")


def _selection(config: RaftConfig) -> str:
    settings = config.raft
    among = "those to the same prompt" if settings.strategy == "local" else "all of an iteration"
    if settings.soft_temperature is not None:
        return f"all, each weighted by softmax(reward / {settings.soft_temperature:g}) among {among}"
    share = f"{settings.batch_size:,} an iteration, the best 1 in {settings.num_candidates} of {among}"
    if settings.strategy == "local":  # how far from the policy what it learns from can be
        share += f" (KL to it: {best_of_n_kl(settings.num_candidates):.2f} nats at most)"
    return share + (f", {settings.epochs} times each" if settings.epochs > 1 else "")
