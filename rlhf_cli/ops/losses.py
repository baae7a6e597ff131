"""Losses of reward models (pairs, rankings, labels) and of PPO (policy, values). Pure functions of one batch.

Shapes: N scores, pairs or rows; P pairs of a ranking; C classes; B rows, T tokens. Half-precision inputs are computed
in fp32. An empty batch gives a zero that still reaches its inputs: a rank without rows has to take part in the backward
pass. A reward model's loss is a mean over `stats.num` (labels: over `stats.weight`), so that loss x num adds up over
micro-batches; PPO's are sums divided by num_tokens, so that they add up as they are.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


class ComparisonStats(NamedTuple):
    """Detached scalars. accuracy: share of the pairs whose better side scores higher, equal scores count half; margin:
    mean of r_better - r_worse; mean_reward: of all scores. num: pairs, or prompts with a pair (the three are then means
    per prompt, averaged over these prompts)."""

    accuracy: Tensor
    margin: Tensor
    mean_reward: Tensor
    num: int


class ClassificationStats(NamedTuple):
    """Detached. accuracy: share of the rows whose label has the highest logit; num: rows; weight: Σ of theirs."""

    accuracy: Tensor
    num: int
    weight: Tensor


def pairwise_reward_loss(
    chosen: Tensor, rejected: Tensor, margin: Tensor | float | None = None, center_coef: float = 0.0
) -> tuple[Tensor, ComparisonStats]:
    """Mean of -log σ(chosen - rejected - margin) + center_coef (chosen + rejected)² over the pairs.

    chosen, rejected, margin: (N,), or one margin for all. Bradley & Terry 1952; the margin is that of Llama 2
    (arXiv 2307.09288, eq. 2), the centring that of Eisenstein et al. (arXiv 2312.09244).
    """
    assert chosen.shape == rejected.shape == (len(chosen),), f"{chosen.shape} and {rejected.shape}"
    chosen, rejected = _wide(chosen), _wide(rejected)
    count = max(1, len(chosen))
    loss = _pair_losses(chosen, rejected, margin, center_coef).sum() / count
    difference = (chosen - rejected).detach()
    scores = torch.cat([chosen, rejected]).detach()
    stats = ComparisonStats(
        _right_shares(difference).sum() / count, difference.sum() / count, _mean(scores), num=len(chosen)
    )
    return loss, stats


def kwise_reward_loss(
    scores: Tensor, ranks: Tensor, prompt_ids: Tensor, center_coef: float = 0.0
) -> tuple[Tensor, ComparisonStats]:
    """For each prompt the mean of -log σ(r_better - r_worse) + center_coef (r_better + r_worse)² over all its pairs of
    different rank, then the mean over the prompts that have such a pair.

    scores, ranks, prompt_ids: (N,); a smaller rank is better, equal ranks make no pair; rows of a prompt may stand
    anywhere. InstructGPT (arXiv 2203.02155, eq. 1). With two answers to each prompt it is the pairwise loss.
    """
    assert scores.shape == ranks.shape == prompt_ids.shape == (len(scores),)
    scores = _wide(scores)
    pairs = ranked_pairs(ranks, prompt_ids)
    weights = pairs.weights.to(scores.device, scores.dtype)
    high, low = scores[pairs.better.to(scores.device)], scores[pairs.worse.to(scores.device)]
    count = max(1, pairs.num)
    loss = (weights * _pair_losses(high, low, None, center_coef)).sum() / count
    difference = (high - low).detach()
    accuracy, margin = (weights * _right_shares(difference)).sum() / count, (weights * difference).sum() / count
    mean_reward = (pairs.shares.to(scores.device, scores.dtype) * scores.detach()).sum() / count
    return loss, ComparisonStats(accuracy, margin, mean_reward, pairs.num)


def classification_loss(
    logits: Tensor, labels: Tensor, class_weights: Tensor | None = None
) -> tuple[Tensor, ClassificationStats]:
    """Σ w_y · -log softmax(logits)[y] / Σ w_y over the rows; w is 1 without class_weights.

    logits (N, C), labels (N,) int64 in [0, C), class_weights (C,).
    """
    assert labels.shape == (len(logits),)
    logits = _wide(logits)
    weights = logits.new_ones(len(labels)) if class_weights is None else class_weights.to(logits)[labels]
    total = weights.sum()
    losses = functional.cross_entropy(logits, labels, reduction="none")
    loss = (weights * losses).sum() / total.clamp(min=torch.finfo(total.dtype).tiny)
    hits = (logits.detach().argmax(-1) == labels).to(logits.dtype)
    return loss, ClassificationStats(_mean(hits), len(labels), total)


class PolicyStats(NamedTuple):
    """Detached scalars, each Σ over the kept tokens / num_tokens, so that those of micro-batches add up.

    clipfrac: share of the tokens whose loss the clip decides; approxkl: ½ (Δ log π)²; ratio: π/π_old; ratio_square:
    (ratio − 1)², from which ratio_var comes.
    """

    clipfrac: Tensor
    approxkl: Tensor
    ratio: Tensor
    ratio_square: Tensor

    @property
    def ratio_var(self) -> Tensor:
        """Variance of the ratio over tokens: only of the whole mini-batch, it does not add up."""
        return self.ratio_square - (self.ratio - 1).square()


class ValueStats(NamedTuple):
    """Detached scalars that add up like PolicyStats. clipfrac: share of the tokens whose loss the clip decides;
    square_error: (V − R)²."""

    clipfrac: Tensor
    square_error: Tensor


def ppo_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    keep_mask: Tensor,
    clip_range: float,
    num_tokens: int | Tensor | None = None,
) -> tuple[Tensor, PolicyStats]:
    """Σ max(−A ρ, −A clip(ρ, 1 ± ε)) / num_tokens over the kept tokens, with ρ = exp(log π − log π_old).

    logprobs, old_logprobs, advantages, keep_mask: (B, T), or any one shape. num_tokens: kept tokens of the global
    mini-batch, None = of this batch. Gradient reaches logprobs only. arXiv 1707.06347, eq. 7.
    """
    assert logprobs.shape == old_logprobs.shape == advantages.shape == keep_mask.shape
    log_ratio = (_wide(logprobs) - _wide(old_logprobs.detach())).masked_fill(~keep_mask, 0.0)
    gain = _wide(advantages.detach()).masked_fill(~keep_mask, 0.0)
    count = _token_count(keep_mask, num_tokens)
    with torch.no_grad():
        ratio = log_ratio.exp()
        clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
        # False too where −A ρ is nan, from A = 0 and a ratio that overflowed
        moves = -gain * ratio >= -gain * clipped
        stats = PolicyStats(
            clipfrac=(~moves).to(gain.dtype).sum() / count,
            approxkl=0.5 * log_ratio.square().sum() / count,
            ratio=ratio.masked_fill(~keep_mask, 0.0).sum() / count,
            ratio_square=(ratio - 1).square().sum() / count,
        )
    # Clipped tokens are kept out of exp: a ratio that overflowed would make their gradient 0 · inf = nan
    moving = log_ratio.masked_fill(~moves, 0.0).exp()
    losses = torch.where(moves, -gain * moving, -gain * clipped)
    return losses.sum() / count, stats


def ppo_value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    keep_mask: Tensor,
    clip_range: float,
    num_tokens: int | Tensor | None = None,
) -> tuple[Tensor, ValueStats]:
    """½ Σ max((V − R)², (clip(V, V_old ± ε) − R)²) / num_tokens over the kept tokens.

    values, old_values, returns, keep_mask, num_tokens as in ppo_policy_loss. Gradient reaches values only.
    """
    assert values.shape == old_values.shape == returns.shape == keep_mask.shape
    value, old, target = (
        _wide(t).masked_fill(~keep_mask, 0.0) for t in (values, old_values.detach(), returns.detach())
    )
    count = _token_count(keep_mask, num_tokens)
    free = (value - target).square()
    clipped = (torch.clamp(value, old - clip_range, old + clip_range) - target).square()
    with torch.no_grad():
        stats = ValueStats((clipped > free).to(value.dtype).sum() / count, free.sum() / count)
    return 0.5 * torch.maximum(free, clipped).sum() / count, stats


class RankedPairs(NamedTuple):
    """better, worse (P,): indices of all pairs of different rank within a prompt; weights (P,): 1 / the number of pairs
    of that prompt; shares (N,): 1 / the number of rows of the prompt, 0 where it has no pair; num: prompts that have
    one."""

    better: Tensor
    worse: Tensor
    weights: Tensor
    shares: Tensor
    num: int


def ranked_pairs(ranks: Tensor, prompt_ids: Tensor) -> RankedPairs:
    """ranks, prompt_ids (N,) as in kwise_reward_loss. The work is Σ K², not N²."""
    order = torch.argsort(prompt_ids, stable=True)
    _, sizes = torch.unique_consecutive(prompt_ids[order], return_counts=True)
    starts = sizes.cumsum(0) - sizes  # of each prompt in `order`
    prompts = torch.repeat_interleave(sizes)  # (N,) number of the prompt of order[i]
    others = sizes[prompts]  # (N,) every row meets all rows of its prompt
    left = torch.repeat_interleave(others)  # (Σ K²,)
    within = torch.arange(len(left), device=left.device) - (others.cumsum(0) - others)[left]
    right = starts[prompts][left] + within
    better, worse = order[left], order[right]
    keep = ranks[better] < ranks[worse]
    pairs_of_prompt = torch.bincount(prompts[left[keep]], minlength=len(sizes))
    weights = 1.0 / pairs_of_prompt[prompts[left[keep]]].double()
    shares = torch.zeros(len(ranks), dtype=torch.float64, device=ranks.device)
    shares[order] = (pairs_of_prompt > 0)[prompts].double() / others
    return RankedPairs(better[keep], worse[keep], weights, shares, int((pairs_of_prompt > 0).sum()))


def _right_shares(differences: Tensor) -> Tensor:
    """(N,) of r_better - r_worse -> (N,): 1 where the better side scores higher, ½ where both score the same."""
    return (differences > 0).to(differences.dtype) + 0.5 * (differences == 0).to(differences.dtype)


def _pair_losses(better: Tensor, worse: Tensor, margin: Tensor | float | None, center_coef: float) -> Tensor:
    """(P,) each."""
    difference = better - worse
    if margin is not None:
        difference = difference - torch.as_tensor(margin).to(difference)
    losses = -functional.logsigmoid(difference)
    return losses if center_coef == 0 else losses + center_coef * (better + worse).square()


def _token_count(keep_mask: Tensor, num_tokens: int | Tensor | None) -> int | Tensor:
    count = keep_mask.sum() if num_tokens is None else num_tokens
    return count.clamp(min=1) if isinstance(count, Tensor) else max(1, count)


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _mean(values: Tensor) -> Tensor:
    return values.sum() / max(1, values.numel())
