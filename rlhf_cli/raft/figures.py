"""Figures of a RAFT iteration, under the names of docs/raft.md.

Shapes: N responses, P of them as the policy writes them (one to each prompt), S selected.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from rlhf_cli.align.figures import text_figures
from rlhf_cli.ops.diversity import distinct_n, msttr, ngram_entropy, self_bleu, unique_n
from rlhf_cli.raft.samples import Samples, unselected
from rlhf_cli.raft.selection import Selection
from rlhf_cli.schema import RaftConfig

# Whose responses are compared with each other, each with each, which takes time: prompts, responses to each.
COMPARED = 32, 4
# Of text_figures, those that stand among raft's own.
RENAMED = {
    "text/length": "raft/length",
    "text/distinct_1": "raft/distinct_1",
    "text/distinct_2": "raft/distinct_2",
}


def reward_figures(samples: Samples, selection: Selection, config: RaftConfig) -> dict[str, float]:
    """Rewards of the policy and of what is selected, with rules' scores; what is discarded; KL to the reference (nats
    per response, of those that were measured) and the reference's perplexity on them."""
    judged, groups = samples.judged, samples.groups
    rewards, own = judged.with_rules(judged.reward), list(unselected(config))
    chosen = rewards[selection.chosen]
    figures = {
        "raft/reward_policy": rewards[own].mean().item(),
        "raft/reward_policy_std": rewards[own].std().item() if len(own) > 1 else 0.0,
        "raft/reward_selected": _mean(chosen, selection.weights),
        "raft/selected": float(len(chosen)),
        "raft/discarded": judged.rules.discard.double().mean().item(),
        "raft/skipped_prompts": float(selection.num_skipped(groups)),
    }
    measured = ~torch.isnan(samples.kl)
    kl, count = samples.kl[measured], int(measured.sum())
    lengths = torch.tensor([len(answer.response.token_ids) for answer in samples.answers])[measured]
    per_token = samples.ref_logprobs[measured].sum().item() / int(lengths.sum())
    figures |= {
        "raft/kl": kl.mean().item(),
        "raft/kl_stderr": kl.std().item() / math.sqrt(count) if count > 1 else 0.0,
        "raft/perplexity": math.exp(min(700.0, -per_token)),
    }
    figures |= {f"reward/{name}": values[own].mean().item() for name, values in judged.by_source.items()}
    return figures | {f"rules/{name}": hit.double().mean().item() for name, hit in judged.rules.hits.items()}


def diversity_figures(
    samples: Samples, selection: Selection, config: RaftConfig, tokenizer: Any, vocab: int
) -> dict[str, float]:
    """text/... and the measures of diversity that the article quotes, of the policy's own responses in tokens without
    their ends; distinct-2 of the selected ones beside, nan of none; how alike the responses to a prompt are."""
    responses = [samples.answers[i].response for i in unselected(config)]
    tokens = [r.token_ids[: r.num_text_tokens].tolist() for r in responses]
    figures = text_figures(responses, tokenizer, vocab)
    figures = {RENAMED.get(name, name): value for name, value in figures.items()}
    selected = [samples.answers[i].response for i in selection.chosen.tolist()]
    chosen = [r.token_ids[: r.num_text_tokens].tolist() for r in selected]
    return figures | {
        "raft/unique_1": float(unique_n(tokens, 1)),
        "raft/unique_2": float(unique_n(tokens, 2)),
        "raft/msttr_100": msttr(tokens, 100),
        "raft/entropy_1": ngram_entropy(tokens, 1),
        "raft/entropy_2": ngram_entropy(tokens, 2),
        "raft/distinct_2_selected": distinct_n(chosen, 2) if chosen else math.nan,
        "raft/self_bleu": self_bleu(_groups(samples, config)) if config.raft.samples_per_prompt > 1 else math.nan,
    }


def _groups(samples: Samples, config: RaftConfig) -> list[list[list[int]]]:
    """The tokens of the first responses to each of the first prompts, without their ends."""
    prompts, responses = COMPARED
    first = list(unselected(config))[:prompts]
    count = min(responses, config.raft.samples_per_prompt)
    groups = [[answer.response for answer in samples.answers[i : i + count]] for i in first]
    return [[r.token_ids[: r.num_text_tokens].tolist() for r in group] for group in groups]


def _mean(values: Tensor, weights: Tensor | None) -> float:
    """nan of nothing."""
    if weights is not None and len(values):
        return (values * weights).sum().item() / weights.sum().item()
    return values.mean().item() if len(values) else math.nan
