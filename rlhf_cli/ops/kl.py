"""KL(π‖ref) from samples of π: estimates per token, the alarm for impossible estimates, the coefficient's controller.

Shapes: R responses, T tokens of the longest; keep_mask (R, T) bool, True = a token of the response.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_cli.ops.masks import masked_sum
from rlhf_cli.schema import AlgorithmConfig

MAX_KL_ERROR = 0.2
"""Clip of the controller's relative error (Ziegler et al., arXiv 1909.08593, section 2.2)."""

MIN_RESPONSES = 8
"""Fewer tell nothing: of 8 honest ones, t with 7 degrees of freedom is below -3 in 1 % of the cases; of 2, in 10 %."""


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: str) -> Tensor:
    """One number per sampled token, in fp32 (fp64 of fp64); the inputs' shape, (B, T).

    With r = π_ref/π at tokens drawn from π: k1 = −log r, k2 = ½ (log r)², k3 = (r − 1) − log r. k1 and k3 have the
    mean KL(π‖ref), k3 is never negative; k2 has a bias of third order in log r (Schulman 2020,
    http://joschu.net/blog/kl-approx.html).
    """
    assert logprobs.shape == ref_logprobs.shape, (logprobs.shape, ref_logprobs.shape)
    wide = torch.promote_types(logprobs.dtype, torch.float32)
    k1 = logprobs.to(wide) - ref_logprobs.to(wide)
    if kind == "k1":
        return k1
    if kind == "k2":
        return 0.5 * k1.square()
    if kind != "k3":
        raise ValueError(f"kind {kind!r}; allowed: k1, k2, k3")
    # expm1, not exp − 1: near r = 1 the difference would be all rounding error
    return torch.expm1(-k1) + k1


class KlTest(NamedTuple):
    """mean, stderr: of k1 summed over each response, in nats; alarm: an honest sampler would hardly ever give this."""

    mean: float
    stderr: float
    alarm: bool


def negative_kl_test(k1: Tensor, keep_mask: Tensor) -> KlTest:
    """Whether mean + 3 SE < 0: KL cannot be negative, so the sampler was not π (filters, masked EOS, another τ, stale
    weights).

    k1, keep_mask (R, T). Responses, not tokens, are what is drawn independently of each other: the tokens of one share
    their fate, and a standard error over tokens would be too small.
    """
    sums = masked_sum(k1.double(), keep_mask, dim=1)
    count = len(sums)
    mean = float(sums.mean())
    stderr = float(sums.std() / math.sqrt(count)) if count > 1 else math.inf
    return KlTest(mean, stderr, alarm=count >= MIN_RESPONSES and mean + 3 * stderr < 0)


def next_kl_coef(kl_coef: float, kl: float, num_episodes: int, settings: AlgorithmConfig) -> float:
    """The coefficient after an iteration of num_episodes responses with this KL; unchanged by a fixed controller.

    kl: nats per response (summed over tokens, averaged over responses). Adaptive: β (1 + clip(KL/target − 1, ±0.2)
    n/horizon), arXiv 1909.08593, section 2.2.
    """
    if settings.kl_controller == "fixed":
        return kl_coef
    assert not math.isnan(kl)
    error = min(max(kl / settings.kl_target - 1, -MAX_KL_ERROR), MAX_KL_ERROR)
    factor = 1 + error * num_episodes / settings.kl_horizon
    assert factor > 0, f"{num_episodes} episodes in one step of a horizon of {settings.kl_horizon}"
    return kl_coef * factor
