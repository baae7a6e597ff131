"""What a reward model's scores of held-out rows are worth: accuracy, calibration, length bias, moments, worst rows.

S sequences, G rows (a pair, a ranking or a labelled text), P pairs of a better and a worse answer, C labels.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from rlhf_cli.data.comparison_rows import ComparisonRows
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
from rlhf_cli.ops.label_measures import MEASURES, measured
from rlhf_cli.ops.losses import classification_loss, kwise_reward_loss, pairwise_reward_loss, ranked_pairs
from rlhf_cli.schema import ComparisonConfig

HISTOGRAM_BINS = 40
# Of more labels than these tables, plots and lines of metrics show what matters most; the manifest has all of them.
SHOWN_LABELS = 20

Table = tuple[str, list[tuple[str, str]]]


class Judgement(NamedTuple):
    """figures: by name, without the eval_; reward: the manifest's entry; reliability: bins of confidence; histogram:
    {edges, side: counts}; scores: one line per row; worst: rows, with tokens (arrays) where texts belong; tables: for
    the terminal."""

    figures: dict[str, float]
    reward: dict[str, Any]
    reliability: list[Bin]
    histogram: dict[str, list[float]]
    scores: list[dict[str, Any]]
    worst: list[dict[str, Any]]
    tables: list[Table]

    def report(self) -> dict[str, Any]:
        """What is kept in evaluation/, as JSON."""
        return {
            "figures": self.figures,
            "reward": self.reward,
            "reliability": [b._asdict() for b in self.reliability],
            "histogram": self.histogram,
            "tables": self.tables,
        }


def judge(
    kind: str,
    labels: tuple[str, ...],
    rows: ComparisonRows,
    scores: np.ndarray,
    settings: ComparisonConfig,
    class_weights: torch.Tensor | None,
) -> Judgement:
    """scores (S, C) float64, C = 1 for comparisons, of all sequences of rows; class_weights (C,) as in training."""
    if kind == "labels":
        return _judge_labels(labels, rows, scores, settings, class_weights)
    return _judge_comparisons(kind, rows, scores[:, 0], settings)


# --- pairs and rankings


class _Pairs(NamedTuple):
    """better, worse (P,): sequences; group (P,): their row; weights (P,): 1 / number of pairs of the row."""

    better: np.ndarray
    worse: np.ndarray
    group: np.ndarray
    weights: np.ndarray


def _judge_comparisons(kind: str, rows: ComparisonRows, scores: np.ndarray, settings: ComparisonConfig) -> Judgement:
    """scores (S,)."""
    pairs, lengths = _all_pairs(rows), rows.lengths - rows.common_starts[rows.owners]  # of the answers
    differences = scores[pairs.better] - scores[pairs.worse]
    per_row = lambda values: np.bincount(pairs.group, pairs.weights * values, minlength=len(rows))
    right = per_row(right_shares(differences))
    best, worst = _sides(rows)
    bins = reliability(*pair_confidence(differences), low=0.5)
    figures = {
        "loss": _comparison_loss(kind, rows, scores, settings),
        "accuracy": float(right.mean()),
        "accuracy_stderr": accuracy_stderr(right),
        "margin": float(per_row(differences).mean()),
        "mean_reward": float((np.add.reduceat(scores, rows.groups[:-1]) / rows.counts).mean()),
        "chosen_mean": float(scores[best].mean()),
        "chosen_std": float(scores[best].std()),
        "rejected_mean": float(scores[worst].mean()),
        "rejected_std": float(scores[worst].std()),
        "ece": expected_calibration_error(bins),
        "length_correlation": correlation(scores, lengths),
        "longer_wins": float(per_row(right_shares(lengths[pairs.better] - lengths[pairs.worse])).mean()),
    }
    reference = {"chosen": scores[best], "rejected": scores[worst], "all": scores}[settings.reference]
    reward = {
        "mean": float(reference.mean()), "std": float(reference.std()), "type": kind, "labels": [],
        "reference": settings.reference,
    }  # fmt: skip
    histogram = _histogram({"chosen": scores[best], "rejected": scores[worst]})
    lines = [_scores_of(kind, rows, group, scores) for group in range(len(rows))]
    shown = _worst_pairs(rows, pairs, scores, differences, settings.num_worst)
    return Judgement(figures, reward, bins, histogram, lines, shown, [_reliability_table(bins)])


def _all_pairs(rows: ComparisonRows) -> _Pairs:
    found = ranked_pairs(torch.from_numpy(np.array(rows.ranks)), torch.from_numpy(rows.owners))
    better = found.better.numpy()
    return _Pairs(better, found.worse.numpy(), rows.owners[better], found.weights.numpy())


def _sides(rows: ComparisonRows) -> tuple[np.ndarray, np.ndarray]:
    """(sequences of the best rank of their row, those of the worst)."""
    ends = (extreme.reduceat(rows.ranks, rows.groups[:-1])[rows.owners] for extreme in (np.minimum, np.maximum))
    best, worst = (np.flatnonzero(rows.ranks == rank) for rank in ends)
    return best, worst


def _comparison_loss(kind: str, rows: ComparisonRows, scores: np.ndarray, settings: ComparisonConfig) -> float:
    """The training objective on these rows."""
    flat = torch.from_numpy(scores)
    if kind == "pairs":
        margins = torch.from_numpy(np.array(rows.margins))
        loss, _ = pairwise_reward_loss(flat[0::2], flat[1::2], margins, settings.center_coef)
    else:
        ranks, prompts = torch.from_numpy(np.array(rows.ranks)), torch.from_numpy(rows.owners)
        loss, _ = kwise_reward_loss(flat, ranks, prompts, settings.center_coef)
    return float(loss)


def _scores_of(kind: str, rows: ComparisonRows, group: int, scores: np.ndarray) -> dict[str, Any]:
    found = [float(scores[s]) for s in rows.sequences(group)]
    if kind == "pairs":
        return rows.place(group) | {"chosen_score": found[0], "rejected_score": found[1]}
    return rows.place(group) | {"scores": found, "ranks": [float(rows.ranks[s]) for s in rows.sequences(group)]}


def _worst_pairs(
    rows: ComparisonRows, pairs: _Pairs, scores: np.ndarray, differences: np.ndarray, count: int
) -> list[dict[str, Any]]:
    """The pairs whose worse side scores highest above the better one."""
    found = []
    for p in np.argsort(differences, kind="stable")[:count]:
        a, b = rows.ids(int(pairs.better[p])), rows.ids(int(pairs.worse[p]))
        start = int(rows.common_starts[pairs.group[p]])
        found.append(
            rows.place(pairs.group[p])
            | {
                "margin": float(differences[p]),
                "chosen_score": float(scores[pairs.better[p]]), "rejected_score": float(scores[pairs.worse[p]]),
                "prompt": a[:start], "chosen": a[start:], "rejected": b[start:],
            }
        )  # fmt: skip
    return found


# --- labels


def _judge_labels(
    labels: tuple[str, ...],
    rows: ComparisonRows,
    logits: np.ndarray,
    settings: ComparisonConfig,
    class_weights: torch.Tensor | None,
) -> Judgement:
    """logits (S, C), one sequence per row."""
    truth = np.array(rows.labels)
    confidence, correct = class_confidence(logits, truth)
    bins = reliability(confidence, correct, low=1 / len(labels))
    loss, _ = classification_loss(torch.from_numpy(logits), torch.from_numpy(truth), class_weights)
    by_label = {
        name: {measure: measured(torch.from_numpy(logits), number, measure).numpy() for measure in MEASURES}
        for number, name in enumerate(labels)
    }
    own = lambda measure: np.stack([by_label[name][measure] for name in labels])[truth, np.arange(len(truth))]
    probability = own("probability")  # of each row's own label
    figures = {
        "loss": float(loss),
        "accuracy": float(correct.mean()),
        "accuracy_stderr": accuracy_stderr(correct),
        "majority": float(np.bincount(truth, minlength=len(labels)).max() / len(truth)),
        "margin": float(own("margin").mean()),
        "ece": expected_calibration_error(bins),
    }
    lengths = np.array(rows.lengths)
    told = labels if len(labels) <= SHOWN_LABELS else ()
    for name in told[: None if len(labels) > 2 else 1]:  # of two, one mirrors the other
        figures[f"length_correlation_{name}"] = correlation(by_label[name]["margin"], lengths)
    moments = {
        name: {measure: {"mean": float(v.mean()), "std": float(v.std())} for measure, v in found.items()}
        for name, found in by_label.items()
    }
    reward = {"mean": None, "std": None, "type": "labels", "labels": list(labels), "by_label": moments}
    sides = {name: probability[truth == i] for i, name in enumerate(told)} or {"all labels": probability}
    histogram = _histogram(sides, (0.0, 1.0))
    lines = [rows.place(i) | {"label": labels[y], "logits": logits[i].tolist()} for i, y in enumerate(truth)]
    worst = [
        rows.place(i)
        | {
            "label": labels[truth[i]], "predicted": labels[logits[i].argmax()],
            "probability": float(probability[i]), "text": rows.ids(i),
        }
        for i in np.argsort(probability, kind="stable")[: settings.num_worst]
    ]  # fmt: skip
    tables = [_confusion_table(labels, truth, logits.argmax(1)), _reliability_table(bins)]
    return Judgement(figures, reward, bins, histogram, lines, worst, tables)


def _confusion_table(labels: tuple[str, ...], truth: np.ndarray, predicted: np.ndarray) -> Table:
    wrong = np.bincount(truth[predicted != truth], minlength=len(labels))
    rows = []
    for i in sorted(np.argsort(-wrong, kind="stable")[:SHOWN_LABELS]):
        taken = np.bincount(predicted[truth == i], minlength=len(labels))
        often = [j for j in np.argsort(-taken, kind="stable")[:SHOWN_LABELS] if taken[j]]
        told = ", ".join(f"{taken[j]} as {labels[j]}" for j in sorted(often))
        rows.append((labels[i], f"{taken[i]} of {taken.sum()} right ({told})" if taken.sum() else "no row"))
    if len(labels) > SHOWN_LABELS:
        rows.append(("...", f"{len(labels) - SHOWN_LABELS} further labels with fewer mistakes"))
    return "labels of the evaluation rows", rows


# --- both


def _histogram(sides: dict[str, np.ndarray], limits: tuple[float, float] | None = None) -> dict[str, list[float]]:
    everything = np.concatenate(list(sides.values()))
    edges = np.histogram_bin_edges(everything, HISTOGRAM_BINS, limits)
    return {"edges": edges.tolist()} | {name: np.histogram(values, edges)[0].tolist() for name, values in sides.items()}


def _reliability_table(bins: list[Bin]) -> Table:
    rows = [
        (f"{b.low:.2f} - {b.high:.2f}", f"said {b.mean_confidence:.3f}, right {b.accuracy:.3f} ({b.num})") for b in bins
    ]
    return "confidence and how often it was right", rows
