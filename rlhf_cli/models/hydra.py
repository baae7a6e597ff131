"""Several models over one set of weights: module trees whose Parameters are the same objects (arXiv 2309.00754).

Trees share weights and nothing else. Each has its own modules, so its own adapters, hooks, and training mode; and its
own buffers, which are copied (a cast or a move of one tree leaves the others alone). No tree ever switches adapters:
the reference is the tree that has none.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import TypeVar, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from rlhf_cli.models.memory import meta_model
from rlhf_cli.models.reward import HEAD, new_score_head, reward_config

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def twin(model: ModuleT) -> ModuleT:
    """Another tree of the same kind around the same Parameters. model: without adapters and engine hooks, which would
    be copied too. The weights may be sharded."""
    return copy.deepcopy(model, memo={id(p): p for p in model.parameters()})


def classifier_over(base: PreTrainedModel, labels: Sequence[str] | None, seed: int) -> PreTrainedModel:
    """A sequence classifier whose backbone is a twin of a causal LM's, with the head that load_reward_model would make.

    base: as for twin; transformers must have a sequence classifier of its kind. labels None: one score.
    """
    made = meta_model(reward_config(base.config, labels), base.config._attn_implementation)
    backbone = base.base_model
    assert type(made.base_model) is type(backbone), f"{type(made).__name__} has another backbone than its causal LM"
    setattr(made, made.base_model_prefix, twin(backbone))
    replaced = cast(nn.Linear, getattr(made, HEAD))
    place = next(base.parameters())
    shape = nn.Linear(replaced.in_features, replaced.out_features, bias=False, device=place.device, dtype=place.dtype)
    setattr(made, HEAD, new_score_head(shape, place.dtype, seed))
    made.config.use_cache = False
    assert not any(p.is_meta for p in made.parameters()), "a weight without storage is left"
    return made.eval()


def move_own(tree: nn.Module, shared: Iterable[nn.Parameter], device: torch.device) -> None:
    """Move what a tree does not share (adapters, head, buffers) to a device; the shared weights stay where they are."""
    known = {id(p) for p in shared}
    for parameter in tree.parameters():
        if id(parameter) not in known:
            parameter.data = parameter.data.to(device)
    for module in tree.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
