"""What a PPO run would do and need, from configs alone: rollouts, steps, and bytes of one rank by phase.

Formulas of single terms stand in models.memory. At rest are weights, optimizers, averages, and what is kept of frozen
models. On top of that:

    generate    ZeRO-3: the policy whole; keys and values of generation.batch_size sequences; their logits
    score       the largest of: the reward models, made whole, with one of their batches; the reference; policy or
                critic, of which ZeRO-3 gathers block by block
    train       gradients and buckets of policy and critic (under ZeRO-3 they have their place at rest), and of one of
                the two what is gathered, activations, and the head
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PretrainedConfig

from rlhf_cli.assemble import Text
from rlhf_cli.data.prompts import PreparedPrompts
from rlhf_cli.estimate import gib, num_ranks
from rlhf_cli.models.load import is_classifier, load_config, resolve_dtype
from rlhf_cli.models.memory import (
    MemoryEstimate,
    adapter_params,
    cache_bytes,
    estimate_memory,
    largest_live,
    logit_bytes,
    meta_model,
    reading_bytes,
)
from rlhf_cli.models.reward import reward_config
from rlhf_cli.models.tokenizer import TOKENIZER_FILES
from rlhf_cli.models.trainable import count_parameters
from rlhf_cli.ops.schedule import warmup_steps
from rlhf_cli.ppo.models import check_positions, frozen_home
from rlhf_cli.ppo.origins import critic_config, find_origins, source_config
from rlhf_cli.reward.combine import describe_rewards, source_names
from rlhf_cli.reward.locate import Located, locate
from rlhf_cli.runtime.frozen import Home
from rlhf_cli.runtime.progress import Display
from rlhf_cli.schema import LoraConfig, PpoConfig, RewardSourceConfig
from rlhf_cli.schema.stages import responses_accumulation

Table = list[tuple[str, str]]


class Size(NamedTuple):
    """The job's dimensions. length: longest prompt and response together, in tokens."""

    world_size: int
    length: int
    dtype: torch.dtype
    for_gpu: bool


@dataclass(frozen=True)
class Trained:
    """Policy or critic. shared: its frozen weights are another model's."""

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


@dataclass(frozen=True)
class Plan:
    """phases: what each adds to `rest`; all of it bytes of one rank by purpose. host: in the machine's memory;
    whole: of the largest model that a rank has there while it opens it, before it keeps its share."""

    rest: dict[str, int]
    phases: dict[str, dict[str, int]]
    host: int
    whole: int
    checkpoint: int
    models: Table

    def total(self, phase: str) -> int:
        """Bytes of a rank's device in a phase."""
        return sum(self.rest.values()) + sum(self.phases[phase].values())

    @property
    def most(self) -> int:
        """In the phase that needs most."""
        return max(self.total(phase) for phase in self.phases)


def print_plan(config: PpoConfig, text: Text, prompts: PreparedPrompts, world_size: int, for_gpu: bool) -> None:
    """The dry run's table. for_gpu: model.dtype=auto then means bf16."""
    longest = max(len(prompt.token_ids) for prompt in prompts.train)
    plan = plan_run(config, text, longest, world_size, for_gpu)
    held_out = f", {len(prompts.eval)} to evaluate on" if prompts.eval is not None else ", none to evaluate on"
    rows = [("prompts", f"{len(prompts.train)} to learn from{held_out}, the longest has {longest} tokens")]
    rows += [*describe_rhythm(config, world_size), *plan.models, *describe_memory(plan, config)]
    Display(sys.stdout, "none", config.stage).table("rlhf ppo --dry-run: nothing was started", rows)


def plan_run(config: PpoConfig, text: Text, longest_prompt: int, world_size: int, for_gpu: bool) -> Plan:
    """Bytes by phase. Reads configs of the models; no weights. Raises ModelError as opening them would."""
    name = "bf16" if for_gpu and config.model.dtype == "auto" else config.model.dtype
    dtype = resolve_dtype(name, torch.device("cpu"))
    size = Size(world_size, longest_prompt + config.generation.max_new_tokens, dtype, for_gpu)
    origins = find_origins(config, text if _has_tokenizers(config) else None)
    architecture = load_config(origins.policy, config.model.revision, config.model.trust_remote_code)
    architecture.vocab_size = max(architecture.vocab_size, len(text.tokenizer))
    positions = getattr(architecture.get_text_config(), "max_position_embeddings", None) or sys.maxsize
    check_positions(config, positions, positions)
    hydra = config.ppo.sharing == "hydra"
    policy = Trained(architecture, _estimate(config, architecture, size), False)
    models = [("policy", _about(str(config.model.path), policy))]
    critic = None
    if origins.critic is not None:
        found = reward_config(architecture, None) if hydra else critic_config(config, origins.critic)
        critic = Trained(found, _estimate(config, found, size), hydra)
        models.append(("critic", _about(origins.critic.about, critic)))
    reads = [_reference(config, origins.reference, architecture, size), *_rewards(config, architecture, size)]
    models += [(read.name, _about_read(read)) for read in reads]
    others = [source for source in config.reward.sources if source.type not in ("model", "classifier")]
    models += list(describe_rewards(replace(config.reward, sources=others)).items()) if others else []
    rest, host = _at_rest(config, policy, critic, reads, size)
    phases = {
        "generate": _generate(config, policy, size),
        "score": _score(config, policy, critic, reads, size),
        "train": _train(config, policy, critic),
    }
    trained = policy.memory.trainable_params + (critic.memory.trainable_params if critic else 0)
    checkpoint = 12 * trained + (4 * policy.memory.trainable_params if config.ppo.ema else 0)
    whole = max((read.own for read in reads if read.home != "keep"), default=0)
    return Plan(rest, phases, host, whole, checkpoint, models)


# --- the models


def _estimate(config: PpoConfig, architecture: PretrainedConfig, size: Size) -> MemoryEstimate:
    length = size.length if config.ppo.ptx.coef == 0 else max(size.length, config.ppo.ptx.data.max_length)
    return estimate_memory(
        architecture, config.model, config.lora, config.deepspeed, size.dtype, size.world_size,
        config.train.micro_batch_size, length, on_cpu=not size.for_gpu,
    )  # fmt: skip


def _reference(config: PpoConfig, path: str | None, policy: PretrainedConfig, size: Size) -> Read:
    if path is None:
        return Read("reference", policy, size.dtype, 0, "keep", True)
    found = policy if config.ppo.ref is None else load_config(path, None, config.model.trust_remote_code)
    own = size.dtype.itemsize * count_parameters(meta_model(found)).total
    return Read("reference", found, size.dtype, own, frozen_home(config, config.model, size.world_size), False)


def _rewards(config: PpoConfig, policy: PretrainedConfig, size: Size) -> list[Read]:
    reads, names = [], source_names(config.reward.sources)
    for number, source in enumerate(config.reward.sources):
        if source.type not in ("model", "classifier"):
            continue
        found = locate(str(source.path), f"reward.sources[{number}].path")
        reads.append(_reward(config, source, found, f"reward {names[number]}", policy, size))
    return reads


def _reward(
    config: PpoConfig, source: RewardSourceConfig, found: Located, name: str, policy: PretrainedConfig, size: Size
) -> Read:
    dtype = size.dtype if source.dtype == "auto" else resolve_dtype(source.dtype, torch.device("cpu"))
    architecture = source_config(source, found)
    if not is_classifier(architecture):
        architecture = reward_config(architecture, None)
    adapter = _adapter_params(found, architecture) if found.base is not None else 0
    if config.ppo.sharing == "hydra" and found.base is not None:
        return Read(name, reward_config(policy, None), size.dtype, size.dtype.itemsize * adapter, "keep", True)
    own = dtype.itemsize * (count_parameters(meta_model(architecture)).total + adapter)
    return Read(name, architecture, dtype, own, frozen_home(config, None, size.world_size), False)


def _adapter_params(found: Located, architecture: PretrainedConfig) -> int:
    settings: dict[str, Any] = json.loads((Path(found.path) / "adapter_config.json").read_text(encoding="utf-8"))
    return adapter_params(architecture, LoraConfig(True, int(settings["r"]), target_modules=settings["target_modules"]))


def _has_tokenizers(config: PpoConfig) -> bool:
    """Whether reward models come with the tokenizers that decide on the critic; a plan can do with configs alone."""
    folders = [Path(locate(str(s.path), "path").path) for s in config.reward.sources if s.type == "model"]
    return all(any(f for pattern in TOKENIZER_FILES for f in folder.glob(pattern)) for folder in folders)


def _about(what: str, model: Trained) -> str:
    counted = f"{model.memory.total_params:,} parameters, {model.memory.trainable_params:,} trained"
    return f"{what}; {counted}" + (", on the policy's base" if model.shared else "")


def _about_read(read: Read) -> str:
    if read.shared:
        return "on the policy's base" + (f", {gib(read.own)} of its own" if read.own else "")
    where = {"keep": "whole on every rank", "shard": "sharded between uses", "offload": "offloaded between uses"}
    return f"{gib(read.own)}, {where[read.home]}"


# --- bytes


def _at_rest(
    config: PpoConfig, policy: Trained, critic: Trained | None, reads: list[Read], size: Size
) -> tuple[dict[str, int], int]:
    """(bytes on the device, bytes in the machine's memory)."""
    share = lambda n: -(-n // size.world_size)
    rest = {"policy": policy.memory.weights, "optimizers": policy.memory.optimizer}
    host = policy.memory.host
    if critic is not None:
        own = size.dtype.itemsize * critic.memory.trainable_params
        rest["critic"] = (share(own) if _sharded(config, size) else own) if critic.shared else critic.memory.weights
        rest["optimizers"] += critic.memory.optimizer
        host += critic.memory.host
    if config.deepspeed.zero_stage == 3:
        rest["gradients"], rest["buckets"] = _gradients(policy, critic), _buckets(policy, critic)
    if config.ppo.ema:
        rest["average"] = share(4 * policy.memory.trainable_params)
    for read in reads:
        rest["frozen"] = rest.get("frozen", 0) + (read.own if read.home == "keep" else 0)
        rest["frozen"] += share(read.own) if read.home == "shard" else 0
        host += share(read.own) if read.home == "offload" else 0
    return rest, host


def _generate(config: PpoConfig, policy: Trained, size: Size) -> dict[str, int]:
    responses = -(-config.ppo.rollout_batch_size // size.world_size)
    sequences = min(config.generation.batch_size, responses)
    # Rows that begin while others run need columns behind theirs (rollout.sampler).
    columns = size.length + (size.length // 2 if config.generation.refill else 0)
    return {
        "gathered": _whole(policy, size) if _sharded(config, size) else 0,
        "keys and values": cache_bytes(policy.config, size.dtype, sequences, columns),
        "logits": logit_bytes(policy.config, sequences),
    }


def _score(config: PpoConfig, policy: Trained, critic: Trained | None, reads: list[Read], size: Size) -> dict[str, int]:
    """The largest of what happens one after the other."""
    micro, on_cpu = config.train.micro_batch_size, not size.for_gpu
    base = _whole(policy, size) if _sharded(config, size) else 0
    rewards = [read for read in reads if read.name != "reference"]
    passes = []
    for group, sequences in ((reads[:1], micro), (rewards, config.reward.batch_size)):
        if group:
            gathered = sum(_made_whole(read, size) for read in group)
            gathered += base if any(read.shared for read in group) else 0
            most = max(reading_bytes(r.config, r.dtype, sequences, size.length, on_cpu) for r in group)
            passes.append({"gathered": gathered, "activations": most})
    for model in (policy, critic):
        if model is not None:
            live = size.dtype.itemsize * largest_live(model.config) if base else 0
            needed = reading_bytes(model.config, size.dtype, micro, size.length, on_cpu)
            passes.append({"gathered": live, "activations": needed})
    return max(passes, key=lambda needs: sum(needs.values()))


def _train(config: PpoConfig, policy: Trained, critic: Trained | None) -> dict[str, int]:
    heaviest = max(
        (model.memory for model in (policy, critic) if model is not None),
        key=lambda m: m.gathered + m.activations + m.head,
    )
    has_place = config.deepspeed.zero_stage == 3
    return {
        "gradients": 0 if has_place else _gradients(policy, critic),
        "gathered": heaviest.gathered,
        "buckets": 0 if has_place else _buckets(policy, critic),
        "activations": heaviest.activations,
        "head": heaviest.head,
    }


def _gradients(policy: Trained, critic: Trained | None) -> int:
    return policy.memory.gradients + (critic.memory.gradients if critic is not None else 0)


def _buckets(policy: Trained, critic: Trained | None) -> int:
    return policy.memory.buckets + (critic.memory.buckets if critic is not None else 0)


def _sharded(config: PpoConfig, size: Size) -> bool:
    return config.deepspeed.zero_stage == 3 and size.world_size > 1


def _whole(model: Trained, size: Size) -> int:
    return size.dtype.itemsize * model.memory.total_params


def _made_whole(read: Read, size: Size) -> int:
    """What making a model whole adds to what is kept of it."""
    if read.home == "keep" or (read.home == "shard" and size.world_size == 1):
        return 0
    return read.own


# --- words


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


def describe_memory(plan: Plan, config: PpoConfig) -> Table:
    """Bytes of one rank by phase."""
    rows = [("at rest", f"{gib(sum(plan.rest.values()))} ({_parts(plan.rest)})")]
    for phase, added in plan.phases.items():
        rows.append((phase, f"{gib(plan.total(phase))} (at rest, {_parts(added)})"))
    if plan.whole:
        rows.append(("host at start", f"{gib(plan.whole)} more per rank, while it opens the largest frozen model"))
    kept = config.train.keep_checkpoints
    saved = f"{kept} kept" if config.train.save_every else "written when interrupted (train.save_every=0)"
    return [
        *rows,
        ("memory per rank", f"{gib(plan.most)} at most"),
        ("host memory", f"{gib(plan.host)} per rank, offloaded" if plan.host else "nothing offloaded"),
        ("one checkpoint", f"{gib(plan.checkpoint)}, {saved}"),
    ]


def _parts(sizes: dict[str, int]) -> str:
    return ", ".join(f"{name} {gib(count)}" for name, count in sizes.items() if count)
