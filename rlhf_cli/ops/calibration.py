"""How far the scores of a reward model can be trusted: measures on 1-D numpy arrays.

N pairs, prompts or rows; C classes. All sums in fp64.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np


class Bin(NamedTuple):
    """The predictions with low <= confidence < high (the last bin includes 1)."""

    low: float
    high: float
    num: int
    mean_confidence: float
    accuracy: float


def right_shares(differences: np.ndarray) -> np.ndarray:
    """r_better - r_worse (N,) -> (N,): 1 where the better side scores higher, ½ where both score the same, else 0.

    Of scores, its mean is the accuracy; of lengths, the accuracy of "the longer one wins".
    """
    return (differences > 0) + 0.5 * (differences == 0)


def pair_confidence(differences: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(confidence (N,) in [½, 1], correct (N,) in {0, ½, 1}) of a Bradley-Terry model from r_chosen - r_rejected (N,).

    The model predicts the side with the higher score, with probability max(σ(Δ), 1 - σ(Δ)) = σ(|Δ|).
    """
    return 1 / (1 + np.exp(-np.abs(differences.astype(np.float64)))), right_shares(differences)


def class_confidence(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(confidence (N,): the highest probability; correct (N,): whether its class is the label).

    logits (N, C), labels (N,).
    """
    shifted = logits.astype(np.float64) - logits.max(1, keepdims=True)
    return 1 / np.exp(shifted).sum(1), (logits.argmax(1) == labels).astype(np.float64)


def reliability(confidence: np.ndarray, correct: np.ndarray, bins: int = 10, low: float = 0.0) -> list[Bin]:
    """What a model said of its predictions beside how many were right, in `bins` bins of equal width over [low, 1].

    confidence, correct: (N,). low: the least confidence there can be, ½ for pairs. Empty bins are left out.
    DeGroot & Fienberg 1983; Guo et al. (arXiv 1706.04599, section 2).
    """
    edges = np.linspace(low, 1.0, bins + 1)
    number = np.clip(np.searchsorted(edges, confidence, side="right") - 1, 0, bins - 1)
    counts = np.bincount(number, minlength=bins)
    said = np.bincount(number, weights=confidence, minlength=bins)
    right = np.bincount(number, weights=correct, minlength=bins)
    return [
        Bin(float(edges[i]), float(edges[i + 1]), int(n), float(said[i] / n), float(right[i] / n))
        for i, n in enumerate(counts)
        if n
    ]


def expected_calibration_error(bins: list[Bin]) -> float:
    """Σ num/N · |accuracy - mean confidence| (Naeini et al. 2015; arXiv 1706.04599, eq. 3); 0 without predictions."""
    total = sum(b.num for b in bins)
    return sum(b.num * abs(b.accuracy - b.mean_confidence) for b in bins) / max(1, total)


def accuracy_stderr(correct_shares: np.ndarray) -> float:
    """Standard error of the mean of (N,): std/√N, which is √(p(1 - p)/N) where all are 0 or 1; 0 for N < 2.

    N counts what is independent of each other. The pairs of one ranking are not: give the share of each ranking.
    """
    if len(correct_shares) < 2:
        return 0.0
    return float(correct_shares.std() / math.sqrt(len(correct_shares)))


def correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's correlation of x (N,) and y (N,); 0 where a side is constant, and so tells nothing of the other."""
    if len(x) < 2:
        return 0.0
    dx, dy = x.astype(np.float64) - x.mean(dtype=np.float64), y.astype(np.float64) - y.mean(dtype=np.float64)
    # a constant does not always leave exact zeros when its mean is taken away
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.0
    return float((dx / np.linalg.norm(dx) * (dy / np.linalg.norm(dy))).sum())
