"""An exponential moving average of the weights under training, in fp32, beside the optimizer.

Each rank averages the pieces that it updates, from the optimizer's master weights; frozen parameters have none. Stored
like the optimizer state (engine_state): whole tensors by parameter name, for any number of ranks and any ZeRO stage.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open

from rlhf_cli.errors import CheckpointError
from rlhf_cli.runtime import engine_fragments as fragments
from rlhf_cli.runtime.distributed import gather_objects
from rlhf_cli.runtime.engine import Engine
from rlhf_cli.runtime.engine_fragments import MASTER, trainable
from rlhf_cli.runtime.engine_state import ShardWriter

INDEX = "index.json"
KIND = "average"


class Ema:
    """average <- decay x average + (1 - decay) x weight, from the weights as they were when this was made."""

    def __init__(self, engine: Engine, decay: float):
        self.engine, self.decay = engine, decay
        self._parameters = trainable(engine)
        self._pieces = {name: self._master(name).clone() for name in self._parameters}

    @torch.no_grad()
    def update(self) -> None:
        """After each optimizer step. A step that fp16's loss scaler skipped is none."""
        if self.engine.skipped:
            return
        for name, average in self._pieces.items():
            average.mul_(self.decay).add_(self._master(name), alpha=1 - self.decay)

    @property
    def num_bytes(self) -> int:
        """What export_state writes over all ranks, without the small index."""
        return sum(4 * fragments.numel(p) for p in self._parameters.values())

    def weights(self) -> dict[str, torch.Tensor]:
        """The averages by parameter name, whole, rounded to the model's dtype, on the CPU of rank 0; nothing on the
        others. All ranks call it."""
        found = {}
        for name, parameter in self._parameters.items():
            whole = fragments.put_together(self.engine, parameter, self._pieces[name])
            if self.engine.ranks.is_main:
                found[name] = whole.cpu().to(parameter.dtype).view(fragments.shape(parameter))
        return found

    def export_state(self, directory: Path) -> None:
        """Write into an existing directory that all ranks share. All ranks call it.

        Raises OSError, after all collectives, on a rank that could not write.
        """
        ranks = self.engine.ranks
        writer = ShardWriter(directory, ranks.rank)
        for i, (name, parameter) in enumerate(self._parameters.items()):
            whole = fragments.put_together(self.engine, parameter, self._pieces[name])
            if i % ranks.world_size == ranks.rank:
                writer.add(name, {KIND: whole.cpu()})
        writer.flush()
        files = {name: file for part in gather_objects(writer.files) for name, file in part.items()}
        if writer.failure is not None:
            raise OSError(f"{directory}: {writer.failure}")
        if ranks.is_main:
            (directory / INDEX).write_text(json.dumps(files, indent=1) + "\n", encoding="utf-8")

    def import_state(self, directory: Path) -> None:
        """Put back what export_state wrote, on whatever ranks and stage.

        Raises CheckpointError when it is of other parameters.
        """
        files = json.loads((directory / INDEX).read_text(encoding="utf-8"))
        if set(files) != set(self._pieces):
            wrong = sorted(set(files) ^ set(self._pieces))[0]
            raise CheckpointError(
                f"{directory}: averages other parameters than this model trains, {wrong} for one; use the model, lora"
                " and trainable settings of the run that wrote it"
            )
        opened = {file: safe_open(directory / file, framework="pt") for file in set(files.values())}
        for name, average in self._pieces.items():
            start, end = fragments.piece_range(self.engine, self._parameters[name])
            average.copy_(opened[files[name]].get_slice(f"{KIND}/{name}")[start:end])

    def _master(self, name: str) -> torch.Tensor:
        """This rank's piece of a master weight."""
        return fragments.read_piece(self.engine, self._parameters[name], MASTER)
