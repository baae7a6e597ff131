"""From scores and log-probabilities to advantages: the reward of each token, and the estimators that ppo offers.

Shapes: R responses, T tokens of the longest; keep_mask (R, T) bool, True = a token of the response, the end included.
What stands at dropped positions never matters. All R responses of the iteration are here at once, on every rank, so
that means and standard deviations are those of the whole batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_cli.ops.gae import compute_gae
from rlhf_cli.ops.kl import kl_estimate
from rlhf_cli.ops.masks import masked_sum, whiten
from rlhf_cli.schema import AlgorithmConfig

GROUP_STD_FLOOR = 1e-4
"""Added to a group's standard deviation (TRL's GRPO trainer): rounding errors among equal rewards stay small."""


class Advantages(NamedTuple):
    """advantages (R, T); returns (R, T), what values are to become, None without a critic; both 0 where dropped."""

    advantages: Tensor
    returns: Tensor | None


@torch.no_grad()
def token_rewards(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, keep_mask: Tensor, kl_coef: float, kl_estimator: str = "k1"
) -> Tensor:
    """−β k_t at each kept token, plus the score at the last one; (R, T) fp32 (fp64 of fp64), 0 where dropped.

    scores (R,), logprobs, ref_logprobs (R, T): of the policy that sampled, and of the reference.
    """
    assert scores.shape == keep_mask.shape[:1], (scores.shape, keep_mask.shape)
    assert keep_mask.any(1).all(), "a response without tokens has no place for its score"
    rewards = -kl_coef * kl_estimate(logprobs, ref_logprobs, kl_estimator)
    # Not by 0 · k, which is nan where k3 overflowed
    rewards = torch.zeros_like(rewards) if kl_coef == 0 else rewards.masked_fill(~keep_mask, 0.0)
    last = keep_mask.shape[1] - 1 - keep_mask.flip(1).to(torch.uint8).argmax(1)  # (R,)
    return rewards.scatter_add(1, last[:, None], scores[:, None].to(rewards.dtype))


@torch.no_grad()
def estimate(
    rewards: Tensor, values: Tensor | None, keep_mask: Tensor, groups: Tensor, settings: AlgorithmConfig
) -> Advantages:
    """Advantages by settings.advantage, whitened over all kept tokens if settings.whitens.

    rewards (R, T) of token_rewards; values (R, T) for gae, else None; groups (R,) int64: the same number for responses
    to the same prompt. Returns are those of the advantages before whitening.
    settings.whiten_rewards divides the rewards by their std over all kept tokens and keeps their mean.
    """
    assert rewards.shape == keep_mask.shape, (rewards.shape, keep_mask.shape)
    assert groups.shape == keep_mask.shape[:1], (groups.shape, keep_mask.shape)
    assert (values is not None) == settings.has_critic
    if settings.whiten_rewards:
        rewards = whiten(rewards, keep_mask, shift_mean=False)
    returns = None
    if values is not None:
        advantages, returns = compute_gae(rewards, values, keep_mask, settings.gamma, settings.lam)
    elif settings.advantage == "reinforce++":
        advantages = rewards_to_go(rewards, keep_mask, settings.gamma)
    else:
        of_group = leave_one_out if settings.advantage == "rloo" else group_relative
        of_response = of_group(masked_sum(rewards.double(), keep_mask, dim=1), groups)
        advantages = (of_response[:, None] * keep_mask).to(rewards.dtype)
    return Advantages(whiten(advantages, keep_mask) if settings.whitens else advantages, returns)


def rewards_to_go(rewards: Tensor, keep_mask: Tensor, gamma: float) -> Tensor:
    """A_t = Σ_{k≥t} γ^(k−t) r_k, (R, T): REINFORCE++ (Hu, arXiv 2501.03262), whose baseline is the batch's mean."""
    return compute_gae(rewards, torch.zeros_like(rewards), keep_mask, gamma, lam=1.0)[0]


def leave_one_out(rewards: Tensor, groups: Tensor) -> Tensor:
    """Reward minus the mean reward of the other responses to the prompt: RLOO (Ahmadian et al., arXiv 2402.14740).

    rewards (R,): of the whole response, score − β Σ k_t; groups (R,).
    """
    group = _group_sums(rewards, groups)
    return rewards - (group.sums - rewards) / (group.sizes - 1)


def group_relative(rewards: Tensor, groups: Tensor) -> Tensor:
    """(Reward − mean) / std over the responses to the prompt: GRPO (Shao et al., arXiv 2402.03300, section 4.1.2).

    rewards, groups (R,) as in leave_one_out: the KL penalty is in the reward, as for the other estimators, and not a
    loss of its own as in the paper. So the optimum is the same as theirs, and where all responses score the same, the
    one that the policy prefers least over the reference is the better one. std is the unbiased one.
    """
    group = _group_sums(rewards, groups)
    deviations = rewards - group.sums / group.sizes
    variance = _group_sums(deviations.square(), groups).sums / (group.sizes - 1)
    return deviations / (variance.sqrt() + GROUP_STD_FLOOR)


class _Groups(NamedTuple):
    """sums, sizes (R,): of the group of each response."""

    sums: Tensor
    sizes: Tensor


def _group_sums(values: Tensor, groups: Tensor) -> _Groups:
    """values, groups (R,)."""
    _, number, sizes = torch.unique(groups, return_inverse=True, return_counts=True)
    assert (sizes > 1).all(), "a response that is alone with its prompt has nothing to be compared with"
    sums = values.new_zeros(len(sizes)).index_add_(0, number, values)
    return _Groups(sums[number], sizes[number])
