"""Measures of variety by hand, and against plain lists of n-grams."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_cli.ops.diversity import (
    distinct_n,
    expectation_adjusted_distinct,
    msttr,
    ngram_entropy,
    repetition,
    self_bleu,
    separator_ratio,
    unique_n,
)

CORPUS = [["a", "b", "a", "b"], ["b", "a"], ["c"]]
SAMPLES = st.lists(st.lists(st.sampled_from([0, 1, 2, "x", "\n"]), max_size=8), max_size=5)
N = st.integers(1, 4)


def test_ngrams_by_hand() -> None:
    # 7 tokens: a 3, b 3, c 1. Bigrams: ab, ba, ab | ba: not b|b between the samples.
    assert distinct_n(CORPUS, 1) == 3 / 7
    assert distinct_n(CORPUS, 2) == 2 / 4
    assert unique_n(CORPUS, 1) == 1
    assert unique_n(CORPUS, 2) == 0
    assert unique_n(CORPUS, 3) == 2  # aba, bab
    assert ngram_entropy(CORPUS, 2) == 1.0  # two bigrams, half each
    assert ngram_entropy(CORPUS, 1) == pytest.approx(6 / 7 * math.log2(7 / 3) + math.log2(7) / 7)
    assert distinct_n(CORPUS, 5) == ngram_entropy(CORPUS, 5) == unique_n(CORPUS, 5) == 0


@settings(max_examples=80, deadline=None)
@given(samples=SAMPLES, n=N)
def test_ngrams_against_lists(samples: list[list[int | str]], n: int) -> None:
    grams = [tuple(s[i : i + n]) for s in samples for i in range(len(s) - n + 1)]
    different = list(dict.fromkeys(grams))
    assert distinct_n(samples, n) == pytest.approx(len(different) / len(grams) if grams else 0)
    assert unique_n(samples, n) == sum(1 for g in different if grams.count(g) == 1)
    shares = [grams.count(g) / len(grams) for g in different]
    assert ngram_entropy(samples, n) == pytest.approx(-sum(p * math.log2(p) for p in shares), abs=1e-12)


def test_expectation_adjusted_distinct_by_hand() -> None:
    # 7 draws from 5 tokens: 5 (1 − (4/5)^7) = 3.951424 different ones expected
    assert expectation_adjusted_distinct(CORPUS, 1, vocab_size=5) == pytest.approx(3 / 3.951424)
    # 4 bigrams from 25: 25 (1 − (24/25)^4)
    assert expectation_adjusted_distinct(CORPUS, 2, vocab_size=5) == pytest.approx(2 / (25 * (1 - 0.96**4)))
    # From very many possible ones all are expected to be different
    assert expectation_adjusted_distinct(CORPUS, 4, vocab_size=150_000) == pytest.approx(1.0)
    assert expectation_adjusted_distinct([["a", "a"]], 1, vocab_size=1) == 1
    assert expectation_adjusted_distinct([["a"]], 2, vocab_size=5) == 0


def test_msttr_by_hand() -> None:
    # Windows of 3 of a b a | b b a | c: 2/3 and 2/3; the rest is left out. Of 2: ab, ab, ba -> 1
    assert msttr(CORPUS, 3) == pytest.approx(2 / 3)
    assert msttr(CORPUS, 2) == 1
    assert msttr(CORPUS) == 3 / 7  # no window of 100
    assert msttr([list(range(100)), [0] * 100, [1]]) == pytest.approx((1 + 0.01) / 2)
    assert msttr([]) == msttr([[], []]) == 0


@settings(max_examples=50, deadline=None)
@given(samples=SAMPLES, window=st.integers(1, 6))
def test_msttr_against_lists(samples: list[list[int | str]], window: int) -> None:
    tokens = [t for s in samples for t in s]
    if len(tokens) < window:
        window = max(1, len(tokens))
    ratios = []
    while len(tokens) >= window:
        ratios.append(len(set(tokens[:window])) / window)
        tokens = tokens[window:]
    assert msttr(samples, window) == pytest.approx(sum(ratios) / len(ratios) if ratios else 0)


def test_separator_ratio() -> None:
    assert separator_ratio([["a", " ", "b", ","], ["\n", ".", "c", ";", "..", ""]]) == 4 / 10
    assert separator_ratio([[5, 6, 5], [7]], {5, 7}) == 3 / 4
    assert separator_ratio([[5, 6, 5], [7]], [5, 5]) == 2 / 4
    assert separator_ratio([[]]) == 0


@settings(max_examples=50, deadline=None)
@given(samples=SAMPLES, n=N)
def test_repetition_against_lists(samples: list[list[int | str]], n: int) -> None:
    shares = []
    for s in samples:
        grams = [tuple(s[i : i + n]) for i in range(len(s) - n + 1)]
        if grams:
            shares.append(sum(g in grams[:i] for i, g in enumerate(grams)) / len(grams))
    assert repetition(samples, n) == pytest.approx(sum(shares) / len(shares) if shares else 0)


def test_repetition_by_hand() -> None:
    # abcd abcd: 5 four-grams, of which the last is the first; the short sample has none
    assert repetition([list("abcdabcd"), list("abc")]) == pytest.approx(1 / 5)


def test_self_bleu_by_hand() -> None:
    # abc and abd: 2 of 3 tokens; (1 + 1) of (2 + 1) bigrams: √(2/3 · 2/3), both ways
    assert self_bleu([[list("abc"), list("abd")]], max_n=2) == pytest.approx(2 / 3)
    # a beside aaa: precision 1, brevity e^(1 − 3/1); aaa beside a: 1 of 3 tokens may match, 0 + 1 of 2 + 1 bigrams
    assert self_bleu([[["a"], list("aaa")]], max_n=2) == pytest.approx((math.exp(-2) + 1 / 3) / 2)
    # An n-gram may match as often as it stands in one reference, not in all: each has one a of its three tokens
    assert self_bleu([[list("aab"), list("acd"), list("aef")]], max_n=1) == pytest.approx(1 / 3)
    # The reference nearest in length counts: abc is shorter than abcd, a than abc; abcd (3 of 4) is longer than abc
    three = [list("abc"), ["a"], list("abcd")]
    assert self_bleu([three], max_n=1) == pytest.approx((math.exp(1 - 4 / 3) + math.exp(1 - 3) + 3 / 4) / 3)
    assert self_bleu([[list("abcd")] * 3, [list("abc")]]) == pytest.approx(1.0)  # alone: left out
    assert self_bleu([[list("abc"), list("def")]]) == 0
    assert self_bleu([[[], list("def")]]) == 0
