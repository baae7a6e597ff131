"""From sources to the rows that are trained on: limit, parse, filter, deduplicate, split; each loss counted."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import chain, islice
from typing import Any, TypeVar

from rlhf_cli.data.columns import parse_row_format
from rlhf_cli.data.filters import drop_reason
from rlhf_cli.data.formats import detect_format, parse_row, to_training
from rlhf_cli.data.readers import Source, open_source, read_rows, source_digest
from rlhf_cli.data.rows import ParsedRow, RowError, TextRow, TrainingRow, check_unicode, row_digest
from rlhf_cli.data.templates import Template, render
from rlhf_cli.errors import DataError
from rlhf_cli.schema import DataConfig, SourceConfig, TrainingSourceConfig

Item = TypeVar("Item")


@dataclass
class Tally:
    """What became of the rows of one data.path. dropped: reason -> rows; overlong: what was done -> rows."""

    path: str
    digest: str
    formats: list[str] = field(default_factory=list)
    rows: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    overlong: Counter[str] = field(default_factory=Counter)
    sequences: int = 0
    tokens: int = 0
    trained_tokens: int = 0

    def bad_row(self, error: RowError, on_bad_row: str) -> None:
        """Count a row that cannot be used, or end the run, as data.on_bad_row says."""
        if on_bad_row == "error":
            raise DataError(
                f"{error}; correct the row, or leave out and count such rows with data.on_bad_row=skip"
            ) from error
        self.dropped[error.reason] += 1

    def as_info(self) -> dict[str, Any]:
        """As the manifest holds it."""
        info = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return info | {"dropped": dict(self.dropped), "overlong": dict(self.overlong)}


def open_sources(data: SourceConfig, path: str | list[str] | None) -> list[Source]:
    """All entries of data.path or data.eval_path."""
    assert path, "data.path is required by the schema"
    return [open_source(data, entry) for entry in ([path] if isinstance(path, str) else path)]


def make_tallies(sources: list[Source]) -> list[Tally]:
    """An empty count for each source, with the digest of its content."""
    return [Tally(source.path, source_digest(source)) for source in sources]


def parsed_rows(
    data: SourceConfig, sources: list[Source], tallies: list[Tally], row_format: str | None = None
) -> Iterator[tuple[int, ParsedRow]]:
    """(number of the source, typed row) in file order: the first data.limit rows of all sources together.

    row_format: makes text rows of the columns (data.row_format).
    """
    written = parse_row_format(row_format) if row_format else None
    numbered = ((n, row) for n, source in enumerate(sources) for row in read_rows(data, source))
    formats: dict[tuple[int, str | None], str] = {}
    for number, row in islice(numbered, data.limit):
        tally = tallies[number]
        tally.rows += 1
        if isinstance(row, RowError):
            tally.bad_row(row, data.on_bad_row)
            continue
        key = (number, row.kind)
        if key not in formats:
            formats[key] = "text_only" if row_format else data.format if data.format != "auto" else detect_format(row)
            tally.formats.append(formats[key])
        try:
            yield number, parse_row(row, formats[key], written)
        except RowError as error:
            tally.bad_row(error, data.on_bad_row)


def training_rows(data: DataConfig, sources: list[Source], tallies: list[Tally]) -> Iterator[tuple[int, TrainingRow]]:
    """(number of the source, row) for supervised training, without repeats and filtered rows."""
    seen: set[int] = set()
    for number, parsed in parsed_rows(data, sources, tallies, data.row_format):
        row = to_training(parsed)
        try:
            check_unicode(row)
        except RowError as error:
            tallies[number].bad_row(error, data.on_bad_row)
            continue
        reason = drop_reason(row, data.filters)
        if reason is None and data.deduplicate:
            digest = row_digest(row)
            if digest in seen:
                reason = "duplicate"
            seen.add(digest)
        if reason is None:
            yield number, row
        else:
            tallies[number].dropped[reason] += 1


def split_lone_document(
    rows: Iterator[tuple[int, TrainingRow]], percentage: float
) -> tuple[Iterator[tuple[int, TrainingRow]], bool]:
    """(rows, whether they were one single .txt, which is now two rows: the part to train on, and the last `percentage`
    of its characters from the line break before on)."""
    start = list(islice(rows, 2))
    lone = len(start) == 1 and isinstance(start[0][1], TextRow) and start[0][1].document
    if not (lone and percentage):
        return chain(start, rows), False
    number, row = start[0]
    assert isinstance(row, TextRow)
    boundary = len(row.text) - eval_count(len(row.text), percentage)
    boundary = row.text.rfind("\n", 0, boundary) + 1 or boundary
    head, tail = row.text[:boundary], row.text[boundary:]
    if not head.strip() or not tail.strip():
        raise DataError(
            f"{row.source}: cannot be cut for data.validation_split_percentage={percentage:g}: one side would be empty;"
            " use more text, another percentage, or data.eval_path"
        )
    return iter([(number, replace(row, text=head)), (number, replace(row, text=tail))]), True


def eval_count(rows: int, percentage: float) -> int:
    """How many of the last rows are for evaluation: the percentage rounded up, at least one unless it is 0."""
    return math.ceil(Fraction(str(percentage)) * rows / 100)  # exact: 0.1 has no float


def in_chunks(
    items: Iterator[Item], num_chars: Callable[[Item], int], max_items: int, max_chars: int
) -> Iterator[list[Item]]:
    """A bounded number of items and characters at a time (one item at least)."""
    chunk: list[Item] = []
    chars = 0
    for item in items:
        chunk.append(item)
        chars += num_chars(item)
        if len(chunk) >= max_items or chars >= max_chars:
            yield chunk
            chunk, chars = [], 0
    if chunk:
        yield chunk


def named_infos(data: TrainingSourceConfig, infos: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The counts of all entries of data.path and data.eval_path under today's names: the cache knows contents only."""
    paths = [*paths_of(data.path), *paths_of(data.eval_path)]
    return [info | {"path": path} for info, path in zip(infos, paths, strict=True)]


def paths_of(given: str | list[str] | None) -> list[str]:
    """The entries of data.path or data.eval_path."""
    return [given] if isinstance(given, str) else given or []


def report_counts(infos: list[dict[str, Any]], report: Callable[[str], None]) -> None:
    """One line for each entry of data.path and data.eval_path."""
    for info in infos:
        line = f"data: {info['path']}: {info['kept']} of {info['rows']} rows, {info['sequences']} sequences,"
        line += f" {info['tokens']} tokens"
        if "trained_tokens" in info:
            line += f", {info['trained_tokens']} trained"
        counts = chain(info["dropped"].items(), info["overlong"].items())
        report(line + "".join(f"; {reason}: {n}" for reason, n in counts))


def nothing_left(purpose: str, infos: list[dict[str, Any]], data: TrainingSourceConfig, settings: str) -> DataError:
    """No row was left to train or to evaluate on. settings: the options beside the common ones that may be why."""
    rows = sum(info["rows"] for info in infos)
    dropped: Counter[str] = sum((Counter(info["dropped"]) for info in infos), Counter())
    reasons = ", ".join(f"{reason}: {n}" for reason, n in dropped.most_common()) or "none was dropped"
    return DataError(
        f"data.path: nothing is left to {purpose} on; of {rows} rows {reasons}."
        f" Check data.max_length={data.max_length}, {settings}, data.weights and"
        f" data.validation_split_percentage={data.validation_split_percentage:g}"
    )


def train_texts(data: DataConfig, template: Template) -> Iterator[str]:
    """The texts of the training side as the model will see them, to train a tokenizer on: dialogues in their template,
    whose own words a tokenizer of words or characters has to know."""
    sources = open_sources(data, data.path)
    read = lambda: training_rows(data, sources, [Tally(s.path, "") for s in sources])
    rows, lone = split_lone_document(read(), data.validation_split_percentage)
    num_rows: int | None = 1 if lone else None
    if not lone and data.validation_split_percentage:
        total = sum(1 for _ in rows)
        rows, num_rows = read(), total - eval_count(total, data.validation_split_percentage)
    for _, row in islice(rows, num_rows):
        yield row.text if isinstance(row, TextRow) else render(template, {}, row.messages, False)
