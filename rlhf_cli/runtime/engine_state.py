"""Optimizer state without a layout: by parameter name, for any number of ranks and any ZeRO stage.

DeepSpeed's own checkpoints load on the same ranks and stage only, and its universal format gives every parameter group
the first group's settings under stage 3. So each trainable parameter is stored whole as three flat fp32 vectors, its
master weight and Adam's two moments, plus Adam's step count. Frozen parameters are not stored; neither are the
low-precision weights, which are the master weights rounded (checked when writing).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from rlhf_cli.errors import CheckpointError
from rlhf_cli.runtime import engine_fragments as fragments
from rlhf_cli.runtime.distributed import any_rank, gather_objects
from rlhf_cli.runtime.engine import Engine
from rlhf_cli.runtime.engine_fragments import KINDS, MASTER, trainable

INDEX = "index.json"
SHARD_BYTES = 2**30  # a rank writes a file whenever it holds this much


class HeldState(NamedTuple):
    """Optimizer state in memory, parameter i on rank i mod world size.

    tensors: what this rank holds: {name: {kind: (numel,) fp32 on the CPU}}. owners and steps know all parameters.
    """

    tensors: dict[str, dict[str, torch.Tensor]]
    owners: dict[str, int]
    steps: dict[str, int]


def state_bytes(engine: Engine) -> int:
    """What export_state will write over all ranks, in bytes, without the small index."""
    return sum(fragments.numel(p) for p in trainable(engine).values()) * 4 * len(KINDS)


def export_state(engine: Engine, directory: Path) -> None:
    """Write the optimizer state into an existing directory that all ranks share. All ranks call it.

    Parameter i is put together and written by rank i mod world size, in files of about a gigabyte. A rank that cannot
    write goes on with the collectives, so that the others do not wait for it, and raises OSError at the end.
    """
    writer = ShardWriter(directory, engine.ranks.rank)
    for name, whole in _wholes(engine):
        writer.add(name, whole)
    writer.flush()
    files = {name: file for part in gather_objects(writer.files) for name, file in part.items()}
    steps = fragments.adam_steps(engine)
    if writer.failure is not None:
        raise OSError(f"{directory}: {writer.failure}")
    if engine.ranks.is_main and len(files) == len(steps):
        parameters = {
            name: {"file": files[name], "shape": list(fragments.shape(p)), "step": steps[name]}
            for name, p in trainable(engine).items()
        }
        index = {"parameters": parameters, "loss_scaler": fragments.loss_scaler_state(engine)}
        (directory / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def import_state(engine: Engine, directory: Path) -> None:
    """Put back what export_state wrote, whatever ranks and stage it was written on. All ranks call it.

    The engine's trainable parameters must be the stored ones, in groups of one step count each (param_groups with
    saved_steps). Raises CheckpointError when the parameters differ.
    """
    index = _read_index(directory)
    stored = index["parameters"]
    own = {name: list(fragments.shape(p)) for name, p in trainable(engine).items()}
    wrong = sorted(n for n in own.keys() | stored.keys() if own.get(n) != stored.get(n, {}).get("shape"))
    if wrong:
        name = wrong[0]
        raise CheckpointError(
            f"{directory}: holds other trainable parameters than this model: {len(wrong)} differ, the first is {name}"
            f" (shape stored: {stored.get(name, {}).get('shape', 'none')}, in the model: {own.get(name, 'none')});"
            " use the model, lora and trainable settings of the run that wrote it"
        )
    files = {file: safe_open(directory / file, framework="pt") for file in {p["file"] for p in stored.values()}}

    def read(name: str, kind: str, start: int, end: int) -> torch.Tensor:
        return files[stored[name]["file"]].get_slice(f"{kind}/{name}")[start:end]

    _put(engine, {name: p["step"] for name, p in stored.items()}, read)
    fragments.set_loss_scaler_state(engine, index["loss_scaler"])


def saved_steps(directory: Path) -> dict[str, int]:
    """Adam's step count of each stored parameter: what param_groups needs to build the groups again."""
    return {name: p["step"] for name, p in _read_index(directory)["parameters"].items()}


def hold_state(engine: Engine) -> HeldState:
    """Keep the optimizer state in memory over a change of the trainable parameters. All ranks call it."""
    owners = {name: i % engine.ranks.world_size for i, name in enumerate(trainable(engine))}
    return HeldState(dict(_wholes(engine)), owners, fragments.adam_steps(engine))


def restore_state(engine: Engine, held: HeldState) -> None:
    """Give parameters that were trainable before their optimizer state back; new ones keep a fresh one.

    The engine's groups must be those of param_groups(..., steps=held.steps). All ranks call it.
    """
    parameters = trainable(engine)

    def read(name: str, kind: str, start: int, end: int) -> torch.Tensor:
        if held.owners[name] == engine.ranks.rank:
            whole = held.tensors[name][kind].to(engine.ranks.device)
        else:
            size = fragments.numel(parameters[name])
            whole = torch.empty(size, dtype=torch.float32, device=engine.ranks.device)
        dist.broadcast(whole, src=held.owners[name])
        return whole[start:end]

    _put(engine, {name: held.steps[name] for name in parameters if name in held.steps}, read)


def forget_moments(engine: Engine) -> None:
    """Begin the optimizer anew: moments and step counts to zero; weights and master weights stay."""
    fragments.ensure_moments(engine)
    with torch.no_grad():
        for parameter in trainable(engine).values():
            start, end = fragments.piece_range(engine, parameter)
            for kind in KINDS:
                if kind != MASTER:
                    fragments.write_piece(engine, parameter, kind, torch.zeros(end - start))
    fragments.set_adam_steps(engine, dict.fromkeys(trainable(engine), 0))


class ShardWriter:
    """Gathers tensors and writes a file whenever there are enough. A failure stops the writing, not the caller."""

    def __init__(self, directory: Path, rank: int):
        self.files: dict[str, str] = {}  # parameter -> file
        self.failure: Exception | None = None
        self._directory, self._rank, self._number = directory, rank, 0
        self._held: dict[str, torch.Tensor] = {}

    def add(self, name: str, whole: dict[str, torch.Tensor]) -> None:
        self._held |= {f"{kind}/{name}": tensor for kind, tensor in whole.items()}
        if sum(t.nbytes for t in self._held.values()) >= SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        if self._held and self.failure is None:
            path = self._directory / f"state-{self._rank:05d}-{self._number:03d}.safetensors"
            try:
                save_file(self._held, path)
            except (OSError, SafetensorError) as error:
                self.failure = error
            self.files |= {key.partition("/")[2]: path.name for key in self._held}
            self._number += 1
        self._held = {}


def _read_index(directory: Path) -> dict[str, Any]:
    return json.loads((directory / INDEX).read_text(encoding="utf-8"))


def _wholes(engine: Engine) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """Whole states by name, {kind: (numel,) fp32 on the CPU}; yields on the owner of each parameter only."""
    fragments.ensure_moments(engine)
    _check_rounding(engine)
    for i, (name, parameter) in enumerate(trainable(engine).items()):
        owned = i % engine.ranks.world_size == engine.ranks.rank
        state = {}
        for kind in KINDS:
            whole = fragments.whole(engine, parameter, kind)
            if owned:
                state[kind] = whole.cpu()
        if owned:
            yield name, state


def _check_rounding(engine: Engine) -> None:
    changed = [
        name
        for name, parameter in trainable(engine).items()
        if not torch.equal(
            fragments.weights_piece(engine, parameter).cpu(),
            fragments.read_piece(engine, parameter, MASTER).cpu().to(parameter.dtype),
        )
    ]
    assert not any_rank(bool(changed)), f"weights differ from the optimizer's: {changed[:3] or 'on another rank'}"


def _put(engine: Engine, steps: dict[str, int], read: Callable[[str, str, int, int], torch.Tensor]) -> None:
    """Set the state of the parameters in steps, and the weights that follow from it.

    read(name, kind, start, end): elements of the flattened state; called in the same order on every rank.
    """
    fragments.ensure_moments(engine)
    with torch.no_grad():
        for name, parameter in trainable(engine).items():
            if name in steps:
                start, end = fragments.piece_range(engine, parameter)
                for kind in KINDS:
                    fragments.write_piece(engine, parameter, kind, read(name, kind, start, end))
                fragments.round_weights(engine, parameter)
    fragments.set_adam_steps(engine, steps)
