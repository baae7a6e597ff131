"""From sources to groups of texts that are compared or labelled: parse, check, split; each loss counted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import Any, Literal, NamedTuple

import numpy as np

from rlhf_cli.data.filters import is_blank
from rlhf_cli.data.formats import answer_row, describe_formats
from rlhf_cli.data.readers import Source
from rlhf_cli.data.rows import (
    LabelledRow,
    PairRow,
    ParsedRow,
    RankedRow,
    RowError,
    TextRow,
    TrainingRow,
    check_unicode,
    half_character,
    row_digest,
)
from rlhf_cli.data.stream import Tally, eval_count, nothing_left, open_sources, parsed_rows
from rlhf_cli.data.templates import Template, render
from rlhf_cli.errors import DataError
from rlhf_cli.schema import ComparisonDataConfig

Kind = Literal["pairs", "rankings", "labels"]
FORMATS: dict[Kind, str] = {"pairs": "paired", "rankings": "ranked", "labels": "labelled"}
SINGULAR: dict[Kind, str] = {"pairs": "a pair", "rankings": "a ranking", "labels": "a labelled text"}
EMPTY_ANSWER, SAME_RANK, IDENTICAL = "an empty answer", "no two answers differ in rank", "identical sides"


class Expected(NamedTuple):
    """What all rows have to be, and the row that says so."""

    kind: Kind
    source: str


class Group(NamedTuple):
    """Texts that are compared with each other, or one labelled text.

    rows: each as supervised training would read it; digests: their row_digest; ranks: smaller is better.
    """

    source: int
    rows: tuple[TrainingRow, ...]
    digests: tuple[int, ...]
    ranks: tuple[float, ...]
    margin: float = 0.0
    label: str | None = None


class Labels(NamedTuple):
    """names in order; held_out (N,) bool: the training rows that are for evaluation, None without a split."""

    names: tuple[str, ...]
    held_out: np.ndarray | None


def find_kind(data: ComparisonDataConfig, sources: list[Source]) -> Expected:
    """The kind of the first row that can be read."""
    tallies = _uncounted(sources)
    for _, row in parsed_rows(data, sources, tallies):
        return Expected(_kind(row), row.source)
    raise nothing_left("train", [tally.as_info() for tally in tallies], data, "data.on_bad_row")


def comparison_groups(
    data: ComparisonDataConfig, sources: list[Source], tallies: list[Tally], expected: Expected
) -> Iterator[Group]:
    """Every row of these sources that says something. Raises DataError for a row of another kind."""
    seen: set[int] = set()
    for number, row in parsed_rows(data, sources, tallies):
        kind = _kind(row)
        if kind != expected.kind:
            raise DataError(
                f"{row.source}: is {SINGULAR[kind]}, but {expected.source} is {SINGULAR[expected.kind]}; a reward"
                " model learns from one kind of data: leave the other out of data.path and data.eval_path"
            )
        try:
            group = _group(number, row)
            for text in group.rows:
                check_unicode(text)
        except RowError as error:
            tallies[number].bad_row(error, data.on_bad_row)
            continue
        reason = _drop_reason(group)
        if reason is None and data.deduplicate:
            digest = _group_digest(group)
            if digest in seen:
                reason = "duplicate"
            seen.add(digest)
        if reason is None:
            yield group
        else:
            tallies[number].dropped[reason] += 1


def survey_labels(
    data: ComparisonDataConfig, sources: list[Source], eval_sources: list[Source], expected: Expected
) -> Labels:
    """Read all labels once: their names in order, and which rows are drawn for evaluation."""
    labels, digests = [], []
    for group in comparison_groups(data, sources, _uncounted(sources), expected):
        labels.append(str(group.label))
        digests.append(group.digests[0])
    elsewhere = comparison_groups(data, eval_sources, _uncounted(eval_sources), expected) if eval_sources else ()
    names = label_order({*labels, *(str(group.label) for group in elsewhere)})
    if len(names) == 1:
        raise DataError(
            f"data.path: every row has the label {names[0]!r}; a classifier needs two labels at least."
            " Look at data.path and data.limit, or name the column with data.columns={label: ...}"
        )
    held_out = None
    if data.validation_split_percentage:
        number_of = {name: number for number, name in enumerate(names)}
        numbers = np.array([number_of[label] for label in labels], np.int64)
        held_out = stratified_draw(
            numbers, np.array(digests, np.uint64), data.validation_split_percentage, data.split_seed
        )
    return Labels(names, held_out)


def label_order(names: set[str]) -> tuple[str, ...]:
    """Whole numbers by value, all else by the alphabet."""
    if all(name.removeprefix("-").isdecimal() for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))


def stratified_draw(labels: np.ndarray, digests: np.ndarray, percentage: float, seed: int) -> np.ndarray:
    """Which rows are for evaluation, (N,) bool: of each label the percentage rounded up, drawn at random.

    labels (N,): numbers from 0; digests (N,) of the texts. Rows with one text stay on one side: they are taken together
    when that brings the count nearer to its goal, so that it may be missed by the repeats. A label always keeps a text
    to train on.
    """
    held: set[int] = set()
    for label in range(int(labels.max(initial=-1)) + 1):
        rows = np.flatnonzero(labels == label)
        texts, counts = np.unique(digests[rows], return_counts=True)
        sizes = dict(zip(texts.tolist(), counts.tolist(), strict=True))
        goal = min(eval_count(len(rows), percentage), len(rows) - 1)
        taken = sum(size for text, size in sizes.items() if text in held)
        for row in np.random.default_rng([seed, label]).permutation(rows):
            text = int(digests[row])
            size = sizes[text]
            if text not in held and size <= 2 * (goal - taken) and taken + size < len(rows):
                held.add(text)
                taken += size
    return np.isin(digests, np.array(sorted(held), np.uint64))


def comparison_texts(data: ComparisonDataConfig, template: Template) -> Iterator[str]:
    """The texts of the training side as the model will see them, to train a tokenizer on."""
    sources = open_sources(data, data.path)
    expected = find_kind(data, sources)
    read = lambda: comparison_groups(data, sources, _uncounted(sources), expected)
    if expected.kind == "labels":
        eval_sources = open_sources(data, data.eval_path) if data.eval_path else []
        held_out = survey_labels(data, sources, eval_sources, expected).held_out
    else:
        total = sum(1 for _ in read())
        held_out = np.arange(total) >= total - eval_count(total, data.validation_split_percentage)
    for number, group in enumerate(read()):
        if held_out is None or not held_out[number]:
            for row in group.rows:
                yield row.text if isinstance(row, TextRow) else render(template, {}, row.messages, False)


def has_contrast(ranks: Sequence[float], contents: Sequence[Any]) -> bool:
    """Whether two answers differ in rank and in content."""
    return any(
        ranks[i] != ranks[j] and contents[i] != contents[j] for i in range(len(ranks)) for j in range(i + 1, len(ranks))
    )


def _kind(row: ParsedRow) -> Kind:
    match row:
        case PairRow():
            return "pairs"
        case RankedRow():
            return "rankings"
        case LabelledRow():
            return "labels"
    raise DataError(
        f"{row.source}: has neither two answers to compare nor a label. A reward model learns from\n"
        f"{describe_formats(FORMATS.values())}\n"
        "Map the file's names onto these with data.columns={our name: its name}"
    )


def _group(source: int, row: ParsedRow) -> Group:
    match row:
        case PairRow():
            sides = (answer_row(row, row.chosen), answer_row(row, row.rejected))
            return Group(source, sides, _digests(sides), (0.0, 1.0), row.margin or 0.0)
        case RankedRow():
            answers = tuple(answer_row(row, response) for response in row.responses)
            return Group(source, answers, _digests(answers), row.ranks)
        case LabelledRow():
            # 0 and 1 of a file may be true and false in another
            label = row.label if isinstance(row.label, str) else str(int(row.label))
            if not label.strip():
                raise RowError(row.source, "an empty label")
            if half_character(label) is not None:
                raise RowError(row.source, "half a character in the label", repr(label))
            text = (TextRow(row.text, row.source, row.columns),)
            return Group(source, text, _digests(text), (0.0,), label=label)
    raise AssertionError(f"{row.source}: {type(row).__name__}")


def _digests(rows: tuple[TrainingRow, ...]) -> tuple[int, ...]:
    return tuple(map(row_digest, rows))


def _drop_reason(group: Group) -> str | None:
    """Why a row says nothing, in words that can be counted."""
    if any(is_blank(row) for row in group.rows):
        return EMPTY_ANSWER if group.label is None else "empty"
    if group.label is not None:
        return None
    if len(set(group.ranks)) < 2:
        return SAME_RANK
    return None if has_contrast(group.ranks, group.digests) else IDENTICAL


def _group_digest(group: Group) -> int:
    """64 bits of everything that makes two rows repeats of each other."""
    told = repr((group.digests, group.ranks, group.margin, group.label))
    return int.from_bytes(blake2b(told.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def _uncounted(sources: list[Source]) -> list[Tally]:
    """Tallies for a reading that is not the one that counts."""
    return [Tally(source.path, "") for source in sources]
