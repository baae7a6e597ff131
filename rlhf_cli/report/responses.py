"""What policies answer, side by side: the same prompts before and after, and over runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from rlhf_cli.report.markup import Markup, joined, shortened, tag
from rlhf_cli.report.metrics import as_number
from rlhf_cli.report.runs import Answers, Row, Run

NUM_PROMPTS, NUM_ALONE = 6, 3  # of each group of columns, and of one that has nothing beside it
PROMPT_CHARS, RESPONSE_CHARS = 700, 800

Key = tuple[str, int]  # a prompt, and how often it has stood in the file before


class Column(NamedTuple):
    """title: who wrote it and when; rows: the answers by prompt."""

    title: str
    rows: dict[Key, Row]


class Group(NamedTuple):
    """Runs that answer the same prompts, and those that are shown."""

    runs: list[str]
    columns: list[Column]
    prompts: list[Key]


def responses(runs: Sequence[Run]) -> Markup:
    """For each group of runs a block for each prompt that is shown."""
    parts: list[Markup] = []
    for group in groups_of([run for run in runs if run.answers]):
        parts.append(tag("h3", ", ".join(group.runs)))
        parts += [_prompt(key, number, group) for number, key in enumerate(group.prompts, start=1)]
    return joined(parts)


def groups_of(runs: Sequence[Run]) -> list[Group]:
    """Each run in one group at least, prompts that many runs answer first."""
    newest = {run.name: by_prompt(run.answers[-1]) for run in runs}
    answered: dict[Key, list[str]] = {}
    for name, rows in newest.items():
        for key in rows:
            answered.setdefault(key, []).append(name)
    sets: dict[tuple[str, ...], list[Key]] = {}
    for key, writers in answered.items():
        sets.setdefault(tuple(writers), []).append(key)
    left, groups = set(newest), []
    for names, keys in sorted(sets.items(), key=lambda found: (-len(found[0]), -len(found[1]))):
        if left & set(names):
            left -= set(names)
            count = min(NUM_PROMPTS, len(keys))
            chosen = [keys[i * len(keys) // count] for i in range(count)]  # spread over the file
            columns = columns_of([run for run in runs if run.name in names], chosen)
            groups.append(Group(list(names), columns, chosen[: NUM_PROMPTS if len(columns) > 1 else NUM_ALONE]))
    return groups


def columns_of(runs: Sequence[Run], prompts: Sequence[Key]) -> list[Column]:
    """What the policies wrote before they learnt, each once although several runs began with it; then each run."""
    starts: list[tuple[list[str], dict[Key, Row]]] = []
    for run in runs:
        if not (run.is_aligned and run.answers[0].step == 0 and len(run.answers) > 1):
            continue
        rows = by_prompt(run.answers[0])
        same = [names for names, others in starts if _alike(rows, others, prompts)]
        if same:
            same[0].append(run.name)
        else:
            starts.append(([run.name], rows))
    before = [Column("before" if len(starts) == 1 else f"before {', '.join(names)}", rows) for names, rows in starts]
    unit = lambda run: "iteration" if run.is_aligned else "step"
    after = [Column(f"{r.name}, {unit(r)} {r.answers[-1].step}", by_prompt(r.answers[-1])) for r in runs]
    return before + after


def by_prompt(answers: Answers) -> dict[Key, Row]:
    """Evaluations ask in the same order, so the same prompt twice is told apart by its turn."""
    found: dict[Key, Row] = {}
    turns: dict[str, int] = {}
    for row in answers.rows:
        turn = turns.get(row["prompt"], 0)
        turns[row["prompt"]] = turn + 1
        found[row["prompt"], turn] = row
    return found


def _alike(one: dict[Key, Row], other: dict[Key, Row], prompts: Sequence[Key]) -> bool:
    """Whether two files have the same answers with the same scores."""
    return all(_same_answer(one.get(key), other.get(key)) for key in prompts)


def _same_answer(one: Row | None, other: Row | None) -> bool:
    """The same text from the same judge, who may round otherwise."""
    if one is None or other is None:
        return one is other
    a, b = _score(one), _score(other)
    alike = a is b if a is None or b is None else math.isclose(a, b, rel_tol=0.02, abs_tol=0.02)
    return alike and one["response"] == other["response"]


def _prompt(key: Key, number: int, group: Group) -> Markup:
    question = _text(shortened(key[0], PROMPT_CHARS, keep_end=True), "prompt")
    answers = [_answer(column, key) for column in group.columns]
    title = tag("h4", f"Prompt {number} of {len(group.prompts)}")
    return tag("article", title, question, tag("div", *answers, class_="answers"))


def _answer(column: Column, key: Key) -> Markup:
    row = column.rows.get(key)
    if row is None:
        return tag("section", tag("h5", column.title), tag("p", "not asked", class_="note"))
    score = _score(row)
    said = Markup("") if score is None else tag("span", f"score {score:.3f}", class_="score")
    text = _text(shortened(row["response"], RESPONSE_CHARS), "response")
    if not row["response"].strip():
        text = tag("p", "an empty response", class_="note")
    return tag("section", tag("h5", column.title, " ", said), text)


def _score(row: Row) -> float | None:
    return as_number(row.get("score"))


def _text(text: str, kind: str) -> Markup:
    """White space as written, but for blanks at the ends; the direction is its own, so that right-to-left text does not
    turn the page."""
    return tag("div", text.strip(" "), class_=f"text {kind}", dir="auto")
