"""An iteration's responses: prompts drawn, answered, and unusable answers drawn again."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from rlhf_cli.align.collect import Answer, CollectingFailed, Collector, response_limits, rule_hits
from rlhf_cli.reward.rules import rule_names
from rlhf_cli.rollout.sampler import Request, Response
from rlhf_cli.schema import PpoConfig

DRAWS = 8  # of a response that a rule discards again and again


class Draw(NamedTuple):
    """Responses to learn from. cursor: the next prompt; redrawn: how many were discarded, by rule."""

    answers: list[Answer]
    cursor: int
    redrawn: dict[str, int]


def draw(collector: Collector, config: PpoConfig, iteration: int, cursor: int) -> Draw:
    """rollout_batch_size responses for an iteration, which no rule discards. Raises StopAsked."""
    settings, rules = config.ppo, config.reward.rules
    size, group_size = settings.rollout_batch_size, settings.group_size
    numbers = [collector.order(cursor + i) for i in range(size // group_size)]
    cursor += len(numbers)
    prompts = [collector.prompts[n] for n in np.repeat(numbers, group_size)]
    answers: dict[int, Response] = {}
    redrawn = {n: 0 for n, rule in zip(rule_names(rules), rules, strict=True) if rule.action == "discard"}
    missing = list(range(size))
    for attempt in range(DRAWS):
        limits = response_limits(config.generation, size, (config.train.seed, iteration, attempt))
        requests = {
            i: Request(prompts[i].token_ids, iteration << 32 | attempt << 24 | i, int(limits[i])) for i in missing
        }
        responses = collector.write(requests, config.generation)
        hits = rule_hits(collector.rules, list(responses.values()))
        answers |= responses
        for name in redrawn:
            redrawn[name] += int(hits.hits[name].sum())
        missing = [i for i, discard in zip(responses, hits.discard.tolist(), strict=True) if discard]
        if not missing:
            break
        if group_size == 1:  # another prompt may be easier to answer
            for i in missing:
                prompts[i], cursor = collector.prompts[collector.order(cursor)], cursor + 1
    else:
        raise CollectingFailed(
            f"after {DRAWS} draws {len(missing)} of {size} responses still hit a rule with action: discard"
            f" ({', '.join(f'{n} {c} times' for n, c in redrawn.items())}); the last one is"
            f" {answers[missing[0]].text[:80]!r}. Loosen reward.rules, or use action: score"
        )
    drawn = [Answer(prompts[i], answers[i], i // group_size) for i in range(size)]
    return Draw(drawn, cursor, redrawn)
