"""Reward models and classifiers: a decoder with the head `score`, as transformers' sequence classifiers have it.

`enable_scores(model)` teaches a model one more call, and leaves every other as it was:

    scores = model(input_ids=..., position_ids=..., last=...)

Shapes: N sequences, T positions, H width, C scores of each (1, or one per label). last (N,) is the index of the last
kept token, which the score is read at. It is never found by looking for padding, since a text may contain that token.
With segments (R, T) the R rows hold several sequences each that share a prompt (see prompt_sharing), and rows (N,) says
which row each of them is in.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MethodType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from rlhf_cli.errors import ModelError
from rlhf_cli.models.load import (
    check_causal_lm,
    check_complete,
    grow_embeddings,
    is_classifier,
    load_weights,
    read_config,
)
from rlhf_cli.models.logit_transform import BackboneOutput, replaced
from rlhf_cli.models.lora import plain_model, wrapped_copies
from rlhf_cli.models.memory import meta_model
from rlhf_cli.models.prompt_sharing import sharing_mask
from rlhf_cli.models.scratch import new_model
from rlhf_cli.schema import LoadedModelConfig

HEAD = "score"
SCALE = "score_scale"
AUTO = "AutoModelForSequenceClassification"
PLACEHOLDER = re.compile(r"LABEL_\d+")  # transformers' name of a label that was given none
# Heads of causal LMs, and what older versions of transformers stored beside the weights (masks, rotary tables).
LEFT_OVER = re.compile(
    r"^(lm_head|embed_out|output_projection)\.|attn.*\.(masked_)?bias$|attention\.(masked_)?bias$|inv_freq$"
)


# --- configuration


def load_reward_config(
    path: Path | str, revision: str | None = None, trust_remote_code: bool = False
) -> PretrainedConfig:
    """The config of a reward model made of `path`, a causal LM (one score) or a sequence classifier (its labels).

    Raises ModelError when it is neither, or when it does not read a score at the last token.
    """
    config = _reward_config_of(read_config(path, revision, trust_remote_code), path)
    if AUTO not in (getattr(config, "auto_map", None) or {}):  # a class of its own is known when it is loaded
        _check_reads_last_token(meta_model(config), path)
    return config


def reward_config(config: PretrainedConfig, labels: Sequence[str] | None) -> PretrainedConfig:
    """The config of a sequence classifier on the same backbone; labels None: one score. A copy."""
    made = copy.deepcopy(config)
    if labels is None:
        made.num_labels, made.problem_type = 1, None
    else:
        made.id2label = dict(enumerate(labels))
        made.label2id = {name: i for i, name in enumerate(labels)}
        made.problem_type = "single_label_classification"
    custom = (getattr(config, "auto_map", None) or {}).get(AUTO)
    name = custom.rsplit(".", 1)[-1] if custom else MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES[config.model_type]
    made.architectures = [name]
    for name in ("reward", SCALE):  # moments and scale of other scores than those that will be trained
        if hasattr(made, name):
            delattr(made, name)
    return made


def label_names(config: PretrainedConfig) -> list[str] | None:
    """Names of a classifier's labels in order; None when nobody named them."""
    names = [str(config.id2label[i]) for i in range(config.num_labels)]
    return None if all(PLACEHOLDER.fullmatch(n) for n in names) else names


class ScoreScale(NamedTuple):
    """What is made of a head's value x: factor * x + shift, since a head without a bias has no constant. It stands in
    the model's config, so in its config.json too."""

    factor: float = 1.0
    shift: float = 0.0


def score_scale(config: PretrainedConfig) -> ScoreScale:
    """The scale that a model's scores are on."""
    return ScoreScale(*getattr(config, SCALE, ()))


def set_score_scale(config: PretrainedConfig, scale: ScoreScale) -> None:
    """Bring a model's scores onto a scale, instead of the one that they are on."""
    vars(config).pop(SCALE, None)
    if scale != ScoreScale():
        setattr(config, SCALE, list(scale))


def _reward_config_of(found: PretrainedConfig, path: Path | str) -> PretrainedConfig:
    custom = AUTO in (getattr(found, "auto_map", None) or {})
    if not custom and (found.model_type not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES):
        raise ModelError(
            f"model.path: {path} is of type {found.model_type}, of which transformers has no sequence classifier;"
            f" allowed: types such as {', '.join(('llama', 'qwen3', 'mistral', 'gpt2', 'gpt_neox', 'opt'))}"
        )
    if is_classifier(found):
        return found
    check_causal_lm(found, path)
    return reward_config(found, None)


def _check_labels(config: PretrainedConfig, labels: Sequence[str] | None, path: Path | str) -> None:
    """A classifier's own head must fit what it is to be trained on."""
    names, count = label_names(config), config.num_labels
    named = f" ({', '.join(names)})" if names else ""
    if labels is None and count != 1:
        raise ModelError(
            f"model.path: {path} is a classifier with {count} labels{named}, but comparisons train one score;"
            " start from a model with one score, or from a causal language model"
        )
    if labels is not None and (count != len(labels) or (names is not None and names != list(labels))):
        raise ModelError(
            f"model.path: {path} is a classifier with {count} {'label' if count == 1 else 'labels'}{named}, but the"
            f" data has {len(labels)} ({', '.join(labels)}), or has them in another order; start from a causal"
            " language model, or from a classifier with the data's labels"
        )


# --- weights


def load_reward_model(
    model: LoadedModelConfig,
    path: Path | str,
    dtype: torch.dtype,
    labels: Sequence[str] | None,
    seed: int,
    device: torch.device | None = None,
    num_tokens: int | None = None,
) -> PreTrainedModel:
    """A sequence classifier with the weights of `path`, in `dtype`; see load_policy for device and num_tokens.

    path: a causal LM, which gets a new head (the same on every rank, by `seed`), or a classifier, which keeps its own.
    labels: their names in order; None = one score.
    Raises ModelError as load_policy does, and for labels that do not fit, or tensors that have no place in the model.
    """
    found = read_config(path, model.revision, model.trust_remote_code)
    config, has_head = _reward_config_of(found, path), is_classifier(found)
    if has_head:
        _check_labels(config, labels, path)
    # transformers draws a head of its own from the global generator, under ZeRO-3 on one rank only.
    with _no_load_report(), torch.random.fork_rng(devices=[]):
        loaded, report = load_weights(reward_config(config, labels), model, path, dtype, device, [HEAD])
    _check_reads_last_token(loaded, path)
    check_complete(report["missing_keys"] - (set() if has_head else {f"{HEAD}.weight"}), path)
    left_over = sorted(name for name in report["unexpected_keys"] if not LEFT_OVER.search(name))
    if left_over:
        raise ModelError(
            f"{path}: {len(left_over)} of the stored tensors have no place in a {type(loaded).__name__}"
            f" ({', '.join(left_over[:3])} ...); its config.json is that of another model"
        )
    if not has_head:
        # Also after a sharded load: this one is whole, and the engine shards it with what else was added.
        loaded.score = new_score_head(loaded.score, dtype, seed)
    if num_tokens is not None:
        grow_embeddings(loaded, num_tokens)
    loaded.config.use_cache = False
    return loaded


def new_reward_model(
    config: PretrainedConfig,
    labels: Sequence[str] | None,
    dtype: torch.dtype,
    seed: int,
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """A sequence classifier with random weights that depend on config, labels, dtype and seed only."""
    made = new_model(reward_config(config, labels), dtype, seed, attn_implementation)
    made.score = new_score_head(made.score, dtype, seed)
    made.config.use_cache = False
    return made


def new_score_head(replaced: nn.Linear, dtype: torch.dtype, seed: int) -> nn.Linear:
    """A head of the same size and place, drawn from N(0, 1/√(H+1)): scores start small whatever the width
    (Huang et al. 2403.17031, detail 11)."""
    # A stream of its own: with the seed itself it would be the numbers that the embeddings of a new model start with.
    digest = hashlib.sha256(f"{HEAD}/{seed}".encode()).digest()
    draw = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    weight = torch.randn(replaced.out_features, replaced.in_features, generator=draw)
    head = nn.Linear(replaced.in_features, replaced.out_features, bias=False, device="meta")
    head.weight = nn.Parameter((weight / (replaced.in_features + 1) ** 0.5).to(replaced.weight.device, dtype))
    return head


@contextmanager
def _no_load_report() -> Iterator[None]:
    """Keep back transformers' table of missing and unexpected names, each of which is checked here. Shapes that do not
    fit are an error of transformers', whose only details stand in the table."""
    keep = lambda record: "LOAD REPORT" not in record.getMessage() or "MISMATCH" in record.getMessage()
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


# --- the call


def enable_scores(model: nn.Module) -> None:
    """Teach a sequence classifier (plain or PEFT-wrapped) the call with `last`, which gives scores (N, C) in fp32."""
    base = plain_model(model)
    for head in wrapped_copies(base.score):
        # Not isinstance: quantised and adapted layers derive from Linear and compute something else.
        assert type(head).forward is nn.Linear.forward, f"the head is a {type(head).__name__}"
        head.forward = MethodType(_head_forward, head)
    model.forward = MethodType(_forward_with_last(type(model).forward), model)


def _forward_with_last(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def forward(
        self: nn.Module,
        *args: Any,
        last: Tensor | None = None,
        rows: Tensor | None = None,
        segments: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        return original(self, *args, **kwargs) if last is None else _scores(self, last, rows, segments, kwargs)

    return forward


def _scores(
    model: nn.Module, last: Tensor, rows: Tensor | None, segments: Tensor | None, inputs: dict[str, Any]
) -> Tensor:
    """inputs: input_ids, position_ids and whatever else the backbone takes, each (R, T), R = N without segments (R, T);
    last, rows (N,) -> (N, C)."""
    base = plain_model(model)
    if segments is not None:
        inputs["attention_mask"] = sharing_mask(segments, base.config, base.dtype)
    hidden = base.base_model(**inputs, use_cache=False).last_hidden_state
    picked = hidden[torch.arange(len(last), device=hidden.device) if rows is None else rows, last]
    # The head module's own call, so that hooks which bring its weights (ZeRO-3) and PEFT's trained copy take part.
    scores: Tensor = base.score(picked, exact=True)
    scale = score_scale(base.config)
    return scores if scale == ScoreScale() else scores * scale.factor + scale.shift


def _head_forward(self: nn.Linear, hidden: Tensor, exact: bool = False) -> Tensor:
    """A head's forward. exact: in fp32, since two scores that differ by less than bf16 can say are a tie."""
    if not exact:
        return F.linear(hidden, self.weight)
    return F.linear(hidden.float(), self.weight.float())


def reads_last_token(model: PreTrainedModel) -> bool:
    """Whether the model is a backbone, a linear head `score`, and the head's value at the last token.

    Observed rather than assumed: backbone and head are replaced for one call by known values, so no weight is touched
    (they may be sharded, or without storage).
    """
    head, backbone = getattr(model, HEAD, None), model.base_model
    plain = isinstance(head, nn.Linear) and head.bias is None and backbone is not model
    return plain and not model.config.is_encoder_decoder and _observed(model, backbone, head)


def _check_reads_last_token(model: PreTrainedModel, path: Path | str) -> None:
    if reads_last_token(model):
        return
    raise ModelError(
        f"model.path: {path} as a {type(model).__name__} does not read a score from the last token by a linear head"
        f" `{HEAD}`; allowed: decoders such as Llama, Qwen3, Mistral, GPT-2, GPT-NeoX, OPT"
    )


def _observed(model: PreTrainedModel, backbone: nn.Module, head: Any) -> bool:
    hidden, values = torch.arange(12.0).view(1, 3, 4), torch.arange(3.0 * model.config.num_labels).view(1, 3, -1)
    seen: list[Tensor] = []

    def fake_backbone(*_: Any, **__: Any) -> BackboneOutput:
        return BackboneOutput(last_hidden_state=hidden)

    def fake_head(given: Tensor) -> Tensor:
        seen.append(given)
        return values

    token = 0 if model.config.get_text_config().pad_token_id != 0 else 1
    with torch.no_grad(), replaced(backbone, fake_backbone), replaced(head, fake_head):
        try:
            out = type(model).forward(model, input_ids=torch.full((1, 3), token), use_cache=False)
            logits = out.logits.flatten()
        except (AttributeError, TypeError, RuntimeError, LookupError):
            return False
    return len(seen) == 1 and torch.equal(seen[0], hidden) and torch.equal(logits, values[0, -1])
