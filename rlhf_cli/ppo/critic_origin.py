"""What the critic of a PPO run starts from: found and checked before any weights are loaded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_cli.align.origins import other_text, source_config
from rlhf_cli.assemble import Text
from rlhf_cli.errors import ModelError
from rlhf_cli.models.reward import ScoreScale, load_reward_config, score_scale
from rlhf_cli.reward.combine import has_running_moments
from rlhf_cli.reward.locate import Located, locate
from rlhf_cli.reward.open_model import find_moments, head_rows
from rlhf_cli.runtime.manifest import model_dir
from rlhf_cli.schema import PpoConfig, RewardSourceConfig


class CriticOrigin(NamedTuple):
    """path: a classifier, or a causal LM that gets a new head; adapter: one on it to go on from, or None; about: for
    the user; scale: what brings its scores to those that the policy learns from."""

    path: str
    revision: str | None
    adapter: str | None
    about: str
    scale: ScoreScale = ScoreScale()


def find_critic(config: PpoConfig, text: Text | None, policy: str) -> CriticOrigin | None:
    """policy: directory or hub id; text: as for align.origins.find_origins. None without a critic.

    Raises ModelError for a model that cannot be one.
    """
    if not config.ppo.has_critic:
        return None
    wanted = config.ppo.critic
    from_policy = CriticOrigin(policy, config.model.revision, None, "the policy's weights with a new head")
    if wanted == "policy":
        return from_policy
    if wanted not in ("auto", "reward"):
        return _critic_at(config, text, wanted)
    reasons = []
    for key, source in _model_sources(config):
        if source.weight <= 0:
            reasons.append(f"{source.path} has weight {source.weight:g}, so its score is not what is learnt")
            continue
        found = locate(str(source.path), f"{key}.path")
        unfit = _why_unfit(found, source, config, text)
        if unfit is not None:
            reasons.append(f"{source.path} {unfit}")
            continue
        about, scale = f"the reward model {source.path}", learnt_scale(found, source, config)
        if found.base is not None:
            return CriticOrigin(found.base, None, found.path, f"{about}, going on with its adapter", scale)
        return CriticOrigin(found.path, source.revision, None, about, scale)
    why_not = "; ".join(reasons) or "there is no reward source of type model"
    if wanted == "reward":
        raise ModelError(f"ppo.critic: reward is not possible: {why_not}. Use ppo.critic=policy, or auto")
    return from_policy._replace(about=f"{from_policy.about} ({why_not})")


def _critic_at(config: PpoConfig, text: Text | None, wanted: str) -> CriticOrigin:
    path = model_dir(wanted, ("policy", "reward"))[0]
    architecture = _classifier_config(path, None, config)
    if isinstance(architecture, str):
        raise ModelError(f"ppo.critic: {wanted} {architecture}")
    differs = other_text(text, path, None, config.model.trust_remote_code) if text is not None else None
    if differs:
        raise ModelError(f"ppo.critic: {wanted} {differs}; the critic reads the policy's tokens")
    for key, source in _model_sources(config):
        found = locate(str(source.path), f"{key}.path")
        if found.path == path and source.weight > 0:
            return CriticOrigin(path, None, None, wanted, learnt_scale(found, source, config))
    return CriticOrigin(path, None, None, wanted, score_scale(architecture))


def learnt_scale(found: Located, source: RewardSourceConfig, config: PpoConfig) -> ScoreScale:
    """What makes weight x (score - mean) / std of a reward model's score: its part in what the policy learns from.

    A critic that kept the model's own scale would be off by a constant, which with gamma = 1 shows at the last token of
    each response: the policy would first learn to end, or not to.
    """
    own = score_scale(source_config(source, found)) if found.base is None else ScoreScale()
    mean, std = 0.0, 1.0
    if config.reward.normalize and not has_running_moments(config.reward):
        mean, std = find_moments(source, found, [], None)
    return ScoreScale(own.factor * source.weight / std, (own.shift - mean) * source.weight / std)


def _model_sources(config: PpoConfig) -> Iterator[tuple[str, RewardSourceConfig]]:
    for number, source in enumerate(config.reward.sources):
        if source.type == "model":
            yield f"reward.sources[{number}]", source


def _why_unfit(found: Located, source: RewardSourceConfig, config: PpoConfig, text: Text | None) -> str | None:
    """Why a critic cannot start from this reward model; None when it can."""
    if has_running_moments(config.reward):
        return "gives scores that are normalised by running moments (reward.moments), which nobody knows at the start"
    if found.base is not None and not config.lora.enabled:
        return "is an adapter; merge it first (rlhf merge-lora), or train adapters (lora.enabled=true)"
    if found.base is None and config.ppo.sharing == "hydra":
        return "has weights of its own, which ppo.sharing=hydra cannot share"
    architecture = _classifier_config(found.base or found.path, source.revision, config)
    if isinstance(architecture, str):
        return architecture
    if found.base is not None and head_rows(Path(found.path)) != 1:
        return "has several labels; a critic has one score"
    if text is None:
        return None
    differs = other_text(text, found.path, source.revision, source.trust_remote_code)
    return f"{differs}; a critic reads the policy's tokens" if differs else None


def _classifier_config(path: str, revision: str | None, config: PpoConfig) -> Any:
    """The config of a critic made of the model at `path`, or what is wrong with that."""
    try:
        found = load_reward_config(path, revision, config.model.trust_remote_code)
    except ModelError as error:
        return f"cannot become a critic ({error})"
    if found.num_labels != 1:
        return f"has {found.num_labels} labels; a critic has one score"
    return found


def critic_config(config: PpoConfig, origin: CriticOrigin) -> Any:
    """The transformers config of the critic."""
    return load_reward_config(origin.path, origin.revision, config.model.trust_remote_code)
