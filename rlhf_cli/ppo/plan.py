"""What a PPO run would do and need, from configs alone: rollouts, steps, and bytes by phase (align.plan)."""

from __future__ import annotations

from pathlib import Path

from transformers import PretrainedConfig

from rlhf_cli.align.origins import find_origins
from rlhf_cli.align.plan import Plan, longest_prompt, make_plan, show_plan
from rlhf_cli.align.plan_models import (
    Size,
    Table,
    Trained,
    plan_policy,
    plan_reads,
    plan_size,
    plan_training,
    positions,
)
from rlhf_cli.assemble import Text
from rlhf_cli.data.prompts import PreparedPrompts
from rlhf_cli.estimate import num_ranks
from rlhf_cli.models.reward import reward_config
from rlhf_cli.models.tokenizer import TOKENIZER_FILES
from rlhf_cli.ops.schedule import warmup_steps
from rlhf_cli.ppo.critic_origin import CriticOrigin, critic_config, find_critic
from rlhf_cli.ppo.models import check_ptx
from rlhf_cli.reward.locate import locate
from rlhf_cli.schema import PpoConfig
from rlhf_cli.schema.stages import responses_accumulation


def print_plan(config: PpoConfig, text: Text, prompts: PreparedPrompts, world_size: int, for_gpu: bool) -> None:
    """The dry run's table. for_gpu: model.dtype=auto then means bf16."""
    plan = plan_run(config, text, longest_prompt(prompts), world_size, for_gpu)
    show_plan(config, plan, describe_rhythm(config, world_size), prompts)


def plan_run(config: PpoConfig, text: Text, longest: int, world_size: int, for_gpu: bool) -> Plan:
    """Bytes by phase. longest: tokens of the longest prompt. Reads configs of the models; no weights. Raises ModelError
    as opening them would."""
    size = plan_size(config, longest, config.ppo.rollout_batch_size, world_size, for_gpu)
    trained_length = size.length if config.ppo.ptx.coef == 0 else max(size.length, config.ppo.ptx.data.max_length)
    known_text = text if _has_tokenizers(config) else None
    origins = find_origins(config, known_text)
    policy = plan_policy(config, text, origins.policy, size, trained_length)
    check_ptx(config, policy.config, positions(policy.config))
    trained, origin = [policy], find_critic(config, known_text, origins.policy)
    if origin is not None:
        trained.append(_critic(config, origin, policy.config, size, trained_length))
    reads = plan_reads(config, origins, policy.config, size)
    return make_plan(config, trained, reads, size, averaged=config.ppo.ema is not None)


def _critic(
    config: PpoConfig, origin: CriticOrigin, policy: PretrainedConfig, size: Size, trained_length: int
) -> Trained:
    hydra = config.ppo.sharing == "hydra"
    found = reward_config(policy, None) if hydra else critic_config(config, origin)
    return Trained("critic", origin.about, found, plan_training(config, found, size, trained_length), hydra)


def _has_tokenizers(config: PpoConfig) -> bool:
    """Whether reward models come with the tokenizers that decide on the critic; a plan can do with configs alone."""
    folders = [Path(locate(str(s.path), "path").path) for s in config.reward.sources if s.type == "model"]
    return all(any(f for pattern in TOKENIZER_FILES for f in folder.glob(pattern)) for folder in folders)


def describe_rhythm(config: PpoConfig, world_size: int) -> Table:
    """Rollouts and optimizer steps."""
    settings, micro = config.ppo, config.train.micro_batch_size
    prompts = settings.rollout_batch_size // settings.group_size
    mini_batch = settings.rollout_batch_size // settings.num_mini_batches
    each = settings.ppo_epochs * settings.num_mini_batches
    accumulation = responses_accumulation(config, world_size)
    batch = f"{mini_batch} responses a step = {micro} x {num_ranks(world_size)} x {accumulation} accumulation"
    warm_up = warmup_steps(config.optim, settings.total_steps)
    return [
        (
            "rollouts",
            f"{settings.num_iterations} of {settings.rollout_batch_size} responses"
            f" ({prompts} prompts x {settings.group_size}), at most {config.generation.max_new_tokens} tokens each",
        ),
        ("steps", f"{each} an iteration, {settings.total_steps} in all, {warm_up} of them warm-up"),
        ("batch", batch),
    ]
