"""A file's own columns -> our names (data.columns), and columns -> one text (data.row_format)."""

from __future__ import annotations

import string
from collections.abc import Mapping
from typing import Any

from rlhf_cli.data.rows import RowError
from rlhf_cli.errors import DataError


def map_columns(values: dict[str, Any], columns: Mapping[str, str], first_source: str | None) -> dict[str, Any]:
    """Rename the file's columns. Our name wins over a column that has it already.

    first_source: where the row stands if it is the first of its file; there a column that does not exist is an error
    of the request (later rows may lack optional columns).
    """
    if not columns:
        return values
    if first_source is not None:
        missing = [theirs for theirs in columns.values() if theirs not in values]
        if missing:
            raise DataError(
                f"data.columns: {first_source} has no column {missing[0]!r}; its columns are {', '.join(values)}"
            )
    renamed = set(columns.values()) | set(columns)
    mapped = {name: value for name, value in values.items() if name not in renamed}
    return mapped | {ours: values[theirs] for ours, theirs in columns.items() if theirs in values}


RowFormat = list[tuple[str, str | None]]


def parse_row_format(row_format: str) -> RowFormat:
    """The text "{prompt} {label}" -> [("", "prompt"), (" ", "label")]. No attributes, no conversions."""
    parts: RowFormat = []
    try:
        parsed = list(string.Formatter().parse(row_format))
    except ValueError as error:
        raise DataError(f"data.row_format: {row_format!r}: {error}; write {{{{ and }}}} for plain braces") from error
    for literal, name, spec, conversion in parsed:
        if name is not None and (not name.strip() or spec or conversion):
            raise DataError(
                f"data.row_format: {row_format!r}: braces hold a column name only, e.g. '{{prompt}}{{label}}'"
            )
        parts.append((literal, name))
    if not any(name for _, name in parts):
        raise DataError(f"data.row_format: {row_format!r} names no column, e.g. '{{prompt}}{{label}}'")
    return parts


def render_row(parts: RowFormat, values: Mapping[str, Any], source: str) -> str:
    """The text of one row. A name is looked up as it stands, so that no value can run anything."""
    text = []
    for literal, name in parts:
        text.append(literal)
        if name is None:
            continue
        if name not in values:
            raise RowError(source, f"no column {name!r} for data.row_format", f"its columns are {', '.join(values)}")
        value = values[name]
        if not isinstance(value, str | int | float):
            raise RowError(
                source, f"column {name!r} is no text", f"data.row_format needs text or a number, got {value!r:.60}"
            )
        text.append(str(value))
    return "".join(text)
