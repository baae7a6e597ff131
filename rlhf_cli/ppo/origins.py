"""What each model of a PPO run starts from: found and checked before any weights are loaded."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from rlhf_cli.assemble import Text
from rlhf_cli.errors import ModelError
from rlhf_cli.files import digest_tree
from rlhf_cli.models.load import read_config
from rlhf_cli.models.reward import load_reward_config
from rlhf_cli.models.tokenizer import ensure_pad, load_tokenizer, tokenizer_digest
from rlhf_cli.reward.locate import Located, locate
from rlhf_cli.reward.open_model import head_rows
from rlhf_cli.runtime.manifest import model_dir
from rlhf_cli.schema import PpoConfig, RewardSourceConfig


class CriticOrigin(NamedTuple):
    """path: a classifier, or a causal LM that gets a new head; adapter: one on it to go on from, or None; about: for
    the user."""

    path: str
    revision: str | None
    adapter: str | None
    about: str


class Origins(NamedTuple):
    """Directories or hub ids. reference: None = the policy's own weights without its adapter; critic: None = none."""

    policy: str
    reference: str | None
    critic: CriticOrigin | None


def find_origins(config: PpoConfig, text: Text | None) -> Origins:
    """text: the policy's, which others must agree with; None to leave that out (a dry run has configs only).

    Raises ModelError for a model that is missing, of another kind, or whose tokenizer is another one.
    """
    assert config.model.path is not None, "checked by the schema"
    policy = model_dir(config.model.path)[0]
    reference = None if config.lora.enabled else policy
    if config.ppo.ref is not None:
        reference = model_dir(config.ppo.ref)[0]
        if text is not None:
            differs = other_tokenizer(text, reference, None, config.model.trust_remote_code)
            if differs:
                raise ModelError(f"ppo.ref: {config.ppo.ref} {differs}; KL compares the two token by token")
    return Origins(policy, reference, _critic(config, text, policy) if config.ppo.has_critic else None)


def check_base(found: Located, key: str, policy: str, policy_digest: str | None) -> None:
    """Raise ModelError unless a reward adapter was trained on the policy's very weights (ppo.sharing=hydra).

    policy: directory or hub id; policy_digest: of that directory, None for a hub id.
    """
    assert found.base is not None
    base, ours = Path(found.base).expanduser(), Path(policy).expanduser()
    if not base.is_dir() or not ours.is_dir():
        same = found.base == policy
    elif found.base_digest is not None:
        same = found.base_digest == policy_digest
    else:
        same = base.resolve() == ours.resolve() or digest_tree(base) == policy_digest
    if not same:
        raise ModelError(
            f"{key}.path: {found.path} is an adapter of {found.base}, but ppo.sharing=hydra needs one that was trained"
            f" on the policy's own weights, {policy} as it is now: train it there (`rlhf rm` from that model with"
            " lora=r16), or merge it (rlhf merge-lora) and use ppo.sharing=separate"
        )


def other_tokenizer(text: Text, path: str, revision: str | None, trust_remote_code: bool) -> str | None:
    """What is wrong with the tokenizer of a model that will read the policy's tokens; None = it is the same."""
    try:
        theirs = _digest(load_tokenizer(path, revision, trust_remote_code))
    except ModelError as error:
        return f"has no tokenizer that could be compared ({error})"
    if theirs != _digest(text.tokenizer):
        return "has another tokenizer than the policy"
    return None


def _digest(tokenizer: PreTrainedTokenizerBase) -> str:
    own = copy.deepcopy(tokenizer)
    ensure_pad(own)
    return tokenizer_digest(own)


def _critic(config: PpoConfig, text: Text | None, policy: str) -> CriticOrigin:
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
        about = f"the reward model {source.path}"
        if found.base is not None:
            return CriticOrigin(found.base, None, found.path, f"{about}, going on with its adapter")
        return CriticOrigin(found.path, source.revision, None, about)
    why_not = "; ".join(reasons) or "there is no reward source of type model"
    if wanted == "reward":
        raise ModelError(f"ppo.critic: reward is not possible: {why_not}. Use ppo.critic=policy, or auto")
    return from_policy._replace(about=f"{from_policy.about} ({why_not})")


def _critic_at(config: PpoConfig, text: Text | None, wanted: str) -> CriticOrigin:
    path = model_dir(wanted, ("policy", "reward"))[0]
    architecture = _classifier_config(path, None, config)
    if isinstance(architecture, str):
        raise ModelError(f"ppo.critic: {wanted} {architecture}")
    differs = other_tokenizer(text, path, None, config.model.trust_remote_code) if text is not None else None
    if differs:
        raise ModelError(f"ppo.critic: {wanted} {differs}; the critic reads the policy's tokens")
    return CriticOrigin(path, None, None, wanted)


def _model_sources(config: PpoConfig) -> Iterator[tuple[str, RewardSourceConfig]]:
    for number, source in enumerate(config.reward.sources):
        if source.type == "model":
            yield f"reward.sources[{number}]", source


def _why_unfit(found: Located, source: RewardSourceConfig, config: PpoConfig, text: Text | None) -> str | None:
    """Why a critic cannot start from this reward model; None when it can."""
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
    differs = other_tokenizer(text, found.path, source.revision, source.trust_remote_code)
    return f"{differs}, whose tokens a critic reads" if differs else None


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


def source_config(source: RewardSourceConfig, found: Located) -> Any:
    """The transformers config of a reward model; of an adapter that of its base."""
    return read_config(found.base or found.path, source.revision, source.trust_remote_code)
