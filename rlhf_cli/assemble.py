"""From a config to what a loop trains: tokenizer and template, token rows, model, engine as it was left."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from torch import nn

from rlhf_cli.data.comparison_rows import ComparisonRows
from rlhf_cli.data.comparisons import PreparedComparisons
from rlhf_cli.data.dataset import Prepared
from rlhf_cli.data.seen import find_seen, save_row_digests
from rlhf_cli.data.templates import TEMPLATES, Template, resolve_template
from rlhf_cli.data.token_rows import TokenRows
from rlhf_cli.errors import CheckpointError, ModelError
from rlhf_cli.files import check_space, directory_aside
from rlhf_cli.loop import LoopState
from rlhf_cli.models.head import enable_loss
from rlhf_cli.models.load import enable_gradient_checkpointing, load_config, load_policy
from rlhf_cli.models.lora import TaskType, add_lora, plain_model, save_adapter
from rlhf_cli.models.packing import check_packing
from rlhf_cli.models.reward import enable_scores, load_reward_config, load_reward_model, new_reward_model, reward_config
from rlhf_cli.models.save import save_model
from rlhf_cli.models.scratch import make_config, new_model
from rlhf_cli.models.tokenizer import add_extra_tokens, ensure_pad, load_tokenizer, tokenizer_digest, train_tokenizer
from rlhf_cli.models.trainable import apply_trainable, count_parameters, find_blocks, lisa_apply, lisa_draw
from rlhf_cli.run import Checkpoints, ExtraWriter, Found, Run
from rlhf_cli.runtime.distributed import barrier, local_first
from rlhf_cli.runtime.engine import Engine, gathered_state_dict, make_engine, param_groups, sharded_loading
from rlhf_cli.runtime.engine_state import hold_state, restore_state
from rlhf_cli.runtime.manifest import model_dir
from rlhf_cli.schema import LoadedModelConfig, TrainedConfig
from rlhf_cli.schema.data import TemplateName, TextDataConfig, TokenSourceConfig

WEIGHTS = "weights"  # a checkpoint's directory of whole weights

PreparedT = TypeVar("PreparedT", Prepared, PreparedComparisons)


@dataclass(frozen=True)
class Reading(Generic[PreparedT]):
    """How a stage reads its data. prepare: as data.dataset.prepare; texts: as data.stream.train_texts, to train a
    tokenizer on."""

    prepare: Callable[[Any, Any, str, Template, Callable[[str], None]], PreparedT]
    texts: Callable[[Any, Template], Iterator[str]]


class Task(NamedTuple):
    """What a model is trained to be. labels: of a classifier; None = one score (a reward model of comparisons)."""

    name: Literal["causal_lm", "sequence_classification"] = "causal_lm"
    labels: tuple[str, ...] | None = None

    @property
    def is_reward(self) -> bool:
        """Whether the model scores texts instead of writing them."""
        return self.name == "sequence_classification"

    @property
    def starts_from(self) -> tuple[str, ...]:
        """Kinds of run directories whose model this one can start from."""
        return ("policy", "reward") if self.is_reward else ("policy",)


class Text(NamedTuple):
    """What turns text into tokens. new_tokens: added to a pretrained tokenizer, and to be learnt."""

    tokenizer: Any
    template: Template
    new_tokens: int


# --- tokenizer and data


def load_text(config: TrainedConfig, run_dir: Path, run: Run | None, reading: Reading[Any]) -> Text:
    """The tokenizer, trained (on what `reading` reads) or loaded, and the template. A trained one is kept in the run
    directory."""
    settings = config.model.tokenizer
    if settings.train == "none":
        return pretrained_text(config.model, config.data.template, settings.path, settings.extra_tokens)
    tokenizer = _trained_tokenizer(config, run_dir / "tokenizer", run, reading)
    ensure_pad(tokenizer)
    new_tokens = add_extra_tokens(tokenizer, settings.extra_tokens)
    return Text(tokenizer, resolve_template(config.data.template, None, tokenizer), new_tokens)


def pretrained_text(
    model: LoadedModelConfig, template: TemplateName, path: str | None = None, extra_tokens: Sequence[str] = ()
) -> Text:
    """The tokenizer and template that come with a model. path: a tokenizer from elsewhere; extra_tokens: to add."""
    source = path or model.path
    assert source is not None, "checked by the schema"
    folder, manifest = model_dir(source, ("policy", "reward"))
    revision = None if path else model.revision  # it names a state of model.path only
    tokenizer = load_tokenizer(folder, revision, model.trust_remote_code)
    ensure_pad(tokenizer)
    new_tokens = add_extra_tokens(tokenizer, list(extra_tokens))
    return Text(tokenizer, resolve_template(template, manifest.get("template"), tokenizer), new_tokens)


def _trained_tokenizer(config: TrainedConfig, folder: Path, run: Run | None, reading: Reading[Any]) -> Any:
    settings = config.model.tokenizer
    assert settings.train != "none"
    template = TEMPLATES.get(config.data.template, TEMPLATES["none"])  # a new tokenizer has no template of its own
    if (run is None or run.ranks.is_main) and not folder.is_dir():
        trained = train_tokenizer(settings.train, reading.texts(config.data, template), settings.vocab_size)
        with directory_aside(folder) as aside:
            trained.save_pretrained(aside)
    if run is not None:
        barrier()  # the others wait for the files
    return load_tokenizer(folder)


def describe_template(template: Template, data: Prepared | PreparedComparisons) -> str:
    """One line for the user; a dialogue without a template is hardly ever meant."""
    if isinstance(data, Prepared):
        dialogues = bool({f for info in data.info for f in info["formats"]} - {"text_only"})
    else:
        dialogues = data.templated
    line = f"template: {template.name}"
    if template.name == "none" and dialogues:
        line += (
            "; prompt and response stand without anything between them (data.template=hh, chatml or alpaca marks them)"
        )
    return line


def load_data(config: TrainedConfig, text: Text, run: Run, reading: Reading[PreparedT]) -> PreparedT:
    """Token rows, from the cache or made by the first rank of each machine.

    What is trained on is kept in the run directory, for later stages to know; what an earlier stage trained on and
    this one evaluates on is counted and told.
    """
    with local_first(run.ranks):
        report = run.say if run.ranks.is_main else print
        data = reading.prepare(config.data, text.tokenizer, tokenizer_digest(text.tokenizer), text.template, report)
    run.update_manifest(template=text.template.name, data=data.info)
    run.say(describe_template(text.template, data))
    if run.ranks.is_main:
        save_row_digests(run.run_dir, _digests(data.train)[0])
        if data.eval is not None:
            _tell_seen(run, *_digests(data.eval))
    return data


def _digests(rows: TokenRows | ComparisonRows) -> tuple[np.ndarray, np.ndarray]:
    """(digest (N,) of every text, the row (N,) that it belongs to)."""
    if isinstance(rows, TokenRows):
        return rows.row_digests, rows.row_digests  # windows of one row share its digest
    return rows.sequence_digests, rows.owners


def _tell_seen(run: Run, digests: np.ndarray, owners: np.ndarray) -> None:
    """Count and tell what an earlier stage, or this one, trains on of the evaluation rows."""
    found = find_seen(run.run_dir, digests, owners)
    run.update_manifest(eval_rows_seen=[seen._asdict() for seen in found])
    for seen in found:
        run.say(seen.warning(len(np.unique(owners)), own=seen.run_dir == str(run.run_dir)))


# --- model and engine


def model_config(config: TrainedConfig, text: Text, task: Task) -> Any:
    """The transformers config of the model to be trained, without its weights."""
    settings = config.model
    if settings.init == "scratch":
        found = make_config(settings.arch, text.tokenizer, config.data.max_length)
    else:
        path, _ = model_dir(str(settings.path), task.starts_from)
        read = load_reward_config if task.is_reward else load_config
        found = read(path, settings.revision, settings.trust_remote_code)
        found.vocab_size = max(found.vocab_size, len(text.tokenizer))
    return reward_config(found, task.labels) if task.is_reward else found


def build_model(
    config: TrainedConfig, text: Text, task: Task, dtype: torch.dtype, run: Run, found: Found | None
) -> nn.Module:
    """The model with its adapters and with requires_grad set, ready for the engine.

    found: the checkpoint to continue from. It has whole weights where frozen parameters were trained before (LISA).
    """
    settings = config.model
    if settings.init == "scratch" and not _has_weights(found):
        model = _new_model(config, text, task, dtype)
    else:
        model = _load_model(config, text, task, dtype, run, found)
    check_rows(plain_model(model).config, config.data)
    if settings.gradient_checkpointing:
        enable_gradient_checkpointing(plain_model(model))
    if config.lora.enabled:
        kind: TaskType = "SEQ_CLS" if task.is_reward else "CAUSAL_LM"
        model = add_lora(plain_model(model), config.lora, kind, text.new_tokens > 0, config.train.seed)
    else:
        apply_trainable(plain_model(model), settings.trainable, config.train.seed)
    if task.is_reward:
        enable_scores(model)
    else:
        enable_loss(model)
    trainable, total = count_parameters(model)
    run.say(
        f"model: {trainable:,} of {total:,} parameters are trained ({trainable / total:.2%}), {dtype}".replace(
            "torch.", ""
        )
    )
    return model


def _has_weights(found: Found | None) -> bool:
    return found is not None and (found.path / WEIGHTS).is_dir()


def _new_model(config: TrainedConfig, text: Text, task: Task, dtype: torch.dtype) -> nn.Module:
    attention = config.model.attn_implementation
    kernel = None if attention == "auto" else attention
    architecture = model_config(config, text, task)
    if task.is_reward:
        return new_reward_model(architecture, task.labels, dtype, config.train.seed, kernel)
    return new_model(architecture, dtype, config.train.seed, kernel)


def _load_model(
    config: TrainedConfig, text: Text, task: Task, dtype: torch.dtype, run: Run, found: Found | None
) -> nn.Module:
    settings, seed, device = config.model, config.train.seed, run.ranks.device
    if found is not None and _has_weights(found):
        path, num_tokens = str(found.path / WEIGHTS / "model"), None
    else:
        assert settings.path is not None, "checked by the schema"
        path, num_tokens = model_dir(settings.path, task.starts_from)[0], len(text.tokenizer)
    with sharded_loading(config.deepspeed, dtype):
        if task.is_reward:
            return load_reward_model(settings, path, dtype, task.labels, seed, device, num_tokens)
        return load_policy(settings, path, dtype, device, num_tokens)


def check_rows(architecture: Any, data: TokenSourceConfig) -> None:
    """Raise ModelError when sequences are longer than the model has positions, or are to be packed and the model would
    not keep their rows apart."""
    positions, longest = getattr(architecture.get_text_config(), "max_position_embeddings", None), data.max_length
    if positions is not None and longest > positions:
        raise ModelError(f"data.max_length: {longest} is more than the {positions} positions of the model; lower it")
    if isinstance(data, TextDataConfig) and data.packing:
        check_packing(architecture, "data.packing")


def make_or_resume(
    config: TrainedConfig,
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


def whole_weights(config: TrainedConfig, model: nn.Module, text: Text, task: Task) -> ExtraWriter:
    """All weights for a checkpoint, in HF layout, so that a resumed run loads them as any model."""

    def write(engine: Engine, directory: Path) -> None:
        weights = gathered_state_dict(engine)
        if weights:
            write_model(config, engine.module, weights, text, task, directory / "model")

    return ExtraWriter(write, 4 * count_parameters(model).total)


def write_model(
    config: TrainedConfig,
    model: nn.Module,
    weights: dict[str, torch.Tensor],
    text: Text,
    task: Task,
    directory: Path,
    reward: dict[str, Any] | None = None,
) -> None:
    """The final model in HF layout, or the adapter in PEFT's. reward: what is known of the scores (see manifest)."""
    check_space(directory.parent, sum(t.nbytes for t in weights.values()), "the final model")
    jinja = saved_template(text)
    if config.lora.enabled:
        base = base_reference(model_dir(str(config.model.path), task.starts_from)[0])
        save_adapter(model, weights, directory, text.tokenizer, base, jinja)
        return
    plain = plain_model(model)
    stop = text.template.stop[0] if text.template.stop else None
    generation = None if task.is_reward else plain.generation_config
    save_model(plain.config, weights, directory, text.tokenizer, jinja, generation, stop, reward=reward)


def saved_template(text: Text) -> str | None:
    """The chat template that a saved tokenizer gets, so that it writes dialogues as they were trained; also if that
    means without its own template. None: the one that it has."""
    unchanged = text.template.name == "tokenizer" or (text.template.name == "none" and not text.tokenizer.chat_template)
    return None if unchanged else text.template.jinja


def base_reference(path: str) -> str:
    """How an adapter names its base, so that it is found from anywhere; a hub id stays one."""
    return str(Path(path).resolve()) if Path(path).is_dir() else path


def drawn_layers(config: TrainedConfig, model: nn.Module, step: int) -> list[int]:
    """LISA's blocks for a step."""
    settings = config.model.trainable
    blocks = len(find_blocks(plain_model(model)))
    return lisa_draw(blocks, settings.lisa_layers, config.train.seed, step // settings.lisa_interval)


def redraw_lisa(engine: Engine, step: int, config: TrainedConfig, dtype: torch.dtype, run: Run) -> Engine:
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
