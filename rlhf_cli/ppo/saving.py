"""What a PPO run hands over: model/ (the policy), critic/ beside it, last_policy/ where model/ is not the last one."""

from __future__ import annotations

from collections.abc import Mapping
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
from rlhf_cli.runtime.engine import Engine, gathered_state_dict

MODEL, CRITIC, LAST = "model", "critic", "last_policy"


class Written(NamedTuple):
    """How a trained model is written: config, tokenizer and template, what it started from, and whether it is an
    adapter of that."""

    config: PretrainedConfig
    text: Text
    source: str
    is_adapter: bool


def save_policy(engine: Engine, written: Written, run_dir: Path, instead: Mapping[str, Tensor]) -> str | None:
    """instead: trained weights by name that are the result; the last ones then go to last_policy/. On rank 0, which
    writes; all ranks call it. Returns why it could not be written, or None; other ranks wait for whoever raises."""
    weights = gathered_state_dict(engine, only_trainable=written.is_adapter)
    if not engine.ranks.is_main:
        return None
    failure = None
    if instead:
        failure = _write(run_dir / LAST, weights, engine.module, written)
        for name, value in instead.items():
            weights[name].copy_(value)  # in place: names that share a tensor (tied embeddings) change together
    return failure or _write(run_dir / MODEL, weights, engine.module, written)


def save_critic(engine: Engine, written: Written, run_dir: Path) -> str | None:
    """As save_policy."""
    weights = gathered_state_dict(engine, only_trainable=written.is_adapter)
    return _write(run_dir / CRITIC, weights, engine.module, written) if engine.ranks.is_main else None


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
