"""The models of a run that aligns a policy as its dry run sees them: configs and sizes, no weights."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PretrainedConfig

from rlhf_cli.align.models import check_positions, frozen_home
from rlhf_cli.align.origins import Origins, source_config
from rlhf_cli.assemble import Text
from rlhf_cli.estimate import gib
from rlhf_cli.models.load import is_classifier, load_config, resolve_dtype
from rlhf_cli.models.memory import MemoryEstimate, adapter_params, estimate_memory, meta_model
from rlhf_cli.models.reward import reward_config
from rlhf_cli.models.trainable import count_parameters
from rlhf_cli.reward.combine import describe_rewards, source_names
from rlhf_cli.reward.locate import Located, locate
from rlhf_cli.runtime.frozen import Home
from rlhf_cli.schema import AlignedConfig, LoraConfig, RewardSourceConfig

Table = list[tuple[str, str]]


class Size(NamedTuple):
    """The job's dimensions. length: longest prompt and response together, in tokens; responses: of an iteration."""

    world_size: int
    length: int
    responses: int
    dtype: torch.dtype
    for_gpu: bool


@dataclass(frozen=True)
class Trained:
    """The policy, or a critic. about: what it starts from; shared: its frozen weights are another model's."""

    name: str
    about: str
    config: PretrainedConfig
    memory: MemoryEstimate
    shared: bool


@dataclass(frozen=True)
class Read:
    """Reference or reward model. own: bytes of its weights that are its own; shared: it reads the policy's base too."""

    name: str
    config: PretrainedConfig
    dtype: torch.dtype
    own: int
    home: Home
    shared: bool


def plan_size(config: AlignedConfig, longest_prompt: int, responses: int, world_size: int, for_gpu: bool) -> Size:
    """for_gpu: model.dtype=auto then means bf16."""
    name = "bf16" if for_gpu and config.model.dtype == "auto" else config.model.dtype
    dtype = resolve_dtype(name, torch.device("cpu"))
    return Size(world_size, longest_prompt + config.generation.max_new_tokens, responses, dtype, for_gpu)


def plan_policy(config: AlignedConfig, text: Text, path: str, size: Size, length: int) -> Trained:
    """length: of the longest row it is trained on. Raises ModelError where it has too few positions."""
    architecture = load_config(path, config.model.revision, config.model.trust_remote_code)
    architecture.vocab_size = max(architecture.vocab_size, len(text.tokenizer))
    check_positions(config, positions(architecture))
    memory = plan_training(config, architecture, size, length)
    return Trained("policy", str(config.model.path), architecture, memory, False)


def positions(architecture: PretrainedConfig) -> int:
    """Longest sequence that a model has positions for."""
    return getattr(architecture.get_text_config(), "max_position_embeddings", None) or sys.maxsize


def plan_training(config: AlignedConfig, architecture: PretrainedConfig, size: Size, length: int) -> MemoryEstimate:
    """Of a model that is trained as the policy is, on rows of so many tokens."""
    return estimate_memory(
        architecture, config.model, config.lora, config.deepspeed, size.dtype, size.world_size,
        config.train.micro_batch_size, length, on_cpu=not size.for_gpu,
    )  # fmt: skip


def plan_reads(config: AlignedConfig, origins: Origins, policy: PretrainedConfig, size: Size) -> list[Read]:
    """The reference, then the reward models."""
    reads, names = [_reference(config, origins.reference, policy, size)], source_names(config.reward.sources)
    for number, source in enumerate(config.reward.sources):
        if source.type in ("model", "classifier"):
            found = locate(str(source.path), f"reward.sources[{number}].path")
            reads.append(_reward(config, source, found, f"reward {names[number]}", policy, size))
    return reads


def _reference(config: AlignedConfig, path: str | None, policy: PretrainedConfig, size: Size) -> Read:
    if path is None:
        return Read("reference", policy, size.dtype, 0, "keep", True)
    found = policy if config.algorithm.ref is None else load_config(path, None, config.model.trust_remote_code)
    own = size.dtype.itemsize * count_parameters(meta_model(found)).total
    return Read("reference", found, size.dtype, own, frozen_home(config, config.model, size.world_size), False)


def _reward(
    config: AlignedConfig, source: RewardSourceConfig, found: Located, name: str, policy: PretrainedConfig, size: Size
) -> Read:
    dtype = size.dtype if source.dtype == "auto" else resolve_dtype(source.dtype, torch.device("cpu"))
    architecture = source_config(source, found)
    if not is_classifier(architecture):
        architecture = reward_config(architecture, None)
    adapter = _adapter_params(found, architecture) if found.base is not None else 0
    if config.algorithm.sharing == "hydra" and found.base is not None:
        return Read(name, reward_config(policy, None), size.dtype, size.dtype.itemsize * adapter, "keep", True)
    own = dtype.itemsize * (count_parameters(meta_model(architecture)).total + adapter)
    return Read(name, architecture, dtype, own, frozen_home(config, None, size.world_size), False)


def _adapter_params(found: Located, architecture: PretrainedConfig) -> int:
    settings: dict[str, Any] = json.loads((Path(found.path) / "adapter_config.json").read_text(encoding="utf-8"))
    return adapter_params(architecture, LoraConfig(True, int(settings["r"]), target_modules=settings["target_modules"]))


def describe_models(config: AlignedConfig, trained: Sequence[Trained], reads: Sequence[Read]) -> Table:
    """A line for each model, and for each other source of rewards."""
    rows = [(model.name, _about_trained(model)) for model in trained] + [
        (read.name, _about_read(read)) for read in reads
    ]
    others = [source for source in config.reward.sources if source.type not in ("model", "classifier")]
    return rows + (list(describe_rewards(replace(config.reward, sources=others)).items()) if others else [])


def _about_trained(model: Trained) -> str:
    counted = f"{model.memory.total_params:,} parameters, {model.memory.trainable_params:,} trained"
    return f"{model.about}; {counted}" + (", on the policy's base" if model.shared else "")


def _about_read(read: Read) -> str:
    if read.shared:
        return "on the policy's base" + (f", {gib(read.own)} of its own" if read.own else "")
    where = {"keep": "whole on every rank", "shard": "sharded between uses", "offload": "offloaded between uses"}
    return f"{gib(read.own)}, {where[read.home]}"
