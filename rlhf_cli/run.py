"""What every trained stage does around its loop: join the ranks, show, keep the manifest, save, resume, end."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file

from rlhf_cli.errors import CheckpointError
from rlhf_cli.files import check_space, directory_aside
from rlhf_cli.loop import LoopState
from rlhf_cli.rundir import update_manifest
from rlhf_cli.runtime import checkpoint, engine_state, manifest
from rlhf_cli.runtime.distributed import Ranks, barrier, broadcast_object
from rlhf_cli.runtime.engine import Engine, gathered_state_dict, param_groups
from rlhf_cli.runtime.process import RankProcess
from rlhf_cli.runtime.progress import Display
from rlhf_cli.runtime.seed import seed_everything
from rlhf_cli.schema import to_dict

OPTIMIZER = "optimizer"  # its directory in a checkpoint


@dataclass
class Run:
    """A stage at work in this rank. display: None on other ranks than 0."""

    config: Any
    run_dir: Path
    ranks: Ranks
    process: RankProcess
    display: Display | None

    def say(self, text: str) -> None:
        """A line for the user, from rank 0."""
        if self.display is not None:
            self.display.say(text)

    def phase(self, text: str) -> None:
        """What goes on inside a long step, from rank 0."""
        if self.display is not None:
            self.display.phase(text)

    def update_manifest(self, **changes: Any) -> None:
        """Change manifest.json, from rank 0."""
        if self.ranks.is_main:
            update_manifest(self.run_dir, **changes)


def open_run(config: Any, run_dir: Path, process: RankProcess, ranks: Ranks) -> Run:
    """Seed this rank and start the manifest. config: of any stage."""
    seed_everything(config.train.seed if hasattr(config, "train") else 0, ranks.rank)
    display = Display(process.terminal, config.logging.progress, config.stage) if ranks.is_main else None
    if ranks.is_main:
        manifest.begin(run_dir, config.stage, to_dict(config), ranks.world_size)
    return Run(config, run_dir, ranks, process, display)


def close_run(run: Run, **changes: Any) -> None:
    """Take the bar away and write the last word into the manifest, when every rank has come this far."""
    if run.display is not None:
        run.display.stop()
    barrier()
    run.update_manifest(**changes)


class Found(NamedTuple):
    """A checkpoint to continue from, and the loop state in it."""

    path: Path
    state: LoopState


class ExtraWriter(NamedTuple):
    """Something a checkpoint holds beside the optimizer state. write(engine, directory): called on all ranks."""

    write: Callable[[Engine, Path], None]
    num_bytes: int


class Checkpoints:
    """Resumable state of a run: optimizer with master weights, loop state, every rank's RNG, the stage's extras."""

    def __init__(self, run: Run, extras: dict[str, ExtraWriter]):
        self.run, self.extras = run, extras

    def save(self, engine: Engine, state: LoopState) -> None:
        """Write checkpoints/step_...; all ranks call it."""
        run = self.run
        writers: dict[str, checkpoint.Writer] = {OPTIMIZER: lambda d: engine_state.export_state(engine, d)}
        needed = engine_state.state_bytes(engine)
        for name, extra in self.extras.items():
            writers[name] = partial(extra.write, engine)
            needed += extra.num_bytes
        keep = run.config.train.keep_checkpoints
        checkpoint.save(run.run_dir, state.step, run.ranks, writers, state.as_dict(), keep, needed)
        if run.ranks.is_main:
            prune_best(run.run_dir)

    def newest(self) -> Found | None:
        """The newest undamaged checkpoint and its loop state, the same answer on every rank."""
        run = self.run
        path = newest_checkpoint(run)
        if path is None:
            return None
        state = LoopState(**saved_loop(path))
        if run.config.train.early_stopping.patience:
            check_best(run.run_dir, path, state.best_step)
        return Found(path, state)

    def load(self, path: Path, engine: Engine) -> None:
        """Put the optimizer state and this rank's RNG back."""
        readers = {OPTIMIZER: lambda d: engine_state.import_state(engine, d)}
        loaded = checkpoint.load(path, readers, self.run.ranks, self.run.config.train.seed)
        again = "" if loaded.rng_restored else "; on another number of ranks, so dropout is drawn anew"
        self.run.say(f"resumed from {path.name}{again}")

    def groups(self, model: torch.nn.Module, path: Path | None) -> list[dict[str, Any]]:
        """Parameter groups for a new engine, or for one that continues from a checkpoint."""
        steps = engine_state.saved_steps(path / OPTIMIZER) if path else None
        return param_groups(model, self.run.config.optim.weight_decay, steps)


def newest_checkpoint(run: Run) -> Path | None:
    """The newest undamaged one, the same answer on every rank."""
    return broadcast_object(checkpoint.newest_valid(run.run_dir, run.say) if run.ranks.is_main else None)


def check_best(run_dir: Path, found: Path, step: int | None) -> None:
    """Raise CheckpointError when the best weights that a checkpoint speaks of are gone."""
    best = None if step is None else best_dir(run_dir, step)
    if best is not None and not best.is_dir():
        raise CheckpointError(
            f"{found} speaks of the best weights so far in {best}, which is missing; put it back, or remove {found}"
        )


def best_dir(run_dir: Path, step: int) -> Path:
    """Where the weights of the best evaluation are kept while the run goes on."""
    return run_dir / "checkpoints" / f"best_{step:08d}"


def save_best(run: Run, engine: Engine, step: int, only_trainable: bool) -> None:
    """Keep the weights of this step aside. Older bests go when no checkpoint speaks of them any more."""
    weights = gathered_state_dict(engine, only_trainable=only_trainable)
    if run.ranks.is_main:
        check_space(run.run_dir, sum(t.nbytes for t in weights.values()), "the best weights so far")
        with directory_aside(best_dir(run.run_dir, step)) as aside:
            save_file(_untied(weights), aside / "weights.safetensors")
    barrier()


def load_best(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    """What save_best kept."""
    return load_file(best_dir(run_dir, step) / "weights.safetensors")


def prune_best(run_dir: Path, newest: int | None = None) -> None:
    """Remove best weights that no checkpoint speaks of, and half-written ones. newest: those of this step stay, too.

    A finished run keeps those that its checkpoints need: it may be killed before it is known to be finished, or grow.
    """
    root = run_dir / checkpoint.DIRECTORY
    needed = set() if newest is None else {best_dir(run_dir, newest)}
    for path in root.glob("step_*"):
        with suppress(FileNotFoundError, ValueError):  # a damaged checkpoint needs nothing: no run goes on from it
            needed.add(best_dir(run_dir, saved_loop(path)["best_step"] or 0))
    for path in [*root.glob("best_*"), *root.glob(".best_*")]:
        if path not in needed:
            shutil.rmtree(path)


def saved_loop(path: Path) -> dict[str, Any]:
    """The loop state in a checkpoint."""
    return json.loads((path / checkpoint.LOOP_STATE).read_text(encoding="utf-8"))["loop"]


def _untied(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Each tensor once: names that share one (tied embeddings) come back through the model's own tying."""
    seen: set[int] = set()
    once = {}
    for name, tensor in weights.items():
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            once[name] = tensor
    return once
