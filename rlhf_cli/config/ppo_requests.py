"""What can be known to be wrong with `rlhf ppo` before any process starts. Standard library only.

Each model has its part: the policy writes, the reference and a critic made of a reward model read the policy's tokens,
a reward model reads text unless it shares the policy's base.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

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
from rlhf_cli.config.reward_requests import check_rewards, model_labels
from rlhf_cli.errors import Problem
from rlhf_cli.files import digest_tree
from rlhf_cli.schema import PpoConfig, PromptDataConfig, RewardSourceConfig
from rlhf_cli.schema.stages import responses_accumulation

KEYED_SOURCES = list[tuple[str, RewardSourceConfig]]


def check_ppo(config: PpoConfig, world_size: int, has_gpu: bool, weights_needed: bool) -> Iterator[Problem]:
    """Batch arithmetic, data, every model and how they fit together."""
    accumulation = responses_accumulation(config, world_size)
    if isinstance(accumulation, Problem):
        yield accumulation
    yield from _check_data(config)
    yield from _check_rule_names(config)
    broken = list(check_policy("model.path", config.model.path, weights_needed)) if config.model.path else []
    unusable = list(check_rewards(config.reward))
    yield from [*broken, *unusable]
    if config.model.path and not broken:
        yield from _check_lengths(config)
        yield from _check_reference(config, weights_needed)
        if config.ppo.has_critic and not unusable:
            yield from _check_critic(config, weights_needed)
        if config.ppo.sharing == "hydra" and not unusable:
            yield from _check_shared_reward(config)
    yield from check_machine(config.model, config.logging, has_gpu or not weights_needed)


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


def _check_data(config: PpoConfig) -> Iterator[Problem]:
    data, ptx = config.data, config.ppo.ptx.data
    yield from check_data_paths("data.path", data.path)
    yield from check_data_paths("data.eval_path", data.eval_path)
    yield from check_data_paths("ppo.ptx.data.path", ptx.path)
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


def _check_rule_names(config: PpoConfig) -> Iterator[Problem]:
    names = [rule.name for rule in config.reward.rules if rule.name]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        yield Problem("reward.rules", f"has a name twice: {', '.join(twice)}")


def _check_lengths(config: PpoConfig) -> Iterator[Problem]:
    assert config.model.path is not None
    folder = model_folder(config.model.path)
    positions = num_positions(folder) if folder is not None else None
    if positions is None:
        return
    prompt, response = config.data.max_prompt_length, config.generation.max_new_tokens
    if prompt + response > positions:
        yield Problem(
            "generation.max_new_tokens",
            f"data.max_prompt_length + generation.max_new_tokens = {prompt} + {response} = {prompt + response} is more"
            f" than the {positions} positions of {config.model.path}; lower one of the two",
        )
    if config.ppo.ptx.coef > 0 and config.ppo.ptx.data.max_length > positions:
        yield Problem(
            "ppo.ptx.data.max_length",
            f"{config.ppo.ptx.data.max_length} is more than the {positions} positions of {config.model.path}; lower it",
        )


# --- models beside the policy


def _check_reference(config: PpoConfig, weights_needed: bool) -> Iterator[Problem]:
    if config.ppo.ref is None:
        return
    found = list(check_policy("ppo.ref", config.ppo.ref, weights_needed))
    yield from found
    if not found:
        yield from _check_tokens("ppo.ref", config.ppo.ref, config, "the KL is between distributions over its tokens")


def _check_critic(config: PpoConfig, weights_needed: bool) -> Iterator[Problem]:
    critic = config.ppo.critic
    if critic in ("auto", "policy"):  # the run decides what fits, and says so
        return
    if critic != "reward":
        found = list(check_model_path("ppo.critic", critic, ("policy", "reward"), weights_needed))
        yield from found or _check_fits_critic(critic, config)
        return
    sources = [source for _, source in _reward_models(config) if source.type == "model" and source.weight > 0]
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
        yield from _check_tokens("ppo.critic", path, config, "a critic reads the policy's tokens")


def _check_tokens(key: str, path: str, config: PpoConfig, reason: str) -> Iterator[Problem]:
    """The tokenizer must be the policy's."""
    assert config.model.path is not None
    policy, other = model_folder(config.model.path), model_folder(path)
    if policy is None or other is None:
        return
    difference = tokenizer_difference(policy, other)
    if difference:
        yield Problem(
            key,
            f"{path} has another tokenizer than the policy {config.model.path} ({difference}), but {reason}; use one"
            " that was trained from the policy, or from the same model as it (rlhf sft, rlhf rm)",
        )


def _reward_models(config: PpoConfig) -> KEYED_SOURCES:
    """The sources that are models, with their keys."""
    sources = enumerate(config.reward.sources)
    return [(f"reward.sources[{n}]", s) for n, s in sources if s.type in ("model", "classifier") and s.path]


# --- one base for all


def _check_shared_reward(config: PpoConfig) -> Iterator[Problem]:
    """hydra holds the base once: of the reward models at least one is an adapter on that base. Whole ones may stand
    beside it with weights of their own, as may functions and servers."""
    models = _reward_models(config)
    folders = [(key, source.path or "", model_folder(source.path or "")) for key, source in models]
    whole = [path for _, path, folder in folders if folder is not None and not is_adapter(folder)]
    for key, path, folder in folders:
        if folder is not None and is_adapter(folder):  # a hub id is looked at by the run
            yield from _check_base(f"{key}.path", path, folder, config)
    if models and len(whole) == len(models):
        yield Problem(
            f"{models[0][0]}.path" if len(models) == 1 else "reward.sources",
            f"{' and '.join(whole)} {'is a whole model' if len(models) == 1 else 'are whole models'},"
            f" ppo.sharing=hydra needs an adapter on {config.model.path}: a run of"
            f" `rlhf rm model.path={config.model.path} lora=r16` (not merged), or use ppo.sharing=separate",
        )


def _check_base(key: str, path: str, folder: Path, config: PpoConfig) -> Iterator[Problem]:
    """An adapter's base must be the very model that the policy starts from: by place, or else by content."""
    assert config.model.path is not None
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
            f"{path} was trained on {named}, with ppo.sharing=hydra it must be the policy's base {config.model.path};"
            f" train it there (rlhf rm model.path={config.model.path} lora=r16), or use ppo.sharing=separate",
        )
        return
    yield from _check_tokens(key, path, config, "with ppo.sharing=hydra they share their embeddings")
