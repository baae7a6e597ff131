"""What is said of the scores of held-out comparisons, against loops over rows and pairs."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_cli.comparison_objective import class_weights
from rlhf_cli.data import comparison_rows
from rlhf_cli.data.comparison_rows import ComparisonRows
from rlhf_cli.data.comparisons import PreparedComparisons
from rlhf_cli.judgement import judge
from rlhf_cli.schema import ComparisonConfig

# of each ranking its answers: (tokens, rank, score)
ANSWER = st.tuples(
    st.lists(st.integers(1, 2), min_size=1, max_size=6), st.integers(1, 3), st.integers(-4, 4).map(lambda x: x / 2)
)
RANKING = st.lists(ANSWER, min_size=2, max_size=5).filter(lambda answers: len({rank for _, rank, _ in answers}) > 1)
Ranking = list[tuple[list[int], int, float]]


def rows_of(rankings: list[Ranking]) -> ComparisonRows:
    answers = [answer for ranking in rankings for answer in ranking]
    count = len(rankings)
    return ComparisonRows(
        input_ids=np.array([token for ids, _, _ in answers for token in ids], np.int32),
        offsets=np.cumsum([0, *(len(ids) for ids, _, _ in answers)]),
        groups=np.cumsum([0, *map(len, rankings)]),
        ranks=np.array([rank for _, rank, _ in answers], np.float64),
        margins=np.zeros(count),
        labels=np.full(count, -1),
        sequence_digests=np.zeros(len(answers), np.uint64),
        row_numbers=np.arange(count) * 2,
        sources=np.zeros(count, np.int32),
        repeats=np.ones(count, np.int64),
        lines=np.arange(count) * 2 + 1,
        paths=("a.jsonl",),
    )


def common_start(texts: list[list[int]]) -> int:
    return len(list(itertools.takewhile(lambda tokens: len(set(tokens)) == 1, zip(*texts, strict=False))))


def share(difference: float) -> float:
    return 1.0 if difference > 0 else 0.5 if difference == 0 else 0.0


@given(st.lists(RANKING, min_size=1, max_size=7), st.sampled_from([1, 2, 128]))
@settings(max_examples=100, deadline=None)
def test_figures_of_rankings_against_loops(rankings: list[Ranking], at_a_time: int) -> None:
    right, longer, margins, losses, means = [], [], [], [], []
    best, worst, lengths = [], [], []
    for ranking in rankings:
        start = common_start([ids for ids, _, _ in ranking])
        lengths += [len(ids) - start for ids, _, _ in ranking]
        pairs = [(a, b) for a in ranking for b in ranking if a[1] < b[1]]
        right.append(np.mean([share(a[2] - b[2]) for a, b in pairs]))
        longer.append(np.mean([share(len(a[0]) - len(b[0])) for a, b in pairs]))
        margins.append(np.mean([a[2] - b[2] for a, b in pairs]))
        losses.append(np.mean([math.log1p(math.exp(b[2] - a[2])) for a, b in pairs]))
        means.append(np.mean([score for _, _, score in ranking]))
        ranks = [rank for _, rank, _ in ranking]
        best += [score for _, rank, score in ranking if rank == min(ranks)]
        worst += [score for _, rank, score in ranking if rank == max(ranks)]
    rows, scores = rows_of(rankings), np.array([score for ranking in rankings for _, _, score in ranking])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison_rows, "COMPARED_GROUPS", at_a_time)
        judged = judge("rankings", (), rows, scores[:, None], ComparisonConfig(num_worst=1), None)
    assert (rows.lengths - rows.common_starts[rows.owners]).tolist() == lengths
    wanted = {
        "loss": np.mean(losses), "accuracy": np.mean(right), "accuracy_stderr": np.std(right) / math.sqrt(len(right)),
        "margin": np.mean(margins), "mean_reward": np.mean(means), "chosen_mean": np.mean(best),
        "chosen_std": np.std(best), "rejected_mean": np.mean(worst), "rejected_std": np.std(worst),
        "longer_wins": np.mean(longer),
    }  # fmt: skip
    if len(right) == 1:
        wanted["accuracy_stderr"] = 0.0
    assert {name: judged.figures[name] for name in wanted} == pytest.approx(wanted, abs=1e-12)
    lowest = min(a[2] - b[2] for ranking in rankings for a in ranking for b in ranking if a[1] < b[1])
    (shown,) = judged.worst
    assert shown["margin"] == lowest
    ranking = rankings[(shown["line"] - 1) // 2]
    whole = [[*shown["prompt"], *shown[side]] for side in ("chosen", "rejected")]
    assert all(text in [ids for ids, _, _ in ranking] for text in whole)
    assert len(shown["prompt"]) == common_start([ids for ids, _, _ in ranking])


def test_balanced_class_weights_count_repeats() -> None:
    """Two rows of the label 0 and one of the label 1 that an epoch sees four times: 6 / (2 x 2) and 6 / (2 x 4)."""
    rows = rows_of([[([1], 1, 0.0)]] * 3)
    rows = dataclasses.replace(rows, labels=np.array([0, 1, 0]), repeats=np.array([1, 4, 1]))
    data = PreparedComparisons(rows, None, [], "", "labels", ("a", "b"), templated=False)
    assert class_weights(data).tolist() == [1.5, 0.75]
