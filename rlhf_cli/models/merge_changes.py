"""What an adapter does to which tensor of the model, and what becomes of embeddings and head that are one tensor."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rlhf_cli.errors import ModelError
from rlhf_cli.models.adapter import Adapter, LowRank
from rlhf_cli.models.merge_base import Base
from rlhf_cli.models.merge_names import Resolver
from rlhf_cli.models.tensor_files import StoredTensor

COMPARED_ROWS = 512


class Case(NamedTuple):
    """A merge at hand. shell: the merged model without storage; resolver: of its names."""

    adapter: Adapter
    base: Base
    shell: PreTrainedModel
    resolver: Resolver


class Change(NamedTuple):
    """What an adapter does to one tensor. whole: takes its place; low_rank: is added; transposed: to the transpose."""

    whole: StoredTensor | None
    low_rank: LowRank | None
    transposed: bool

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """left (rows, r), right (r, columns) in fp32 and the scale: scale · left @ right is added to the weight."""
        assert self.low_rank is not None
        a, b = self.low_rank.a.read().float(), self.low_rank.b.read().float()
        left, right = (a.T, b.T) if self.transposed else (b, a)
        return left.contiguous(), right.contiguous(), self.low_rank.scale

    @property
    def delta_shape(self) -> tuple[int, int] | None:
        """Shape of what is added to the weight."""
        if self.low_rank is None:
            return None
        shape = self.low_rank.b.shape[0], self.low_rank.a.shape[1]
        return (shape[1], shape[0]) if self.transposed else shape


def changes_of(case: Case) -> dict[str, Change]:
    """What the adapter does, by the model's names. Raises ModelError for what the model does not have."""
    modules = dict(case.shell.named_modules())
    changes = {_found(name, case): Change(tensor, None, False) for name, tensor in case.adapter.whole.items()}
    for module_name, low_rank in case.adapter.low_rank.items():
        name = _found(f"{module_name}.weight", case)
        module = modules[name.removesuffix(".weight")]
        if not isinstance(module, nn.Embedding if low_rank.is_embedding else nn.Linear | Conv1D):
            raise ModelError(
                f"merge.adapter: {case.adapter.given} adapts {module_name}, a {type(module).__name__};"
                " only linear layers and embeddings can be merged here: merge it with PEFT itself (merge_and_unload)"
            )
        whole = changes[name].whole if name in changes else None
        # An embedding's A stands on the side of the tokens, its rows; Conv1D keeps its weight as (in, out).
        changes[name] = Change(whole, low_rank, low_rank.is_embedding or isinstance(module, Conv1D))
    return changes


def _found(name: str, case: Case) -> str:
    """The model's name of an adapter's tensor; adapters made with older versions use older names."""
    found = name if name in case.resolver else case.resolver.model_name(name)[0]
    if found not in case.resolver:
        raise ModelError(
            f"merge.base: {case.base.named} does not fit {case.adapter.given}: the adapter has weights for {name}, but"
            f" a {type(case.shell).__name__} has none; name the model it was trained on with merge.base="
        )
    return found


def settle_tied(case: Case, stored: dict[str, StoredTensor], changes: dict[str, Change]) -> bool:
    """Decide what becomes of tensors that are one in the model, and leave in `stored` and `changes` what will be
    written. Returns whether they come apart.

    They stay one when nothing or the same happens to both. What PEFT adds to only one of them, or a copy that it trains
    of only one, leaves the other as it was, unless it was told to train the two as one.
    """
    apart = False
    for second, first in case.shell.all_tied_weights_keys.items():
        if first not in stored and second in stored:
            stored[first] = stored.pop(second)
        one, other = changes.get(first), changes.get(second)
        only = one or other
        if (one is None) != (other is None) and only is not None:
            beside = only.low_rank is not None or case.adapter.is_copy(first if one else second)
            if case.adapter.ties_embeddings or not beside:
                one = other = only
        same_start = second not in stored or _equal(stored[first], stored[second])
        if same_start and _same(one, other):
            stored.pop(second, None)
            changes.pop(second, None)
            if one is not None:
                changes[first] = one
        else:
            apart = True
            stored.setdefault(second, stored[first])
    return apart


def _same(one: Change | None, other: Change | None) -> bool:
    if one is None or other is None or one is other:
        return one is other
    if (one.whole is None) != (other.whole is None) or (one.low_rank is None) != (other.low_rank is None):
        return False
    if one.whole is not None and other.whole is not None and not _equal(one.whole, other.whole):
        return False
    if one.low_rank is None:
        return True
    ours, theirs = one.factors(), other.factors()
    return torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1]) and ours[2] == theirs[2]


def _equal(one: StoredTensor, other: StoredTensor) -> bool:
    if one is other:
        return True
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    starts = range(0, one.num_rows, COMPARED_ROWS)
    ends = [min(s + COMPARED_ROWS, one.num_rows) for s in starts]
    return all(torch.equal(one.rows(s, e), other.rows(s, e)) for s, e in zip(starts, ends, strict=True))
