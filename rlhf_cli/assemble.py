"""From a config to what a loop trains: tokenizer and template, token rows, model, engine as it was left."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from rlhf_cli.data.dataset import Prepared, prepare
from rlhf_cli.data.stream import train_texts
from rlhf_cli.data.templates import TEMPLATES, Template, resolve_template
from rlhf_cli.errors import CheckpointError, ModelError
from rlhf_cli.files import check_space, directory_aside
from rlhf_cli.loop import LoopState
from rlhf_cli.models.head import enable_loss
from rlhf_cli.models.load import enable_gradient_checkpointing, load_config, load_policy
from rlhf_cli.models.lora import add_lora, plain_model, save_adapter
from rlhf_cli.models.save import save_model
from rlhf_cli.models.scratch import make_config, new_model
from rlhf_cli.models.tokenizer import add_extra_tokens, ensure_pad, load_tokenizer, tokenizer_digest, train_tokenizer
from rlhf_cli.models.trainable import apply_trainable, count_parameters, find_blocks, lisa_apply, lisa_draw
from rlhf_cli.run import Checkpoints, ExtraWriter, Found, Run
from rlhf_cli.runtime.distributed import barrier, local_first
from rlhf_cli.runtime.engine import Engine, gathered_state_dict, make_engine, param_groups, sharded_loading
from rlhf_cli.runtime.engine_state import hold_state, restore_state
from rlhf_cli.runtime.manifest import model_dir
from rlhf_cli.schema import SftConfig

WEIGHTS = "weights"  # a checkpoint's directory of whole weights


class Text(NamedTuple):
    """What turns text into tokens. new_tokens: added to a pretrained tokenizer, and to be learnt."""

    tokenizer: Any
    template: Template
    new_tokens: int


# --- tokenizer and data


def load_text(config: SftConfig, run_dir: Path, run: Run | None) -> Text:
    """The tokenizer, trained or loaded, and the template. A trained one is kept in the run directory."""
    settings = config.model.tokenizer
    stored = None
    if settings.train != "none":
        tokenizer = _trained_tokenizer(config, run_dir / "tokenizer", run)
    else:
        source = settings.path or config.model.path
        assert source is not None, "checked by the schema"
        path, manifest = model_dir(source)
        stored = manifest.get("template")
        revision = None if settings.path else config.model.revision  # it names a state of model.path only
        tokenizer = load_tokenizer(path, revision, config.model.trust_remote_code)
    ensure_pad(tokenizer)
    new_tokens = add_extra_tokens(tokenizer, settings.extra_tokens)
    return Text(tokenizer, resolve_template(config.data.template, stored, tokenizer), new_tokens)


def _trained_tokenizer(config: SftConfig, folder: Path, run: Run | None) -> Any:
    settings = config.model.tokenizer
    assert settings.train != "none"
    template = TEMPLATES.get(config.data.template, TEMPLATES["none"])  # a new tokenizer has no template of its own
    if (run is None or run.ranks.is_main) and not folder.is_dir():
        trained = train_tokenizer(settings.train, train_texts(config.data, template), settings.vocab_size)
        with directory_aside(folder) as aside:
            trained.save_pretrained(aside)
    if run is not None:
        barrier()  # the others wait for the files
    return load_tokenizer(folder)


def describe_template(template: Template, data: Prepared) -> str:
    """One line for the user; a dialogue without a template is hardly ever meant."""
    dialogues = {f for info in data.info for f in info["formats"]} - {"text_only"}
    line = f"template: {template.name}"
    if template.name == "none" and dialogues:
        line += (
            "; prompt and response stand without anything between them (data.template=hh, chatml or alpaca marks them)"
        )
    return line


def load_data(config: SftConfig, text: Text, run: Run) -> Prepared:
    """Token rows, from the cache or made by the first rank of each machine."""
    with local_first(run.ranks):
        report = run.say if run.ranks.is_main else print
        return prepare(config.data, text.tokenizer, tokenizer_digest(text.tokenizer), text.template, report)


# --- model and engine


def model_config(config: SftConfig, text: Text) -> Any:
    """The transformers config of the model to be trained, without its weights."""
    settings = config.model
    if settings.init == "scratch":
        return make_config(settings.arch, text.tokenizer, config.data.max_length)
    found = load_config(model_dir(str(settings.path))[0], settings.revision, settings.trust_remote_code)
    found.vocab_size = max(found.vocab_size, len(text.tokenizer))
    return found


def build_model(config: SftConfig, text: Text, dtype: torch.dtype, run: Run, found: Found | None) -> nn.Module:
    """The model with its adapters and with requires_grad set, ready for the engine.

    found: the checkpoint to continue from. It has whole weights where frozen parameters were trained before (LISA).
    """
    settings = config.model
    if found is not None and (found.path / WEIGHTS).is_dir():
        with sharded_loading(config.deepspeed, dtype):
            model: nn.Module = load_policy(settings, found.path / WEIGHTS / "model", dtype, run.ranks.device)
    elif settings.init == "scratch":
        attention = None if settings.attn_implementation == "auto" else settings.attn_implementation
        model = new_model(model_config(config, text), dtype, config.train.seed, attention)
    else:
        assert settings.path is not None, "checked by the schema"
        path, _ = model_dir(settings.path)
        with sharded_loading(config.deepspeed, dtype):
            model = load_policy(settings, path, dtype, run.ranks.device, len(text.tokenizer))
    check_length(plain_model(model).config, config.data.max_length)
    if settings.gradient_checkpointing:
        enable_gradient_checkpointing(plain_model(model))
    if config.lora.enabled:
        model = add_lora(plain_model(model), config.lora, "CAUSAL_LM", text.new_tokens > 0, config.train.seed)
    else:
        apply_trainable(plain_model(model), settings.trainable, config.train.seed)
    enable_loss(model)
    trainable, total = count_parameters(model)
    run.say(
        f"model: {trainable:,} of {total:,} parameters are trained ({trainable / total:.2%}), {dtype}".replace(
            "torch.", ""
        )
    )
    return model


def check_length(architecture: Any, max_length: int) -> None:
    """Raise ModelError when sequences are longer than the model has positions."""
    positions = getattr(architecture.get_text_config(), "max_position_embeddings", None)
    if positions is not None and max_length > positions:
        raise ModelError(f"data.max_length: {max_length} is more than the {positions} positions of the model; lower it")


def make_or_resume(
    config: SftConfig,
    model: nn.Module,
    dtype: torch.dtype,
    checkpoints: Checkpoints,
    run: Run,
    found: Found | None,
    data_digest: str,
) -> tuple[Engine, LoopState]:
    """The engine, new or as the newest checkpoint left it, and the loop state that goes with it."""
    state = LoopState(data_digest=data_digest) if found is None else found.state
    if state.data_digest != data_digest:
        raise CheckpointError(
            f"the data has changed since {run.run_dir} was started; put it back, or start in another run_dir"
        )
    if found is not None and config.model.trainable.mode == "lisa":
        lisa_apply(plain_model(model), drawn_layers(config, model, max(0, state.step - 1)))
    groups = checkpoints.groups(model, found.path if found else None)
    engine = make_engine(model, groups, config.optim, config.deepspeed, dtype, run.ranks)
    engine.train()
    if found is not None:
        checkpoints.load(found.path, engine)
    return engine, state


def whole_weights(config: SftConfig, model: nn.Module, text: Text) -> ExtraWriter:
    """All weights for a checkpoint, in HF layout, so that a resumed run loads them as any model."""

    def write(engine: Engine, directory: Path) -> None:
        weights = gathered_state_dict(engine)
        if weights:
            write_model(config, engine.module, weights, text, directory / "model")

    return ExtraWriter(write, 4 * count_parameters(model).total)


def write_model(
    config: SftConfig, model: nn.Module, weights: dict[str, torch.Tensor], text: Text, directory: Path
) -> None:
    """The final model in HF layout, or the adapter in PEFT's."""
    check_space(directory.parent, sum(t.nbytes for t in weights.values()), "the final model")
    jinja = None if text.template.name in ("none", "tokenizer") else text.template.jinja
    if config.lora.enabled:
        source = model_dir(str(config.model.path))[0]
        # An adapter is found from anywhere; a hub id stays one.
        base = str(Path(source).resolve()) if Path(source).is_dir() else source
        save_adapter(model, weights, directory, text.tokenizer, base, jinja)
        return
    plain = plain_model(model)
    stop = text.template.stop[0] if text.template.stop else None
    save_model(plain.config, weights, directory, text.tokenizer, jinja, plain.generation_config, stop)


def drawn_layers(config: SftConfig, model: nn.Module, step: int) -> list[int]:
    """LISA's blocks for a step."""
    settings = config.model.trainable
    blocks = len(find_blocks(plain_model(model)))
    return lisa_draw(blocks, settings.lisa_layers, config.train.seed, step // settings.lisa_interval)


def redraw_lisa(engine: Engine, step: int, config: SftConfig, dtype: torch.dtype, run: Run) -> Engine:
    """Another engine when LISA draws other blocks at this step; flags alone would leave the old blocks moving."""
    settings = config.model.trainable
    if settings.mode != "lisa" or step == 0 or step % settings.lisa_interval:
        return engine
    model = engine.module
    layers = drawn_layers(config, model, step)
    if layers == drawn_layers(config, model, step - 1):
        return engine
    held = hold_state(engine)
    engine.destroy()
    lisa_apply(plain_model(model), layers)
    groups = param_groups(model, config.optim.weight_decay, held.steps)
    engine = make_engine(model, groups, config.optim, config.deepspeed, dtype, run.ranks)
    restore_state(engine, held)
    engine.train()
    run.say(f"step {step}: LISA trains blocks {layers}")
    return engine
