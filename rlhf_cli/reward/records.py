"""Rows of a file as texts to score, and their scores as lines of scores.jsonl."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rlhf_cli.data.rows import (
    DialogueRow,
    LabelledRow,
    Message,
    PairRow,
    ParsedRow,
    PromptRow,
    RankedRow,
    RowError,
    TextRow,
)
from rlhf_cli.errors import DataError
from rlhf_cli.ops.best_of import pass_at_k
from rlhf_cli.ops.calibration import accuracy_stderr, right_shares
from rlhf_cli.reward.combine import Scores
from rlhf_cli.reward.source import ScoredText

# What Summary reads of a line, which no column of the file may be taken for.
FIGURES = ("score", "scores", "chosen_score", "rejected_score", "score_margin", "by_source")


def texts_of(row: ParsedRow) -> list[ScoredText]:
    """One text, or the chosen and the rejected side, or all answers of a ranking.

    Raises RowError for a dialogue in which the assistant says nothing, DataError for prompts without answers.
    """
    match row:
        case TextRow():
            return [ScoredText(None, row.text, row.columns, row.source)]
        case LabelledRow():
            return [ScoredText(None, row.text, {**row.columns, "label": row.label}, row.source)]
        case DialogueRow():
            return [_reply(row.messages, row)]
        case PairRow():
            return [_side(side, row) for side in (row.chosen, row.rejected)]
        case RankedRow():
            return [ScoredText(row.prompt, response, row.columns, row.source) for response in row.responses]
        case PromptRow():
            raise DataError(
                f"{row.source}: a prompt without an answer, so there is nothing to score; name the answer's column with"
                " data.columns={response: ...}, or set data.format=text_only to score the text itself"
            )


def _side(side: tuple[Message, ...] | str, row: PairRow) -> ScoredText:
    if isinstance(side, str):
        return ScoredText(None, side, row.columns, row.source)
    return _reply((row.prompt or ()) + side, row)


def _reply(messages: tuple[Message, ...], row: DialogueRow | PairRow) -> ScoredText:
    """The assistant's last word with what precedes it as the prompt."""
    spoken = [i for i, message in enumerate(messages) if message.role == "assistant"]
    if not spoken:
        raise RowError(row.source, "no reply of the assistant to score")
    last = spoken[-1]
    return ScoredText(messages[:last], messages[last].content, row.columns, row.source)


# --- lines


def score_lines(rows: Sequence[tuple[ParsedRow, list[ScoredText]]], scores: Scores) -> list[str]:
    """The JSON lines of rows, whose texts were scored all together in this order."""
    lines, start = [], 0
    total = scores.total.tolist()
    by_source = {name: values.tolist() for name, values in scores.by_source.items()}
    for row, texts in rows:
        end = start + len(texts)
        apart = {name: values[start:end] for name, values in by_source.items()} if len(by_source) > 1 else {}
        line = json.dumps(_line(row, texts, total[start:end], apart), ensure_ascii=False, default=str)
        # Half a surrogate pair has no UTF-8; its backslash form is JSON's own.
        lines.append(line.encode("utf-8", "backslashreplace").decode("utf-8"))
        start = end
    return lines


def _line(
    row: ParsedRow, texts: list[ScoredText], scores: list[float], by_source: dict[str, list[float]]
) -> dict[str, Any]:
    line: dict[str, Any] = {"source": row.source}
    prompt = texts[0].prompt
    if prompt is not None:
        line["prompt"] = _prompt_value(prompt)
    match row:
        case PairRow():
            line |= {"chosen": texts[0].response, "rejected": texts[1].response}
            line |= {"chosen_score": scores[0], "rejected_score": scores[1], "score_margin": scores[0] - scores[1]}
            if row.margin is not None:  # under its own name, so that the file trains as the one it was made from
                line["margin"] = row.margin
            apart: Any = {name: {"chosen": c, "rejected": r} for name, (c, r) in by_source.items()}
        case RankedRow():
            line |= {"responses": list(row.responses), "ranks": list(row.ranks), "scores": scores}
            apart = by_source
        case _:
            line |= {"response" if prompt is not None else "text": texts[0].response, "score": scores[0]}
            apart = {name: value for name, (value,) in by_source.items()}
    if by_source:
        line["by_source"] = apart
    for name, value in texts[0].columns.items():
        line[_free_name(name, line, texts[0].columns)] = value
    return line


def _free_name(name: str, line: Mapping[str, Any], columns: Mapping[str, Any]) -> str:
    """What a column of the file is called in a line: its name, or another one where that is one of ours."""
    if name not in line and name not in FIGURES:
        return name
    name = f"data_{name}"
    while name in line or name in columns:
        name = f"data_{name}"
    return name


def _prompt_value(prompt: tuple[Message, ...]) -> str | list[dict[str, str]]:
    """Text if it is one message of the user, else messages: both are read again as they were."""
    if len(prompt) == 1 and prompt[0].role == "user":
        return prompt[0].content
    return [message._asdict() for message in prompt]


# --- figures


@dataclass
class Summary:
    """Figures over lines of scores.jsonl; eight bytes are kept per score. With pass_at, rows with the same prompt are
    samples of one task, correct where their score is above passes_above."""

    pass_at: Sequence[int] = ()
    passes_above: float = 0.5
    rows: int = 0
    scores: array[float] = field(default_factory=lambda: array("d"))
    by_source: dict[str, array[float]] = field(default_factory=dict)
    margins: array[float] = field(default_factory=lambda: array("d"))
    shares: array[float] = field(default_factory=lambda: array("d"))  # of each ranking: how many pairs are right
    tasks: dict[bytes, tuple[int, int]] = field(default_factory=dict)  # digest of a prompt -> samples, correct ones

    def add(self, line: dict[str, Any]) -> None:
        """Count one line."""
        self.rows += 1
        self.scores.extend(_values(line, ("score", "scores", "chosen_score", "rejected_score")))
        for name, values in line.get("by_source", {}).items():
            kept = self.by_source.setdefault(name, array("d"))
            kept.extend(values.values() if isinstance(values, dict) else np.atleast_1d(values).tolist())
        if self.pass_at and "score" in line and "prompt" in line:
            task = hashlib.sha256(json.dumps(line["prompt"]).encode()).digest()
            samples, correct = self.tasks.get(task, (0, 0))
            self.tasks[task] = samples + 1, correct + (line["score"] > self.passes_above)
        if "chosen_score" in line:
            self.margins.append(line["score_margin"])
        elif "scores" in line:
            ranks, scores = np.array(line["ranks"]), np.array(line["scores"])
            better, worse = np.nonzero(ranks[:, None] < ranks[None, :])
            if len(better):
                self.shares.append(right_shares(scores[better] - scores[worse]).mean())

    def figures(self) -> dict[str, float]:
        """rows, texts; mean, std, min, max over all scores; of pairs accuracy, its standard error and the mean margin;
        of rankings the accuracy over pairs of different rank (equal scores count half); tasks and the mean pass@k over
        those with at least k samples, nan where there is none."""
        scores = np.array(self.scores)
        figures: dict[str, Any] = {"rows": float(self.rows), "texts": float(len(scores))}
        figures |= {"mean": scores.mean(), "std": scores.std(), "min": scores.min(), "max": scores.max()}
        for name, values in self.by_source.items():
            figures |= {f"mean_{name}": np.mean(values), f"std_{name}": np.std(values)}
        right = np.concatenate([right_shares(np.array(self.margins)), np.array(self.shares)])
        if len(right):
            figures |= {"accuracy": right.mean(), "accuracy_stderr": accuracy_stderr(right)}
        if len(self.margins):
            figures["mean_margin"] = np.mean(self.margins)
        if self.pass_at:
            figures["tasks"] = len(self.tasks)
        for k in self.pass_at:
            found = [pass_at_k(samples, correct, k) for samples, correct in self.tasks.values() if samples >= k]
            figures[f"pass@{k}"] = np.mean(found) if found else np.nan
        return {name: float(value) for name, value in figures.items()}

    def short(self, k: int) -> int:
        """Tasks with fewer than k samples."""
        return sum(samples < k for samples, _ in self.tasks.values())


def _values(line: dict[str, Any], names: tuple[str, ...]) -> list[float]:
    return [value for name in names if name in line for value in np.atleast_1d(line[name]).tolist()]
