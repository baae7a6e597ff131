"""Rules that a response should not hit: a pattern, a repeated piece, repeated n-grams, too few tokens.

Shapes: N responses. Each kind of rule takes time linear in the length of a text, but a user's own pattern.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlhf_cli.schema import RuleConfig

LONGEST_PIECE = 8  # characters: longer ones in a row without blanks are found by ngram, or by a pattern

Test = Callable[[str, int], bool]  # (text, its number of tokens) -> whether it hits the rule


class RuleHits(NamedTuple):
    """hits: name -> (N,) bool; score: (N,) float64, what the response gets instead of its reward, the lowest score of
    the rules it hits, nan where it hits none with action score; discard: (N,) bool, hits one with action discard."""

    hits: dict[str, Tensor]
    score: Tensor
    discard: Tensor


class Rules:
    """The rules of a config, ready to be applied."""

    def __init__(self, configs: Sequence[RuleConfig]):
        self.configs = list(configs)
        self.names = rule_names(configs)
        self.tests = [make_test(config) for config in configs]

    def apply(self, texts: Sequence[str], num_tokens: Sequence[int]) -> RuleHits:
        """texts: responses without their end; num_tokens: of each, its end not counted."""
        assert len(texts) == len(num_tokens)
        hits: dict[str, Tensor] = {}
        score = torch.full((len(texts),), torch.nan, dtype=torch.float64)
        discard = torch.zeros(len(texts), dtype=torch.bool)
        for config, name, test in zip(self.configs, self.names, self.tests, strict=True):
            hit = torch.tensor([test(*given) for given in zip(texts, num_tokens, strict=True)], dtype=torch.bool)
            hits[name] = hit
            if config.action == "discard":
                discard |= hit
            else:  # fmin passes over nan
                score = torch.where(hit, torch.fmin(score, torch.full_like(score, config.score)), score)
        return RuleHits(hits, score, discard)


def rule_names(configs: Sequence[RuleConfig]) -> list[str]:
    """The given names, else what each rule looks for; a name that is taken gets a number (`#`, `#_2` ...)."""
    taken = {config.name for config in configs if config.name}
    names: list[str] = []
    for config in configs:
        wanted = config.name or describe_rule(config)
        name, number = wanted, 1
        while name in names or (config.name is None and name in taken):
            number += 1
            name = f"{wanted}_{number}"
        names.append(name)
    return names


def describe_rule(config: RuleConfig) -> str:
    """What a rule looks for, in a few words."""
    if config.pattern is not None:
        return config.pattern
    if config.min_tokens is not None:
        return f"under_{config.min_tokens}_tokens"
    if config.ngram is not None:
        return f"{config.ngram}_words_{config.repeat}_times"
    return f"repeated_{config.repeat}_times"


def make_test(config: RuleConfig) -> Test:
    """Whether a text hits the rule."""
    if config.pattern is not None:
        search = re.compile(config.pattern).search
        return lambda text, _: search(text) is not None
    if config.min_tokens is not None:
        least = config.min_tokens
        return lambda _, num_tokens: num_tokens < least
    assert config.repeat is not None, "checked by the schema"
    if config.ngram is not None:
        found = partial(has_repeated_ngram, n=config.ngram, times=config.repeat)
    else:
        found = partial(has_run, times=config.repeat)
    return lambda text, _: found(text)


def has_run(text: str, times: int) -> bool:
    """Whether one piece of text stands `times` times in a row: 1 to 8 characters without a blank, directly one after
    the other (ha-ha-ha-ha-, !!!!, an emoji), or a word or emoticon of any length between blanks (very very very).

    Pieces are equal letter by letter. Times >= 2.
    """
    words = max((len(list(same)) for _, same in groupby(text.split())), default=0)
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    shown = np.array([not character.isspace() for character in text], bool)
    return words >= times or any(_has_period(codes, shown, period, times) for period in range(1, LONGEST_PIECE + 1))


def _has_period(codes: np.ndarray, shown: np.ndarray, period: int, times: int) -> bool:
    """Whether `period` characters stand `times` times directly after each other.

    codes (C,): the characters; shown (C,): which of them are no blanks.
    """
    needed = period * (times - 1)  # characters in a row that equal the one a period before
    if len(codes) < needed + period:
        return False
    same = (codes[period:] == codes[:-period]) & shown[period:]
    breaks = np.flatnonzero(~same)
    runs = np.diff(np.concatenate([[-1], breaks, [len(same)]])) - 1
    return bool(runs.max() >= needed)


def has_repeated_ngram(text: str, n: int, times: int) -> bool:
    """Whether some n words in a row occur `times` times, anywhere; words are what stands between blanks. Occurrences
    may overlap: `a a a a` has `a a` three times."""
    words = text.split()
    counts = Counter(zip(*(words[i:] for i in range(n)), strict=False))
    return max(counts.values(), default=0) >= times
