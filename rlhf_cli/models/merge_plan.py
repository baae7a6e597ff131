"""What a merged model consists of: for each tensor where it starts, what is added, its final shape and precision.

Everything about base and adapter that does not fit together is found here, before anything is written.
"""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from rlhf_cli.errors import ModelError
from rlhf_cli.models.adapter import Adapter, Task
from rlhf_cli.models.load import DTYPES, auto_class, is_classifier
from rlhf_cli.models.merge_base import Base
from rlhf_cli.models.merge_changes import Case, Change, changes_of, settle_tied
from rlhf_cli.models.merge_names import NameMap, Resolver
from rlhf_cli.models.reward import AUTO, reward_config
from rlhf_cli.models.tensor_files import StoredTensor, in_memory

HEADS = ("score.weight", "classifier.weight", "classifier.out_proj.weight")  # by model family


class Target(NamedTuple):
    """One tensor of the merged model. name: in its files; start: what it begins as, whose missing rows are grown."""

    name: str
    start: StoredTensor
    change: Change | None
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class MergePlan:
    """The merged model. rows: of its embeddings; untied: embeddings and head were one in the base and no longer are;
    dropped: the base's tensors that have no place (a causal LM's head under a reward model); through_transformers: the
    base is whole in memory, because it is stored in another form than the adapter speaks of."""

    task: Task
    config: PretrainedConfig
    targets: list[Target]
    rows: int
    base_rows: int
    untied: bool
    dropped: list[str]
    through_transformers: bool

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(torch.Size(t.shape).numel() * t.dtype.itemsize for t in self.targets)

    @property
    def num_changed(self) -> int:
        """Tensors that the adapter changes."""
        return sum(t.change is not None for t in self.targets)


def plan_merge(
    adapter: Adapter,
    base: Base,
    num_tokens: int | None,
    output_dtype: Literal["auto", "bf16", "fp32", "fp16"] = "auto",
    trust_remote_code: bool = False,
) -> MergePlan:
    """Put base and adapter together on paper.

    num_tokens: len(tokenizer) of the adapter, None when it has none of its own. Where the adapter carries no
    embeddings, the base's grow to it. Raises ModelError for whatever does not fit.
    """
    task = _task(adapter, base)
    config = _target_config(adapter, base, task)
    case = _case(adapter, base, config, trust_remote_code)
    names = case.resolver.map(base.tensors)
    changes = changes_of(case)
    through_transformers = bool(changes.keys() & names.made)
    if through_transformers:
        base = replace(base, tensors=_load_whole(base, trust_remote_code))
        names = case.resolver.map(base.tensors)
    stored = {name: base.tensors[file_name] for name, file_name in names.stored.items()}
    untied = settle_tied(case, stored, changes)
    _check_missing(case, stored, names, changes)
    rows, base_rows = _vocabulary(case, stored, changes, num_tokens)
    if rows != base_rows or untied:
        _resize(config, rows, untied)
        case = _case(adapter, base, config, trust_remote_code)
    targets = _targets(case._replace(base=base), names, stored, changes, output_dtype)
    config.dtype = _main_dtype(targets)
    return MergePlan(task, config, targets, rows, base_rows, untied, names.unknown, through_transformers)


# --- what kind of model it becomes


def _task(adapter: Adapter, base: Base) -> Task:
    by_base: Task = "sequence_classification" if is_classifier(base.config) else "causal_lm"
    task = adapter.task or by_base
    if task == "causal_lm" and by_base != task:
        raise ModelError(
            f"merge.base: {base.named} is a {base.config.architectures[0]}, but {adapter.given} was trained on a causal"
            " language model; name that one"
        )
    return task


def _target_config(adapter: Adapter, base: Base, task: Task) -> PretrainedConfig:
    if task == "causal_lm":
        return copy.deepcopy(base.config)
    custom = AUTO in (getattr(base.config, "auto_map", None) or {})
    if not custom and base.config.model_type not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES:
        raise ModelError(
            f"merge.base: {base.named} is of type {base.config.model_type}, of which transformers has no sequence"
            f" classifier, but {adapter.given} is the adapter of one; name the model it was trained on"
        )
    count = next((adapter.whole[name].shape[0] for name in HEADS if name in adapter.whole), None)
    if count is None and not is_classifier(base.config):
        raise ModelError(
            f"merge.adapter: {adapter.given} is the adapter of a reward model or classifier, but carries no head"
            f" ({HEADS[0]}), and the base {base.named} has none either; the head was not saved: train it again"
        )
    reward = adapter.manifest.get("reward") or {}
    labels = reward.get("labels") or None
    if labels and count is not None and len(labels) != count:
        raise ModelError(f"merge.adapter: {adapter.given} has {count} scores for the labels {', '.join(labels)}")
    if labels is None and is_classifier(base.config) and count in (None, base.config.num_labels):
        made = copy.deepcopy(base.config)
    else:
        made = reward_config(base.config, labels or (None if count == 1 else [f"LABEL_{i}" for i in range(count or 0)]))
    if reward:
        made.reward = reward
    return made


def _case(adapter: Adapter, base: Base, config: PretrainedConfig, trust_remote_code: bool) -> Case:
    """The merged model without storage beside what it is made of. Sets config.architectures to its class."""
    with torch.device("meta"):
        shell: PreTrainedModel = auto_class(config).from_config(config, trust_remote_code=trust_remote_code)
    config.architectures = [type(shell).__name__]
    return Case(adapter, base, shell, Resolver(shell))


def _load_whole(base: Base, trust_remote_code: bool) -> dict[str, StoredTensor]:
    loaded = auto_class(base.config).from_pretrained(
        str(base.directory), dtype="auto", trust_remote_code=trust_remote_code, use_safetensors=True
    )
    return in_memory(loaded.state_dict())


# --- embeddings


def _vocabulary(
    case: Case, stored: dict[str, StoredTensor], changes: dict[str, Change], num_tokens: int | None
) -> tuple[int, int]:
    """(rows of the merged embeddings, rows of the base's)."""
    names = [name for name in vocabulary_names(case.shell) if name in stored]
    base_rows = stored[names[0]].num_rows
    given = case.adapter.given
    stated: dict[str, int] = {}
    for name in names:
        change = changes.get(name)
        if change is not None:
            shape = change.delta_shape or (change.whole.shape if change.whole is not None else ())
            stated[name] = shape[0]
    if not stated:
        return max(base_rows, num_tokens or 0), base_rows
    rows = max(stated.values())
    if min(stated.values()) != rows or rows < (num_tokens or 0):
        tokens = "" if num_tokens is None else f"; its tokenizer has {num_tokens} tokens"
        counts = ", ".join(f"{name} {count}" for name, count in stated.items())
        raise ModelError(f"merge.adapter: {given} does not agree on the number of tokens: {counts} rows{tokens}")
    if rows < base_rows and not all(name in changes and changes[name].whole is not None for name in names):
        raise ModelError(
            f"merge.base: {case.base.named} has embeddings of {base_rows} rows, but {given} was trained on {rows};"
            " name the model that it was trained on with merge.base="
        )
    return rows, base_rows


def _resize(config: PretrainedConfig, rows: int, untied: bool) -> None:
    text_config = config.get_text_config()
    text_config.vocab_size = rows
    for part in (config, text_config):
        part.tie_word_embeddings = part.tie_word_embeddings and not untied


def vocabulary_names(shell: PreTrainedModel) -> list[str]:
    """Tensors with one row per token: embeddings, head, the head's bias."""
    layers = {id(m) for m in (shell.get_input_embeddings(), shell.get_output_embeddings()) if m is not None}
    modules = [(name, module) for name, module in shell.named_modules() if id(module) in layers]
    return [f"{name}.{part}" for name, module in modules for part, _ in module.named_parameters(recurse=False)]


# --- the targets


def _check_missing(case: Case, stored: dict[str, StoredTensor], names: NameMap, changes: dict[str, Change]) -> None:
    there = stored.keys() | names.made | {name for name, change in changes.items() if change.whole is not None}
    parameters = {name for name, _ in case.shell.named_parameters(remove_duplicate=False)}
    wanted = parameters - set(case.shell.all_tied_weights_keys)
    missing = sorted(wanted - there)
    if missing:
        raise ModelError(
            f"merge.base: {case.base.named} lacks {len(missing)} tensors of a {type(case.shell).__name__}"
            f" ({', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''}), and {case.adapter.given} does not bring"
            " them; name the model that the adapter was trained on, whole"
        )


def _targets(
    case: Case, names: NameMap, stored: dict[str, StoredTensor], changes: dict[str, Change], output_dtype: str
) -> list[Target]:
    """In the order of the base's files, so that they are read from front to back; what is new comes last."""
    base = case.base
    shapes = {name: tuple(t.shape) for name, t in case.shell.state_dict().items()}
    growing = set(vocabulary_names(case.shell))
    main = _main_dtype(list(base.tensors.values()))
    place = {tensor: i for i, tensor in enumerate(base.tensors)}
    targets: list[Target] = []
    for name in sorted(stored.keys() | changes.keys(), key=lambda n: place.get(names.stored.get(n, ""), len(place))):
        change = changes.get(name)
        start = change.whole if change is not None and change.whole is not None else stored[name]
        kept = stored[name].dtype if name in stored else main
        _check_shape(name, start, change, shapes[name], name in growing, case)
        file_name = case.resolver.file_name(name, names.stored.get(name))
        targets.append(Target(file_name, start, change, shapes[name], _written_as(kept, output_dtype)))
    for file_name in names.converted:
        tensor = base.tensors[file_name]
        targets.append(Target(file_name, tensor, None, tensor.shape, _written_as(tensor.dtype, output_dtype)))
    return targets


def _check_shape(
    name: str, start: StoredTensor, change: Change | None, shape: tuple[int, ...], may_grow: bool, case: Case
) -> None:
    delta = None if change is None else change.delta_shape
    fits = start.shape[1:] == shape[1:] and start.shape[0] <= shape[0] if may_grow else start.shape == shape
    if fits and delta in (None, shape):
        return
    named, given = case.base.named, case.adapter.given
    if change is None:
        raise ModelError(
            f"merge.base: {named}: {name} is {start.shape}, but its config.json describes one of {shape};"
            " config and weights are not of one model"
        )
    raise ModelError(
        f"merge.base: {named} does not fit {given}: {name} is {shape} in the model, and the adapter is for"
        f" {delta if fits else start.shape}; name the model it was trained on with merge.base="
    )


def _written_as(kept: torch.dtype, output_dtype: str) -> torch.dtype:
    return kept if output_dtype == "auto" or not kept.is_floating_point else DTYPES[output_dtype]


def _main_dtype(tensors: list[StoredTensor] | list[Target]) -> torch.dtype:
    """The precision of most weights."""
    sizes: Counter[torch.dtype] = Counter()
    for tensor in tensors:
        if tensor.dtype.is_floating_point:
            sizes[tensor.dtype] += torch.Size(tensor.shape).numel()
    return sizes.most_common(1)[0][0]
