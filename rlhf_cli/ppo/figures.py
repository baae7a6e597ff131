"""Figures of an iteration's responses, under the names that dashboards know (TRL's; see docs/ppo.md)."""

from __future__ import annotations

import math

from torch import Tensor

from rlhf_cli.align.collect import Judged
from rlhf_cli.align.figures import reward_figures
from rlhf_cli.ops.kl import kl_estimate, negative_kl_test
from rlhf_cli.ops.masks import masked_sum
from rlhf_cli.ppo.experience import Experience


def objective_figures(experience: Experience, judged: Judged, kl_coef: float, rewards: Tensor) -> dict[str, float]:
    """objective/...: means over the R responses of what the policy is trained on. rewards (R, T): per token.

    kl, kl_k2, kl_k3 and entropy are sums over a response's tokens (nats per response); entropy is that of the sampled
    tokens, -log p; ref_perplexity that of the responses under the reference. non_score_reward is the KL penalty,
    rlhf_reward what is maximised.
    """
    keep, logprobs, reference = experience.keep_mask, experience.logprobs, experience.ref_logprobs
    per_response = lambda values: masked_sum(values, keep, dim=-1).double()
    kl = {kind: per_response(kl_estimate(logprobs, reference, kind)) for kind in ("k1", "k2", "k3")}
    total = per_response(rewards)
    scores = experience.scores.double()
    figures = {
        "objective/kl": kl["k1"].mean().item(),
        "objective/kl_stderr": kl["k1"].std().item() / math.sqrt(len(scores)) if len(scores) > 1 else 0.0,
        "objective/kl_k2": kl["k2"].mean().item(),
        "objective/kl_k3": kl["k3"].mean().item(),
        "objective/kl_coef": kl_coef,
        "objective/entropy": -per_response(logprobs).mean().item(),
        "objective/non_score_reward": (total - scores).mean().item(),
        "objective/rlhf_reward": total.mean().item(),
        "objective/scores": scores.mean().item(),
        "objective/scores_std": scores.std().item() if len(scores) > 1 else 0.0,
        "objective/ref_perplexity": math.exp(min(700.0, -masked_sum(reference, keep).item() / int(keep.sum()))),
        "objective/reward": judged.reward.mean().item(),
    }
    return figures | reward_figures(judged)


def negative_kl(experience: Experience) -> str | None:
    """A warning when the estimate of KL is negative beyond chance: KL cannot be, so the sampler is not the policy."""
    estimates = kl_estimate(experience.logprobs, experience.ref_logprobs, "k1")
    found = negative_kl_test(estimates, experience.keep_mask)
    if not found.alarm:
        return None
    return (
        f"KL to the reference is estimated as {found.mean:.3f} ± {found.stderr:.3f} nats per response, but no KL is"
        " negative: the texts were not drawn from softmax(logits / temperature). generation.top_k, top_p and"
        " min_new_tokens change what is drawn (min_new_tokens does it most, by forbidding the end), and so do rules"
        " that discard; turn them off"
    )
