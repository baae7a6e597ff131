"""What is said of a classifier's held-out rows when there are few labels, and when there are hundreds."""

from __future__ import annotations

import numpy as np
import pytest

from rlhf_cli.data.comparison_rows import ComparisonRows
from rlhf_cli.judgement import Judgement, judge
from rlhf_cli.schema import ComparisonConfig


def judged(truth: list[int], named: list[int], num_labels: int) -> Judgement:
    """Of rows with these labels, of which a model is sure that they have those."""
    count = len(truth)
    rows = ComparisonRows(
        input_ids=np.zeros(count, np.int32), offsets=np.arange(count + 1), groups=np.arange(count + 1),
        ranks=np.zeros(count), margins=np.zeros(count), labels=np.array(truth),
        sequence_digests=np.zeros(count, np.uint64), row_numbers=np.arange(count), sources=np.zeros(count, np.int32),
        repeats=np.ones(count, np.int64), lines=np.arange(count) + 1, paths=("a.jsonl",),
    )  # fmt: skip
    logits = np.zeros((count, num_labels))
    logits[np.arange(count), named] = 5.0
    names = tuple(f"l{i}" for i in range(num_labels))
    return judge("labels", names, rows, logits, ComparisonConfig(), None)


def test_few_labels_are_all_shown() -> None:
    found = judged([0, 1, 2, 2], [0, 2, 2, 2], 3)
    assert found.figures["accuracy"] == 0.75
    assert [name for name in found.figures if "length" in name] == [f"length_correlation_l{i}" for i in range(3)]
    assert set(found.histogram) == {"edges", "l0", "l1", "l2"}
    title, lines = found.tables[0]
    assert title == "labels of the evaluation rows"
    assert lines == [
        ("l0", "1 of 1 right (1 as l0)"),
        ("l1", "0 of 1 right (1 as l2)"),
        ("l2", "2 of 2 right (2 as l2)"),
    ]


@pytest.mark.parametrize("num_labels", [20, 21, 300])
def test_of_hundreds_those_with_the_most_mistakes(num_labels: int) -> None:
    truth = [*range(num_labels), num_labels - 1]
    found = judged(truth, [*range(num_labels - 1), 0, 1], num_labels)  # both rows of the last label are wrong
    assert found.figures["accuracy"] == pytest.approx((num_labels - 1) / (num_labels + 1))
    assert list(found.reward["by_label"]) == [f"l{i}" for i in range(num_labels)]  # nothing is left out here
    _, lines = found.tables[0]
    assert (f"l{num_labels - 1}", "0 of 2 right (1 as l0, 1 as l1)") in lines
    assert sum(name.startswith("length_correlation") for name in found.figures) == (20 if num_labels == 20 else 0)
    if num_labels > 20:
        assert len(lines) == 21
        assert lines[-1] == ("...", f"{num_labels - 20} further labels with fewer mistakes")
        assert set(found.histogram) == {"edges", "all labels"}
