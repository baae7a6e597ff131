"""What can be known to be wrong with `rlhf ppo` alone: its batches, its critic, text beside the prompts. Standard
library only."""

from __future__ import annotations

from collections.abc import Iterator

from rlhf_cli.config.align_requests import check_aligned, check_tokens, policy_positions, reward_models
from rlhf_cli.config.model_files import is_adapter, is_reward_model, model_folder
from rlhf_cli.config.paths import check_data_paths, check_model_path
from rlhf_cli.config.reward_requests import model_labels
from rlhf_cli.errors import Problem
from rlhf_cli.schema import PpoConfig
from rlhf_cli.schema.stages import responses_accumulation


def check_ppo(config: PpoConfig, world_size: int, has_gpu: bool, weights_needed: bool) -> Iterator[Problem]:
    """Batch arithmetic, data, every model and how they fit together."""
    accumulation = responses_accumulation(config, world_size)
    if isinstance(accumulation, Problem):
        yield accumulation
    found, usable = check_aligned(config, has_gpu, weights_needed)
    yield from found
    yield from check_data_paths("ppo.ptx.data.path", config.ppo.ptx.data.path)
    if usable.policy and config.ppo.ptx.coef > 0:
        yield from _check_text_length(config)
    if usable.policy and usable.rewards and config.ppo.has_critic:
        yield from _check_critic(config, weights_needed)


def _check_text_length(config: PpoConfig) -> Iterator[Problem]:
    positions = policy_positions(config)
    if positions is not None and config.ppo.ptx.data.max_length > positions:
        yield Problem(
            "ppo.ptx.data.max_length",
            f"{config.ppo.ptx.data.max_length} is more than the {positions} positions of {config.model.path}; lower it",
        )


def _check_critic(config: PpoConfig, weights_needed: bool) -> Iterator[Problem]:
    critic = config.ppo.critic
    if critic in ("auto", "policy"):  # the run decides what fits, and says so
        return
    if critic != "reward":
        found = list(check_model_path("ppo.critic", critic, ("policy", "reward"), weights_needed))
        yield from found or _check_fits_critic(critic, config)
        return
    if config.reward.normalize and config.reward.moments == "running":
        yield Problem(
            "ppo.critic",
            "reward: with reward.moments=running nobody knows at the start what scores will be; use policy, or"
            " reward.moments=manifest",
        )
    sources = [source for _, source in reward_models(config) if source.type == "model" and source.weight > 0]
    if not sources:
        yield Problem(
            "ppo.critic",
            "reward: no source in reward.sources is of type model and has a positive weight; use policy, or a path",
        )
        return
    unfit = [list(_check_becomes_critic(str(source.path), config)) for source in sources]
    if all(unfit):  # else the run takes the first one that fits
        yield from (problem for problems in unfit for problem in problems)


def _check_becomes_critic(path: str, config: PpoConfig) -> Iterator[Problem]:
    """A reward source as the beginning of the critic (ppo.critic=reward)."""
    folder = model_folder(path)
    if folder is not None and is_adapter(folder) and not config.lora.enabled:
        yield Problem(
            "ppo.critic",
            f"reward: {path} is an adapter; merge it into its base first: rlhf merge-lora merge.adapter={path}, or use"
            " ppo.critic=policy, or train adapters (lora.enabled=true)",
        )
    elif folder is not None and not is_adapter(folder) and config.ppo.sharing == "hydra":
        yield Problem(
            "ppo.critic",
            f"reward: {path} is a whole model, which ppo.sharing=hydra cannot share; use policy, or an adapter on"
            f" {config.model.path}",
        )
    else:
        yield from _check_fits_critic(path, config)


def _check_fits_critic(path: str, config: PpoConfig) -> Iterator[Problem]:
    """A critic has one score, and reads the policy's tokens."""
    folder = model_folder(path)
    labels = model_labels(folder) if folder is not None and is_reward_model(folder) else None
    if labels:
        yield Problem(
            "ppo.critic",
            f"{path} has the labels {', '.join(labels)}, a critic needs one score; use policy, or a reward model of"
            " pairs or rankings (rlhf rm)",
        )
    else:
        yield from check_tokens("ppo.critic", path, config, "a critic reads the policy's tokens")
