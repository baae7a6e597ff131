"""Which responses are learnt from: ranks, selection and soft weights by reward.

Reward-ranked fine-tuning (RAFT, Dong et al., arXiv 2304.06767).
Shapes: N responses, all those of an iteration, over all ranks; S of them selected; G groups. Responses to the same
prompt have the same number in group_ids; the numbers are any and in any order. A reward of -inf marks a response that
is discarded: it counts among those that were written, and is never learnt from.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


def select_top(rewards: Tensor, strategy: Literal["local", "top"], top_fraction: float, group_ids: Tensor) -> Tensor:
    """Indices of the selected responses, (S,) int64 ascending. rewards (N,); group_ids (N,) int64.

    local: of each group the best round(size of the group x top_fraction), one at least. top: the best
    round(N x top_fraction) of all, one at least; groups do not matter. Discarded ones count in the size of the group
    and in N, but none of them takes a place: where too few are left, fewer are selected. Among equals the lowest index
    is better.
    """
    if strategy == "local":
        _, group, sizes = torch.unique(group_ids, return_inverse=True, return_counts=True)  # (N,), (G,)
        quota = (sizes.double() * top_fraction).round().clamp(min=1)[group]
        ranks = response_ranks(rewards, group_ids)
    else:
        if strategy != "top":
            raise ValueError(f"strategy {strategy!r}; allowed: local, top")
        quota = torch.full_like(rewards, max(1, round(len(rewards) * top_fraction)), dtype=torch.float64)
        ranks = response_ranks(rewards, torch.zeros_like(rewards, dtype=torch.int64))
    return ((ranks <= quota) & torch.isfinite(rewards)).nonzero().squeeze(1)


def response_ranks(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """(N,) int64: 1 = the best of its group, the lower index among equals. rewards (N,), group_ids (N,) int64.

    Discarded ones stand behind all others.
    """
    _check(rewards)
    _, group, sizes = torch.unique(group_ids, return_inverse=True, return_counts=True)  # (N,), (G,)
    assert group.shape == rewards.shape, (group.shape, rewards.shape)
    order = torch.argsort(rewards, descending=True, stable=True)
    order = order[torch.argsort(group[order], stable=True)]  # group after group, the best of each in front
    first = sizes.cumsum(0) - sizes  # (G,): where each group begins there
    places = torch.arange(len(order), device=rewards.device) - first[group[order]]
    return torch.empty_like(order).scatter_(0, order, places + 1)


def soft_weights(rewards: Tensor, temperature: float, group_ids: Tensor | None) -> Tensor:
    """softmax(rewards / temperature) within each group, or among all where group_ids is None; (N,) float64.

    rewards (N,), group_ids (N,) int64. The weights of a group sum to 1; discarded responses have none, nor has a group
    of which all are discarded.
    """
    _check(rewards)
    assert temperature > 0, temperature
    scores, kept = rewards.double(), torch.isfinite(rewards)
    if group_ids is None:
        group_ids = torch.zeros_like(rewards, dtype=torch.int64)
    numbers, group = torch.unique(group_ids, return_inverse=True)  # (G,), (N,)
    assert group.shape == rewards.shape, (group.shape, rewards.shape)
    best = scores.new_full(numbers.shape, -torch.inf).scatter_reduce(0, group, scores, "amax")
    # exp of at most 0, and the best of a group at exactly 0, so that no sum overflows or vanishes
    weights = ((scores - best[group]) / temperature).exp().where(kept, 0.0)
    sums = torch.zeros_like(best).index_add(0, group, weights)
    return (weights / sums[group]).where(kept, 0.0)  # by where: 0 / 0 of a group without any


def _check(rewards: Tensor) -> None:
    assert rewards.ndim == 1, rewards.shape
    assert (rewards < torch.inf).all(), "a reward that is nan or inf cannot be ranked"  # nan is not less either
