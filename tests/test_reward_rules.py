"""Rules on responses: each kind by hand, and against slow references."""

from __future__ import annotations

import re
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_cli.errors import ConfigError
from rlhf_cli.reward.rules import Rules, has_repeated_ngram, has_run, rule_names
from rlhf_cli.schema import RuleConfig, build


def hit(rule: RuleConfig, text: str, num_tokens: int = 9) -> bool:
    (found,) = Rules([rule]).apply([text], [num_tokens]).hits.values()
    return bool(found)


def test_a_pattern_is_searched_anywhere() -> None:
    stray = RuleConfig(pattern="#")
    assert hit(stray, "It is so. #Human")
    assert not hit(stray, "It is so.")
    assert hit(RuleConfig(pattern=r"^as an ai\b"), "as an ai I must")
    assert not hit(RuleConfig(pattern=r"^ai"), "as ai")


@pytest.mark.parametrize(
    ("text", "times", "expected"),
    [
        ("hahaha", 3, True), ("hahah", 3, False), ("!!!!", 4, True), ("!!!", 4, False),
        (":-) :-) :-)", 3, True), (":-):-):-)", 3, True), (":-) so :-) so :-)", 3, False),
        ("\U0001f600\U0001f600\U0001f600", 3, True), ("\U0001f600 \U0001f600\n\U0001f600", 3, True),
        ("very very\tvery much", 3, True), ("very, very, very much", 3, False),
        ("12345678123456781234567", 3, False), ("123456781234567812345678", 3, True),
        ("123456789" * 3, 3, False),  # nine characters are more than a piece; between blanks any word is one
        ("123456789 " * 3, 3, True), ("a a", 2, True), ("aa", 2, True), ("ab", 2, False), ("", 2, False),
        ("a\n\n\n\nb", 4, False), ("    ", 4, False),
    ],
)  # fmt: skip
def test_runs_by_hand(text: str, times: int, expected: bool) -> None:
    assert has_run(text, times) is expected
    assert hit(RuleConfig(repeat=times), text) is expected


@settings(max_examples=300)
@given(st.text(alphabet="ab \n☺", max_size=40), st.integers(2, 5))
def test_runs_against_a_regular_expression(text: str, times: int) -> None:
    close = re.search(rf"(\S{{1,8}})\1{{{times - 1}}}", text)
    apart = re.search(rf"(?<!\S)(\S+)(?:\s+\1){{{times - 1}}}(?!\S)", text)
    assert has_run(text, times) == bool(close or apart)


def test_ngrams_by_hand() -> None:
    text = "to be or not to be is to be"
    assert has_repeated_ngram(text, 2, 3)  # "to be" three times, never in a row
    assert not has_repeated_ngram(text, 2, 4)
    assert not has_repeated_ngram(text, 3, 2)
    assert has_repeated_ngram("a a a a", 2, 3)  # at 0, 1 and 2
    assert not has_repeated_ngram("", 1, 2)
    assert hit(RuleConfig(repeat=3, ngram=2), text)
    assert not hit(RuleConfig(repeat=3), text)


@given(st.lists(st.sampled_from("ab"), max_size=15), st.integers(1, 4), st.integers(2, 5))
def test_ngrams_against_counting_each(words: list[str], n: int, times: int) -> None:
    grams = [words[i : i + n] for i in range(len(words) - n + 1)]
    assert has_repeated_ngram(" ".join(words), n, times) == any(grams.count(g) >= times for g in grams)


def test_min_tokens_counts_tokens_without_the_end() -> None:
    rule = RuleConfig(min_tokens=3)
    assert hit(rule, "a long text", 2)
    assert not hit(rule, "", 3)


def test_scores_discards_and_their_mixture() -> None:
    rules = Rules(
        [
            RuleConfig(pattern="#", score=-2.0),
            RuleConfig(pattern="!", score=-5.0),
            RuleConfig(pattern="x", action="discard", score=-9.0),
        ]
    )
    found = rules.apply(["fine", "#", "!#", "x", "x!"], [1] * 5)
    assert {name: hits.tolist() for name, hits in found.hits.items()} == {
        "#": [False, True, True, False, False],
        "!": [False, False, True, False, True],
        "x": [False, False, False, True, True],
    }
    # of several the lowest; a discard has no score of its own
    expected = torch.tensor([torch.nan, -2, -5, torch.nan, -5], dtype=torch.float64)
    assert torch.equal(found.score.isnan(), expected.isnan())
    assert torch.equal(found.score.nan_to_num(0), expected.nan_to_num(0))
    assert found.discard.tolist() == [False, False, False, True, True]


def test_no_rules_and_no_texts() -> None:
    found = Rules([]).apply(["a"], [1])
    assert (found.hits, found.discard.tolist()) == ({}, [False])
    assert found.score.isnan().all()
    assert found.score.dtype == torch.float64
    empty = Rules([RuleConfig(pattern="#")]).apply([], [])
    assert empty.hits["#"].shape == empty.score.shape == (0,)
    assert empty.hits["#"].dtype == torch.bool


def test_names() -> None:
    rules = [
        RuleConfig(pattern="#"), RuleConfig(pattern="#", action="discard"), RuleConfig(repeat=4),
        RuleConfig(repeat=4, ngram=3), RuleConfig(min_tokens=5), RuleConfig(pattern="x", name="#_2"),
    ]  # fmt: skip
    assert rule_names(rules) == ["#", "#_3", "repeated_4_times", "3_words_4_times", "under_5_tokens", "#_2"]


def test_own_patterns_take_linear_time() -> None:
    """What makes a backtracking expression slow: long runs that almost repeat."""
    hostile = ["ab" * 49 + "c", "a" * 99 + " ", "a b" * 40, "aaaaaaab"]
    rules = Rules([RuleConfig(repeat=2000), RuleConfig(repeat=2000, ngram=2)])
    began = time.process_time()
    for text in hostile:
        rules.apply([(text * (200_000 // len(text)))], [1])
    assert time.process_time() - began < 10  # about 1 s; a quadratic one takes minutes


def test_what_a_rule_may_say() -> None:
    for values in ({}, {"pattern": "#", "repeat": 3}, {"pattern": "("}, {"min_tokens": 2, "ngram": 2}):
        with pytest.raises(ConfigError):
            build(RuleConfig, values)
