"""What an aligning run hands over: model/ (the policy), and beside it what else it leaves, such as last_policy/ where
model/ is not the last one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PretrainedConfig

from rlhf_cli.assemble import Text, base_reference, saved_template
from rlhf_cli.errors import RunFailed
from rlhf_cli.files import check_space
from rlhf_cli.models.load import is_classifier
from rlhf_cli.models.lora import plain_model, save_adapter
from rlhf_cli.models.save import save_model
from rlhf_cli.runtime.distributed import gather_objects
from rlhf_cli.runtime.engine import Engine, gathered_state_dict

MODEL, LAST, BEST = "model", "last_policy", "best_policy"


class Written(NamedTuple):
    """How a trained model is written: config, tokenizer and template, what it started from, and whether it is an
    adapter of that."""

    config: PretrainedConfig
    text: Text
    source: str
    is_adapter: bool

    @property
    def output(self) -> dict[str, str]:
        """The manifest's entry for a policy."""
        kind = ("adapter", "peft") if self.is_adapter else ("policy", "hf")
        return {"kind": kind[0], "task": "causal_lm", "path": MODEL, "format": kind[1]}


def save_policy(
    engine: Engine, written: Written, run_dir: Path, results: Mapping[str, Mapping[str, Tensor] | None]
) -> str | None:
    """results: directory in the run -> trained weights by name, or None for the engine's own, which come first. On
    rank 0, which writes; all ranks call it. Returns why something could not be written, or None."""
    weights = gathered_state_dict(engine, only_trainable=written.is_adapter)
    if not engine.ranks.is_main:
        return None
    for name, instead in results.items():
        for parameter, value in (instead or {}).items():
            weights[parameter].copy_(value)  # in place: names that share a tensor (tied embeddings) change together
        failure = _write(run_dir / name, weights, engine.module, written)
        if failure is not None:
            return failure
    return None


def save_classifier(engine: Engine, written: Written, directory: Path) -> str | None:
    """As save_policy, of one result."""
    weights = gathered_state_dict(engine, only_trainable=written.is_adapter)
    return _write(directory, weights, engine.module, written) if engine.ranks.is_main else None


def raise_failures(failures: Sequence[str | None]) -> None:
    """Raise RunFailed on all ranks if any of them could not write. All ranks call it."""
    for failure in (text for part in gather_objects(list(failures)) for text in part):
        if failure is not None:
            raise RunFailed(failure)


def _write(directory: Path, weights: dict[str, Tensor], model: nn.Module, written: Written) -> str | None:
    try:
        _write_or_raise(directory, weights, model, written)
    except (OSError, SafetensorError, RunFailed) as error:
        return f"{directory} could not be written: {error}"
    return None


def _write_or_raise(directory: Path, weights: dict[str, Tensor], model: nn.Module, written: Written) -> None:
    config, text, source, is_adapter = written
    check_space(directory.parent, sum(t.nbytes for t in weights.values()), f"{directory.name}/")
    jinja = saved_template(text)
    if is_adapter:
        save_adapter(model, weights, directory, text.tokenizer, base_reference(source), jinja)
        return
    stop, generation = None, None
    if not is_classifier(config):
        generation = plain_model(model).generation_config
        stop = text.template.stop[0] if text.template.stop else None
    save_model(config, weights, directory, text.tokenizer, jinja, generation, stop)
