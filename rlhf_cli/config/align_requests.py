"""What can be known to be wrong with a stage in which a policy learns from what it writes (`rlhf ppo`, `rlhf raft`),
before any process starts. Standard library only.

Each model has its part: the policy writes, the reference reads the policy's tokens, a reward model reads text unless it
shares the policy's base.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from rlhf_cli.config.machine import check_machine
from rlhf_cli.config.model_files import (
    is_adapter,
    is_reward_model,
    manifest_of,
    model_folder,
    num_positions,
    read_json,
    tokenizer_difference,
)
from rlhf_cli.config.paths import check_data_paths, check_model_path
from rlhf_cli.config.reward_requests import check_rewards
from rlhf_cli.errors import Problem
from rlhf_cli.files import digest_tree
from rlhf_cli.schema import AlignedConfig, PromptDataConfig, RewardSourceConfig

KEYED_SOURCES = list[tuple[str, RewardSourceConfig]]


class Usable(NamedTuple):
    """Whether nothing is wrong with the policy, and with the reward sources, so that more can be asked of them."""

    policy: bool
    rewards: bool


def check_aligned(config: AlignedConfig, has_gpu: bool, weights_needed: bool) -> tuple[list[Problem], Usable]:
    """Data, policy, reference and rewards: what is wrong with them, and what of them a stage may ask more of."""
    broken = list(check_policy("model.path", config.model.path, weights_needed)) if config.model.path else []
    unusable = list(check_rewards(config.reward))
    usable = Usable(bool(config.model.path) and not broken, not unusable)
    found = [*_check_data(config), *_check_rule_names(config), *broken, *unusable]
    if usable.policy:
        found += [*_check_lengths(config), *_check_reference(config, weights_needed)]
        if config.algorithm.sharing == "hydra" and usable.rewards:
            found += _check_shared_reward(config)
    found += check_machine(config.model, config.logging, has_gpu or not weights_needed)
    return found, usable


def check_policy(key: str, path: str, weights_needed: bool) -> Iterator[Problem]:
    """A causal language model: the result of `rlhf sft` or of a merge, a local directory, or a hub id."""
    folder = model_folder(path)
    finished = folder is not None and manifest_of(folder).get("status") in ("complete", None)
    if folder is not None and finished and is_reward_model(folder):
        what = "the adapter of a reward model" if is_adapter(folder) else "a reward model"
        yield Problem(
            key, f"{path} holds {what}, here a policy is needed: a run of `rlhf sft`; rewards go to reward.sources"
        )
    else:
        yield from check_model_path(key, path, ("policy",), weights_needed)


# --- data


def _check_data(config: AlignedConfig) -> Iterator[Problem]:
    data = config.data
    yield from check_data_paths("data.path", data.path)
    yield from check_data_paths("data.eval_path", data.eval_path)
    yield from check_data_paths("eval.tax_path", config.eval.tax_path)
    if _has_plain_text(data) and data.prompt_tokens > data.max_prompt_length:
        yield Problem(
            "data.prompt_tokens",
            f"{data.prompt_tokens} is more than data.max_prompt_length = {data.max_prompt_length}: no prompt cut from a"
            " .txt would be left",
        )


def _has_plain_text(data: PromptDataConfig) -> bool:
    given = [data.path, data.eval_path]
    paths = [path for entry in given for path in ([entry] if isinstance(entry, str) else entry or [])]
    return any(path.lower().removesuffix(".gz").endswith(".txt") for path in paths)


def _check_rule_names(config: AlignedConfig) -> Iterator[Problem]:
    names = [rule.name for rule in config.reward.rules if rule.name]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        yield Problem("reward.rules", f"has a name twice: {', '.join(twice)}")


def _check_lengths(config: AlignedConfig) -> Iterator[Problem]:
    positions = policy_positions(config)
    prompt, response = config.data.max_prompt_length, config.generation.max_new_tokens
    if positions is not None and prompt + response > positions:
        yield Problem(
            "generation.max_new_tokens",
            f"data.max_prompt_length + generation.max_new_tokens = {prompt} + {response} = {prompt + response} is more"
            f" than the {positions} positions of {config.model.path}; lower one of the two",
        )


def policy_positions(config: AlignedConfig) -> int | None:
    """Tokens that the policy can tell apart by their place; None when its files do not tell."""
    assert config.model.path is not None
    folder = model_folder(config.model.path)
    return num_positions(folder) if folder is not None else None


# --- models beside the policy


def _check_reference(config: AlignedConfig, weights_needed: bool) -> Iterator[Problem]:
    key, path = f"{config.stage}.ref", config.algorithm.ref
    if path is None:
        return
    found = list(check_policy(key, path, weights_needed))
    yield from found or check_tokens(key, path, config, "the KL is between distributions over its tokens")


def check_tokens(key: str, path: str, config: AlignedConfig, reason: str) -> Iterator[Problem]:
    """Tokenizer and template must be the policy's."""
    assert config.model.path is not None
    policy, other = model_folder(config.model.path), model_folder(path)
    if policy is None or other is None:
        return
    difference = tokenizer_difference(policy, other)
    wanted, theirs = config.data.template, manifest_of(other).get("template")
    ours = manifest_of(policy).get("template") if wanted == "auto" else wanted
    if difference:
        yield Problem(
            key,
            f"{path} has another tokenizer than the policy {config.model.path} ({difference}), but {reason}; use one"
            " that was trained from the policy, or from the same model as it (rlhf sft, rlhf rm)",
        )
    elif ours and theirs and ours != theirs and "tokenizer" not in (ours, theirs):  # what that one says, the run knows
        yield Problem(
            key,
            f"{path} was trained with the template {theirs}, and the policy writes {ours} (data.template), but"
            f" {reason}; run `rlhf {manifest_of(other).get('stage')}` with data.template={ours} first",
        )


def reward_models(config: AlignedConfig) -> KEYED_SOURCES:
    """The sources that are models, with their keys."""
    sources = enumerate(config.reward.sources)
    return [(f"reward.sources[{n}]", s) for n, s in sources if s.type in ("model", "classifier") and s.path]


# --- one base for all


def _check_shared_reward(config: AlignedConfig) -> Iterator[Problem]:
    """hydra holds the base once: of the reward models at least one is an adapter on that base. Whole ones may stand
    beside it with weights of their own, as may functions and servers."""
    models, sharing = reward_models(config), f"{config.stage}.sharing"
    folders = [(key, source.path or "", model_folder(source.path or "")) for key, source in models]
    whole = [path for _, path, folder in folders if folder is not None and not is_adapter(folder)]
    for key, path, folder in folders:
        if folder is not None and is_adapter(folder):  # a hub id is looked at by the run
            yield from _check_base(f"{key}.path", path, folder, config)
    if models and len(whole) == len(models):
        yield Problem(
            f"{models[0][0]}.path" if len(models) == 1 else "reward.sources",
            f"{' and '.join(whole)} {'is a whole model' if len(models) == 1 else 'are whole models'},"
            f" {sharing}=hydra needs an adapter on {config.model.path}: a run of"
            f" `rlhf rm model.path={config.model.path} lora=r16` (not merged), or use {sharing}=separate",
        )


def _check_base(key: str, path: str, folder: Path, config: AlignedConfig) -> Iterator[Problem]:
    """An adapter's base must be the very model that the policy starts from: by place, or else by content."""
    assert config.model.path is not None
    sharing = f"{config.stage}.sharing"
    named = str(read_json(folder / "adapter_config.json").get("base_model_name_or_path"))
    policy = model_folder(config.model.path)
    if policy is None:
        is_same = named == config.model.path
    else:
        is_same = Path(named).expanduser().resolve() == policy.resolve()
        digest = None if is_same else manifest_of(folder).get("base_digest")
        is_same = is_same or (digest is not None and digest == digest_tree(policy))
    if not is_same:
        yield Problem(
            key,
            f"{path} was trained on {named}, with {sharing}=hydra it must be the policy's base {config.model.path};"
            f" train it there (rlhf rm model.path={config.model.path} lora=r16), or use {sharing}=separate",
        )
        return
    yield from check_tokens(key, path, config, f"with {sharing}=hydra they share their embeddings")
