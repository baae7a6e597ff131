"""Which responses of an iteration are learnt from, and as which rows of tokens.

Shapes: N responses of an iteration, S of them learnt from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rlhf_cli.align.collect import Answer
from rlhf_cli.assemble import Text
from rlhf_cli.data.token_rows import TokenRows
from rlhf_cli.data.tokenize import encode_pieces, make_encoder
from rlhf_cli.ops.ranking import response_ranks, select_top, soft_weights
from rlhf_cli.raft.record import Row
from rlhf_cli.raft.samples import Samples
from rlhf_cli.reward.rules import rule_names
from rlhf_cli.schema import RaftConfig

NEGLIGIBLE = 1e-6  # a smaller soft weight is not worth its forward pass


@dataclass
class Selection:
    """scores (N,): what is ranked, -inf for a discarded response; ranks (N,): 1 = best, within its prompt (local) or
    of all (top); chosen (S,): numbers of the responses that are learnt from, ascending; weights (S,): None = alike."""

    scores: Tensor
    ranks: Tensor
    chosen: Tensor
    weights: Tensor | None

    def num_skipped(self, groups: Tensor) -> int:
        """Prompts of which every response is discarded. groups (N,)."""
        kept = torch.isfinite(self.scores)
        return len(groups.unique()) - len(groups[kept].unique())


def select(samples: Samples, config: RaftConfig) -> Selection:
    """A function of rewards, rules and KL."""
    settings, judged = config.raft, samples.judged
    scores = judged.with_rules(judged.reward)
    if settings.kl_coef:
        scores = scores - settings.kl_coef * samples.kl
    scores = scores.masked_fill(judged.rules.discard, float("-inf"))
    groups = samples.groups
    among = groups if settings.strategy == "local" else torch.zeros_like(groups)
    ranks = response_ranks(scores, among)
    if settings.soft_temperature is None:
        return Selection(scores, ranks, select_top(scores, settings.strategy, settings.top_fraction, groups), None)
    weights = soft_weights(scores, settings.soft_temperature, among)
    chosen = (weights > NEGLIGIBLE).nonzero().squeeze(1)
    return Selection(scores, ranks, chosen, weights[chosen])


def describe_choice(selection: Selection, samples: Samples, config: RaftConfig) -> list[Row]:
    """For each response: what it was ranked by, its rank, whether it is learnt from, and if not, why."""
    kept = set(selection.chosen.tolist())
    of_config = config.reward.rules
    final = {name for name, rule in zip(rule_names(of_config), of_config, strict=True) if rule.action == "discard"}
    rows: list[Row] = []
    for i, score in enumerate(selection.scores.tolist()):
        discarded = score == float("-inf")
        rules = [name for name, hit in samples.judged.rules.hits.items() if hit[i]]
        reasons = ", ".join(name for name in rules if name in final)
        row: Row = {
            "score": None if discarded else score,
            "rank": None if discarded else int(selection.ranks[i]),
            "kept": i in kept,
            "why_not": None if i in kept else f"discarded: {reasons}" if discarded else "others rank higher",
            "rules": rules,
        }
        rows.append(row)
    if selection.weights is not None:
        for i, weight in zip(selection.chosen.tolist(), selection.weights.tolist(), strict=True):
            rows[i]["weight"] = weight
    return rows


def training_rows(answers: Sequence[Answer], text: Text, closing: str, always_eos: bool, max_length: int) -> TokenRows:
    """Prompts with their responses; the responses are trained, with an EOS.

    The response's own tokens, without a stop string; where that begins inside a token, the text is tokenised again.
    closing: what the template has behind a reply. always_eos: also behind a response that reached its longest length.
    """
    encoder = make_encoder(text.tokenizer)
    (end,) = encode_pieces(encoder, [closing], first=False) if closing else [np.zeros(0, np.int32)]
    sequences, trained = [], []
    for answer in answers:
        response, dialogue = answer.response, answer.prompt.messages is not None
        tokens = response.token_ids[: response.num_text_tokens]
        if response.num_text_tokens is None:
            (tokens,) = encode_pieces(encoder, [response.text], first=False)
        if response.ending == "eos":
            tokens = response.token_ids
        elif response.ending == "stop" or always_eos:
            tokens = np.concatenate([tokens, end if dialogue else end[:0], [encoder.eos_id]])
        prompt = answer.prompt.token_ids
        sequences.append(np.concatenate([prompt, tokens]).astype(np.int32)[:max_length])
        trained.append(np.arange(len(sequences[-1])) >= len(prompt))
    offsets = np.concatenate([[0], np.cumsum([len(s) for s in sequences])]).astype(np.int64)
    digests, repeats = np.zeros(len(sequences), np.uint64), np.ones(len(sequences), np.int64)
    return TokenRows(np.concatenate(sequences), np.concatenate(trained), offsets, digests, repeats)
