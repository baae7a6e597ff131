"""Generalised advantage estimation (Schulman et al., arXiv 1506.02438, eq. 16) over the kept tokens of each row.

Shapes: B rows, T tokens. The kept tokens of a row are one episode, in their order; what stands at dropped positions
never matters, not even nan.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def compute_gae(rewards: Tensor, values: Tensor, keep_mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """(advantages, returns), each (B, T) in the rewards' type, 0 where dropped.

    δ_t = r_t + γ V_{t+1} − V_t;  A_t = δ_t + γλ A_{t+1};  return_t = A_t + V_t, with V = A = 0 after the last kept
    token: the episode ends there. rewards, values (B, T) float, keep_mask (B, T) bool. Sums are taken in fp64.
    """
    assert rewards.shape == values.shape == keep_mask.shape, (rewards.shape, values.shape, keep_mask.shape)
    # (T, B), so that a step of the loop reads and writes whole rows
    keep = keep_mask.T.contiguous()
    reward = rewards.double().T.masked_fill(~keep, 0.0)
    value = values.double().T.masked_fill(~keep, 0.0)
    advantages = torch.zeros_like(reward)
    next_value = next_advantage = reward.new_zeros(reward.shape[1])  # (B,)
    for t in range(len(reward) - 1, -1, -1):
        advantage = reward[t] + gamma * next_value - value[t] + gamma * lam * next_advantage
        # a dropped position is no step of the episode: what follows it follows what stands before it
        next_value = torch.where(keep[t], value[t], next_value)
        next_advantage = torch.where(keep[t], advantage, next_advantage)
        advantages[t] = advantage
    advantages.masked_fill_(~keep, 0.0)
    returns = advantages + value
    return advantages.T.contiguous().to(rewards.dtype), returns.T.contiguous().to(rewards.dtype)
