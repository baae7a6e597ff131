"""Opening a reward model: weights, adapter, tokenizer, template, label, moments."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from safetensors import safe_open
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from rlhf_cli.data.templates import Template, resolve_template
from rlhf_cli.data.tokenize import make_encoder
from rlhf_cli.errors import ModelError
from rlhf_cli.files import digest_tree
from rlhf_cli.models.load import check_complete, is_classifier, load_weights, read_config, resolve_dtype
from rlhf_cli.models.lora import load_adapter, plain_model
from rlhf_cli.models.reward import enable_scores, load_reward_model, reads_last_token
from rlhf_cli.models.tokenizer import load_tokenizer, tokenizer_digest
from rlhf_cli.ops.label_measures import measured
from rlhf_cli.reward.inputs import decoder_inputs, encoder_inputs
from rlhf_cli.reward.locate import Located, locate
from rlhf_cli.reward.model import Encode, ModelSource, Moments, forward_at_last, forward_with_mask
from rlhf_cli.schema import LoadedModelConfig, RewardSourceConfig


class Checked(NamedTuple):
    """A source whose weights are still to be loaded. labels: [] for one score; label: the chosen one's number."""

    found: Located
    architecture: PretrainedConfig
    tokenizer: Any
    template: Template
    labels: list[str]
    label: int | None
    moments: Moments | None
    about: str


Load = Callable[[RewardSourceConfig, Checked, torch.device], Any]


def check_model(config: RewardSourceConfig, key: str, normalize: bool) -> Checked:
    """All that can be found out about reward.sources[].path without loading weights. key: its place in the config.

    Raises ModelError: no such model, a policy, an unfinished run, an adapter without its base, a label the model does
    not have, or no moments to normalise with.
    """
    assert config.path is not None, "checked by the schema"
    found = locate(config.path, f"{key}.path")
    with _named(key):
        architecture = read_config(found.base or found.path, config.revision, config.trust_remote_code)
        if found.base is None:
            _check_classifier(architecture, found.path)
        tokenizer = _tokenizer(found, config)
        template = resolve_template(config.template, found.template, tokenizer)
        labels = _label_names(architecture, found)
    label = choose_label(config, labels, key)
    moments = find_moments(config, found, labels, label) if normalize else None
    kind = "adapter" if found.base else (architecture.architectures or [architecture.model_type])[0]
    about = _about(config, kind, template.name, labels, label)
    return Checked(found, architecture, tokenizer, template, labels, label, moments, about)


def open_model(
    config: RewardSourceConfig,
    name: str,
    key: str,
    device: torch.device,
    batch_size: int,
    normalize: bool,
    load: Load | None = None,
) -> ModelSource:
    """Load what reward.sources[].path names. key: the source's place in the config, for messages. load: makes the
    model, where somebody else keeps its weights; None = load_classifier, and on to the device.

    Raises ModelError as check_model does, and for weights that are pickled, incomplete, or no adapter of their base.
    """
    checked = check_model(config, key, normalize)
    tokenizer, template = checked.tokenizer, checked.template
    with _named(key):
        model = load(config, checked, device) if load else load_classifier(config, checked, device).to(device)
    model.eval()
    plain = plain_model(model)
    length = min(config.max_length, longest_input(plain, tokenizer))
    source = partial(
        ModelSource,
        name=name,
        weight=config.weight,
        about=checked.about,
        read=_reader(config, checked.label, plain.config.problem_type == "multi_label_classification"),
        moments=checked.moments,
        max_length=length,
        batch_size=batch_size,
        device=device,
    )
    # load_reward_model has looked at the base of an adapter, whose head is wrapped by now.
    if (checked.found.base is not None or reads_last_token(plain)) and _is_causal(plain):
        enable_scores(model)
        with _named(key):
            encoder = make_encoder(tokenizer)
        digest = tokenizer_digest(tokenizer)
        encode = _seen(config, partial(decoder_inputs, encoder, template, max_length=length, tokenizer_digest=digest))
        return source(encode=encode, forward=forward_at_last(model), pad_id=encoder.eos_id)
    encode = _seen(config, partial(encoder_inputs, tokenizer, template, max_length=length))
    # A pooling that looks for padding may take an end of the text for it.
    pad_id = None if tokenizer.pad_token_id == tokenizer.eos_token_id else tokenizer.pad_token_id
    for part in (plain.config, plain.config.get_text_config()):  # where the model's own pooling looks for it
        if pad_id is not None:
            part.pad_token_id = pad_id
        elif part.pad_token_id is None:
            part.pad_token_id = -1  # no token: transformers' pooling refuses batches without any
    return source(encode=encode, forward=forward_with_mask(model), pad_id=pad_id)


def load_classifier(config: RewardSourceConfig, checked: Checked, device: torch.device) -> Any:
    """A sequence classifier on CPU, adapters included."""
    found = checked.found
    settings = LoadedModelConfig(
        path=found.path, revision=config.revision, dtype=config.dtype, trust_remote_code=config.trust_remote_code
    )
    dtype = resolve_dtype(config.dtype, device)
    if found.base is not None:
        return _load_adapter(settings, checked, dtype)
    model, report = load_weights(checked.architecture, settings, found.path, dtype, device)
    check_complete(report["missing_keys"], found.path)
    return model


def _check_classifier(architecture: PretrainedConfig, path: str) -> None:
    if not is_classifier(architecture):
        kind = (architecture.architectures or [architecture.model_type])[0]
        raise ModelError(
            f"model.path: {path} is a {kind}, no reward model or classifier (...ForSequenceClassification);"
            " make one with `rlhf rm`"
        )


def _load_adapter(settings: LoadedModelConfig, checked: Checked, dtype: torch.dtype) -> PeftModel:
    found = checked.found
    assert found.base is not None
    if found.base_digest and Path(found.base).is_dir() and digest_tree(Path(found.base)) != found.base_digest:
        raise ModelError(
            f"model.path: the base {found.base} is no longer the one that the adapter {found.path} was trained on;"
            " put it back, or train again"
        )
    tokens = len(checked.tokenizer)
    base = load_reward_model(settings, found.base, dtype, checked.labels or None, seed=0, num_tokens=tokens)
    try:
        return load_adapter(base, found.path)
    except ModelError as error:
        raise ModelError(f"model.path: {error} ({found.base})") from error


def _about(config: RewardSourceConfig, kind: str, template: str, labels: list[str], label: int | None) -> str:
    what = "" if label is None else f", {config.measure} of {labels[label]}"
    seen = f"template {template}" if config.sees == "dialogue" else "sees the response alone"
    return f"{config.path} ({kind}{what}, {seen})"


def _seen(config: RewardSourceConfig, encode: Encode) -> Encode:
    """What of a text the model gets to see."""
    if config.sees == "dialogue":
        return encode
    return lambda texts: encode([replace(text, prompt=None, lead="", token_ids=None) for text in texts])


def longest_input(model: PreTrainedModel, tokenizer: Any) -> int:
    """Tokens that the model has positions for."""
    limits = [tokenizer.model_max_length]  # a huge number where nobody set it
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None:
        # RoBERTa and its kin count positions from behind the padding's.
        learnt = getattr(getattr(model.base_model, "embeddings", None), "position_embeddings", None)
        reserved = getattr(learnt, "padding_idx", None)
        limits.append(positions if reserved is None else positions - reserved - 1)
    return int(min(limits))


def choose_label(config: RewardSourceConfig, labels: list[str], key: str) -> int | None:
    """Which of the model's labels is meant; None for a model with one score (labels is empty)."""
    if not labels:
        if config.label is not None or config.measure != "log_prob":
            raise ModelError(
                f"{key}: {config.path} gives one score and has no labels; drop label and measure (type: model)"
            )
        return None
    listed = ", ".join(f"{i} {name}" for i, name in enumerate(labels))
    if config.label is None:
        raise ModelError(f"{key}.label: is required, since {config.path} has several labels; choose one of: {listed}")
    wanted = str(config.label)
    exact = [i for i, name in enumerate(labels) if name == wanted]
    alike = [i for i, name in enumerate(labels) if name.lower() == wanted.lower()]
    if exact or len(alike) == 1:
        return (exact or alike)[0]
    if wanted.isdecimal() and int(wanted) < len(labels):
        return int(wanted)
    raise ModelError(f"{key}.label: {config.path} has no label {wanted!r}; choose one of: {listed}")


def find_moments(config: RewardSourceConfig, found: Located, labels: list[str], label: int | None) -> Moments:
    """Mean and std of the score, as `rlhf rm` stored them. Raises ModelError when there are none."""
    if label is None:
        stored, what = found.info, "its scores"
    else:
        by_label = found.info.get("by_label") or {}
        stored = (by_label.get(labels[label]) or {}).get(config.measure) or {}
        what = f"the {config.measure} of its label {labels[label]}"
    if stored.get("mean") is None or stored.get("std") is None:
        raise ModelError(
            f"reward.normalize: {config.path} has no mean and std of {what}; `rlhf rm` stores them."
            " Set reward.normalize=false"
        )
    if stored["std"] <= 0:
        raise ModelError(f"reward.normalize: the std of {what} stored with {config.path} is {stored['std']}")
    return Moments(float(stored["mean"]), float(stored["std"]))


def _reader(config: RewardSourceConfig, label: int | None, multi_label: bool) -> Any:
    if label is None:
        return _single_score
    return partial(measured, label=label, measure=config.measure, multi_label=multi_label)


def _single_score(logits: Tensor) -> Tensor:
    """(N, 1) -> (N,)."""
    return logits[:, 0]


def _label_names(architecture: PretrainedConfig, found: Located) -> list[str]:
    """In order; empty for one score."""
    count = architecture.num_labels if found.base is None else head_rows(Path(found.path))
    if count == 1:
        return []
    stored = found.info.get("labels")
    if stored and len(stored) == count:
        return [str(name) for name in stored]
    return [str(architecture.id2label.get(i, f"LABEL_{i}")) for i in range(count)]


def head_rows(adapter: Path) -> int:
    """How many scores the head in an adapter gives."""
    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        names = [name for name in file.keys() if name.endswith(".score.weight")]  # noqa: SIM118  # no dict
        if not names:
            raise ModelError(f"model.path: the adapter {adapter} holds no score head; its scores would be random")
        return int(file.get_slice(names[0]).get_shape()[0])


def _tokenizer(found: Located, config: RewardSourceConfig) -> Any:
    """An adapter may come without one, then it is the base's."""
    try:
        return load_tokenizer(found.path, config.revision, config.trust_remote_code)
    except ModelError:
        if found.base is None:
            raise
        return load_tokenizer(found.base, None, config.trust_remote_code)


def _is_causal(model: PreTrainedModel) -> bool:
    settings = model.config.get_text_config()
    return getattr(settings, "is_causal", True) and not getattr(settings, "use_bidirectional_attention", False)


@contextmanager
def _named(key: str) -> Iterator[None]:
    """The layers below speak of the options of a model that is trained."""
    try:
        yield
    except ModelError as error:
        text = str(error)
        for theirs, ours in (
            ("model.path", "path"),
            ("model.tokenizer.path", "path"),
            ("model.trust_remote_code", "trust_remote_code"),
            ("data.template", "template"),
        ):
            text = text.replace(theirs, f"{key}.{ours}")
        raise ModelError(text) from error
