"""Which parameters train: all, the last blocks, names that match, or LISA's draw of blocks."""

from __future__ import annotations

import hashlib
import random
import re
from typing import NamedTuple

from torch import nn
from transformers import PreTrainedModel

from rlhf_cli.errors import ModelError
from rlhf_cli.models.lora import plain_model
from rlhf_cli.schema import TrainableConfig


class ParameterCount(NamedTuple):
    """Numbers of scalar parameters."""

    trainable: int
    total: int


def apply_trainable(model: PreTrainedModel, trainable: TrainableConfig, seed: int = 0) -> None:
    """Set requires_grad of every parameter as model.trainable says. Mode lisa: the draw number 0.

    The score head of a reward model is trained in every mode: it starts at random.
    Raises ModelError: more last layers than there are, a pattern that no name matches.
    """
    if trainable.mode == "all":
        model.requires_grad_(True)
    elif trainable.mode == "last_layers":
        _train_last(model, trainable.last_layers)
    elif trainable.mode == "patterns":
        _train_matching(model, trainable.patterns)
    else:
        lisa_apply(model, lisa_draw(len(find_blocks(model)), trainable.lisa_layers, seed, 0))
    score = getattr(model, "score", None)
    if isinstance(score, nn.Module):
        score.requires_grad_(True)


def lisa_draw(num_layers: int, lisa_layers: int, seed: int, draw_index: int) -> list[int]:
    """The blocks that train during one interval, ascending; a function of its arguments alone, so that a resumed run
    draws the same (LISA, Pan et al. 2403.17919: uniform, without replacement)."""
    if lisa_layers > num_layers:
        raise ModelError(f"model.trainable.lisa_layers: got {lisa_layers}; the model has {num_layers} blocks")
    digest = hashlib.sha256(f"lisa/{seed}/{draw_index}".encode()).digest()
    return sorted(random.Random(int.from_bytes(digest[:8], "big")).sample(range(num_layers), lisa_layers))


def lisa_apply(model: PreTrainedModel, layers: list[int]) -> None:
    """Train these blocks and all that is outside the blocks (embeddings, final norm, head)."""
    model.requires_grad_(True)
    for index, block in enumerate(find_blocks(model)):
        block.requires_grad_(index in layers)


def count_parameters(model: nn.Module) -> ParameterCount:
    """Trainable and total parameters; right for sharded (ZeRO-3) and 4-bit ones too, tied ones count once."""
    sizes = [(_numel(p), p.requires_grad) for p in model.parameters()]
    return ParameterCount(sum(n for n, trains in sizes if trains), sum(n for n, _ in sizes))


def multiplied_parameters(model: nn.Module) -> ParameterCount:
    """Parameters without the input embeddings, which are looked up, unless they are also the output head (tied)."""
    counted, plain = count_parameters(model), plain_model(model)
    if plain.get_output_embeddings() is not None and plain.config.get_text_config().tie_word_embeddings:
        return counted
    looked_up = count_parameters(plain.get_input_embeddings())
    return ParameterCount(counted.trainable - looked_up.trainable, counted.total - looked_up.total)


def find_blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The transformer blocks, first to last."""
    return find_blocks_and_parent(model)[0]


def find_blocks_and_parent(model: PreTrainedModel) -> tuple[nn.ModuleList, nn.Module]:
    """The blocks, and the module they are in (its children include the final norm)."""
    count = model.config.get_text_config().num_hidden_layers
    for parent in model.modules():
        for child in parent.children():
            if isinstance(child, nn.ModuleList) and len(child) == count:
                return child, parent
    raise ModelError(
        f"model.trainable.mode: the blocks of {type(model).__name__} cannot be told; use mode=patterns with names"
        f" such as {_samples(model)}"
    )


def _train_last(model: PreTrainedModel, last_layers: int) -> None:
    blocks, parent = find_blocks_and_parent(model)
    if last_layers > len(blocks):
        raise ModelError(f"model.trainable.last_layers: got {last_layers}; the model has {len(blocks)} blocks")
    model.requires_grad_(False)
    for block in list(blocks)[len(blocks) - last_layers :]:
        block.requires_grad_(True)
    for name, child in parent.named_children():
        # BLOOM has a norm behind its embeddings too; it is not the final one.
        if "norm" in type(child).__name__.lower() and "embed" not in name:
            child.requires_grad_(True)


def _train_matching(model: PreTrainedModel, patterns: list[str]) -> None:
    trained: set[str] = set()
    names = [n for n, _ in model.named_parameters()]
    for pattern in patterns:
        try:
            matches = {n for n in names if re.search(pattern, n)}
        except re.error as error:
            raise ModelError(f"model.trainable.patterns: {pattern!r} is no regular expression: {error}") from error
        if not matches:
            raise ModelError(
                f"model.trainable.patterns: {pattern!r} matches no parameter; names are such as {_samples(model)}"
            )
        trained |= matches
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)


def matching_patterns(model: nn.Module, patterns: list[str]) -> list[str]:
    """Those patterns that some parameter's name matches."""
    return [p for p in patterns if any(re.search(p, name) for name, _ in model.named_parameters())]


def _samples(model: nn.Module) -> str:
    names = [n for n, _ in model.named_parameters()]
    return ", ".join(dict.fromkeys([names[0], names[len(names) // 2], names[-1]]))


def _numel(parameter: nn.Parameter) -> int:
    if hasattr(parameter, "ds_numel"):
        return int(parameter.ds_numel)
    state = getattr(parameter, "quant_state", None)  # bitsandbytes packs two 4-bit numbers into a byte
    return int(state.shape.numel()) if state is not None else parameter.numel()
