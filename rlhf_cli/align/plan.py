"""What a run that aligns a policy would need, from configs alone: bytes of one rank by phase.

Formulas of single terms stand in models.memory. At rest are weights, optimizers, averages, and what is kept of frozen
models. On top of that:

    generate    ZeRO-3: the policy whole; keys and values of generation.batch_size sequences; their logits
    score       the largest of: the reward models, made whole, with one of their batches; the reference; a trained
                model, of which ZeRO-3 gathers block by block
    train       gradients and buckets of the trained models (under ZeRO-3 they have their place at rest), and of one of
                them what is gathered, activations, and the head
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from rlhf_cli.align.plan_models import Read, Size, Table, Trained, describe_models
from rlhf_cli.data.prompts import PreparedPrompts
from rlhf_cli.estimate import gib
from rlhf_cli.models.memory import cache_bytes, largest_live, logit_bytes, reading_bytes
from rlhf_cli.runtime.progress import Display
from rlhf_cli.schema import AlignedConfig


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


def make_plan(
    config: AlignedConfig, trained: Sequence[Trained], reads: Sequence[Read], size: Size, averaged: bool = False
) -> Plan:
    """Bytes by phase. trained: the policy first; reads: the reference first; averaged: the policy's weights are."""
    rest, host = _at_rest(config, trained, reads, size)
    average = 4 * trained[0].memory.trainable_params if averaged else 0
    if averaged:
        rest["average"] = _share(average, size)
    phases = {
        "generate": _generate(config, trained[0], size),
        "score": _score(config, trained, reads, size),
        "train": _train(config, trained),
    }
    checkpoint = 12 * sum(model.memory.trainable_params for model in trained) + average
    whole = max((read.own for read in reads if read.home != "keep"), default=0)
    return Plan(rest, phases, host, whole, checkpoint, describe_models(config, trained, reads))


# --- bytes


def _at_rest(
    config: AlignedConfig, trained: Sequence[Trained], reads: Sequence[Read], size: Size
) -> tuple[dict[str, int], int]:
    """(bytes on the device, bytes in the machine's memory)."""
    rest = {"policy": trained[0].memory.weights, "optimizers": sum(model.memory.optimizer for model in trained)}
    for model in trained[1:]:
        own = size.dtype.itemsize * model.memory.trainable_params
        own = _share(own, size) if _sharded(config, size) else own
        rest[model.name] = own if model.shared else model.memory.weights
    host = sum(model.memory.host for model in trained)
    if config.deepspeed.zero_stage == 3:
        rest["gradients"], rest["buckets"] = _gradients(trained), _buckets(trained)
    for read in reads:
        rest["frozen"] = rest.get("frozen", 0) + (read.own if read.home == "keep" else 0)
        rest["frozen"] += _share(read.own, size) if read.home == "shard" else 0
        host += _share(read.own, size) if read.home == "offload" else 0
    return rest, host


def _generate(config: AlignedConfig, policy: Trained, size: Size) -> dict[str, int]:
    sequences = min(config.generation.batch_size, _share(size.responses, size))
    # Rows that begin while others run need columns behind theirs (rollout.sampler).
    columns = size.length + (size.length // 2 if config.generation.refill else 0)
    return {
        "gathered": _whole(policy, size) if _sharded(config, size) else 0,
        "keys and values": cache_bytes(policy.config, size.dtype, sequences, columns),
        "logits": logit_bytes(policy.config, sequences),
    }


def _score(config: AlignedConfig, trained: Sequence[Trained], reads: Sequence[Read], size: Size) -> dict[str, int]:
    """The largest of what happens one after the other."""
    micro, on_cpu = config.train.micro_batch_size, not size.for_gpu
    base = _whole(trained[0], size) if _sharded(config, size) else 0
    passes = []
    for group, sequences in ((reads[:1], micro), (reads[1:], config.reward.batch_size)):
        if group:
            gathered = sum(_made_whole(read, size) for read in group)
            gathered += base if any(read.shared for read in group) else 0
            most = max(reading_bytes(r.config, r.dtype, sequences, size.length, on_cpu) for r in group)
            passes.append({"gathered": gathered, "activations": most})
    for model in trained:
        live = size.dtype.itemsize * largest_live(model.config) if base else 0
        needed = reading_bytes(model.config, size.dtype, micro, size.length, on_cpu)
        passes.append({"gathered": live, "activations": needed})
    return max(passes, key=lambda needs: sum(needs.values()))


def _train(config: AlignedConfig, trained: Sequence[Trained]) -> dict[str, int]:
    heaviest = max((model.memory for model in trained), key=lambda m: m.gathered + m.activations + m.head)
    has_place = config.deepspeed.zero_stage == 3
    return {
        "gradients": 0 if has_place else _gradients(trained),
        "gathered": heaviest.gathered,
        "buckets": 0 if has_place else _buckets(trained),
        "activations": heaviest.activations,
        "head": heaviest.head,
    }


def _gradients(trained: Sequence[Trained]) -> int:
    return sum(model.memory.gradients for model in trained)


def _buckets(trained: Sequence[Trained]) -> int:
    return sum(model.memory.buckets for model in trained)


def _share(count: int, size: Size) -> int:
    return -(-count // size.world_size)


def _sharded(config: AlignedConfig, size: Size) -> bool:
    return config.deepspeed.zero_stage == 3 and size.world_size > 1


def _whole(model: Trained, size: Size) -> int:
    return size.dtype.itemsize * model.memory.total_params


def _made_whole(read: Read, size: Size) -> int:
    """What making a model whole adds to what is kept of it."""
    if read.home == "keep" or (read.home == "shard" and size.world_size == 1):
        return 0
    return read.own


# --- words


def show_plan(config: AlignedConfig, plan: Plan, rhythm: Table, prompts: PreparedPrompts) -> None:
    """The dry run's table. rhythm: what an iteration consists of."""
    longest = longest_prompt(prompts)
    held_out = f", {len(prompts.eval)} to evaluate on" if prompts.eval is not None else ", none to evaluate on"
    rows = [("prompts", f"{len(prompts.train)} to learn from{held_out}, the longest has {longest} tokens")]
    rows += [*rhythm, *plan.models, *describe_memory(plan, config)]
    Display(sys.stdout, "none", config.stage).table(f"rlhf {config.stage} --dry-run: nothing was started", rows)


def longest_prompt(prompts: PreparedPrompts) -> int:
    """Tokens of the longest prompt to learn from."""
    return max(len(prompt.token_ids) for prompt in prompts.train)


def describe_memory(plan: Plan, config: AlignedConfig) -> Table:
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
