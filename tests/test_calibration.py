"""Measures of how far scores can be trusted, by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rlhf_cli.ops.calibration import (
    Bin,
    accuracy_stderr,
    class_confidence,
    correlation,
    expected_calibration_error,
    pair_confidence,
    reliability,
    right_shares,
)


def test_pair_confidence_is_that_of_the_predicted_winner() -> None:
    ln3, ln9 = math.log(3), math.log(9)
    confidence, correct = pair_confidence(np.array([ln3, -ln9, 0.0, 1e4], np.float32))
    assert confidence.tolist() == pytest.approx([0.75, 0.9, 0.5, 1.0])  # σ(ln 3) = 3/4, σ(ln 9) = 9/10
    assert correct.tolist() == [1, 0, 0.5, 1]
    assert right_shares(np.array([5, 3, 3]) - np.array([4, 3, 8])).tolist() == [1, 0.5, 0]


def test_class_confidence() -> None:
    logits = np.log(np.array([[0.2, 0.8], [0.6, 0.4], [0.5, 0.5]])) + 700  # no overflow
    confidence, correct = class_confidence(logits, np.array([1, 1, 0]))
    assert confidence.tolist() == pytest.approx([0.8, 0.6, 0.5])
    assert correct.tolist() == [1, 0, 1]


def test_reliability_by_hand() -> None:
    # five bins over [½, 1]: .5-.6 .6-.7 .7-.8 .8-.9 .9-1; the edge .6 belongs to the second, 1 to the last
    bins = reliability(np.array([0.5, 0.6, 0.65, 1.0, 0.95]), np.array([0.5, 1, 0, 1, 1]), bins=5, low=0.5)
    assert bins == [
        pytest.approx(Bin(0.5, 0.6, 1, 0.5, 0.5)),
        pytest.approx(Bin(0.6, 0.7, 2, 0.625, 0.5)),
        pytest.approx(Bin(0.9, 1.0, 2, 0.975, 1.0)),
    ]
    # (1 · 0 + 2 · 0.125 + 2 · 0.025) / 5
    assert expected_calibration_error(bins) == pytest.approx(0.06)
    assert reliability(np.zeros(0), np.zeros(0)) == []
    assert expected_calibration_error([]) == 0


def test_ece_of_an_honest_and_of_a_boastful_model() -> None:
    rng = np.random.default_rng(0)
    differences = rng.normal(0, 2, 200_000)
    outcomes = rng.random(200_000) < 1 / (1 + np.exp(-differences))  # Bradley-Terry samples
    margins = np.where(outcomes, differences, -differences)
    ece = expected_calibration_error(reliability(*pair_confidence(margins), low=0.5))
    assert ece < 0.005  # the noise of a bin of 20 000 is ½/√20 000 = 0.0035 at most
    assert expected_calibration_error(reliability(*pair_confidence(5 * margins), low=0.5)) > 0.1


def test_accuracy_stderr() -> None:
    # p = ¾ of 4: √(¾ · ¼ / 4) = 0.216506
    assert accuracy_stderr(np.array([1, 1, 0, 1.0])) == pytest.approx(0.216506, abs=1e-6)
    # shares of two rankings: mean ½, std ½, over √2
    assert accuracy_stderr(np.array([1.0, 0.0])) == pytest.approx(0.5 / math.sqrt(2))
    assert accuracy_stderr(np.array([1.0])) == 0


def test_correlation() -> None:
    x = np.array([1, 2, 3, 4])
    assert correlation(x, 5 - 2 * x) == pytest.approx(-1)
    # dx = -1.5 -.5 .5 1.5, dy = -.5 .5 -.5 .5: 1 / √(5 · 1)
    assert correlation(x, np.array([0, 1, 0, 1])) == pytest.approx(1 / math.sqrt(5))
    assert correlation(x, np.full(4, 0.1)) == 0
    assert correlation(np.array([1.0]), np.array([2.0])) == 0
