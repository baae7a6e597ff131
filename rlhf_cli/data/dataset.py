"""A data section of the config -> token sequences to train and to evaluate on, prepared once and cached."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rlhf_cli.data.cache import COLUMNS, Columns, ColumnWriter, build_entry, cache_root, load_entry
from rlhf_cli.data.rows import RowError, TextRow, TrainingRow, row_digest
from rlhf_cli.data.stream import Tally, eval_count, make_tallies, open_sources, split_lone_document, training_rows
from rlhf_cli.data.templates import Segment, Template
from rlhf_cli.data.token_rows import TokenRows, repeats_from_weights
from rlhf_cli.data.tokenize import Encoder, encode_rows, fit_length, make_encoder, row_segments
from rlhf_cli.errors import DataError
from rlhf_cli.schema import DataConfig

# Raised whenever the same data and settings give other tokens than before; old entries are then not found.
CACHE_VERSION = 1
CHUNK_ROWS, CHUNK_CHARS = 2048, 1 << 22
# The settings that decide which tokens come out. Packing and weights act on the prepared sequences.
TELLING = (
    "format",
    "columns",
    "row_format",
    "loss_on",
    "max_length",
    "overlong",
    "validation_split_percentage",
    "limit",
    "on_bad_row",
    "deduplicate",
)

Progress = Callable[[int, int | None], None]
NumberedRows = Iterator[tuple[int, TrainingRow]]


class Prepared(NamedTuple):
    """train and eval sequences; info: one entry per data.path and data.eval_path for the manifest; digest of it all."""

    train: TokenRows
    eval: TokenRows | None
    info: list[dict[str, Any]]
    digest: str


def prepare(
    data: DataConfig,
    tokenizer: Any,
    tokenizer_digest: str,
    template: Template,
    report: Callable[[str], None],
    progress: Progress | None = None,
) -> Prepared:
    """Read, tokenise and cache the data, or open what an earlier run cached.

    report gets lines for people; progress gets (rows done, rows in all or None) now and then.
    Raises DataError for rows and files that cannot be used, or when nothing is left to train or to evaluate on.
    """
    sources = open_sources(data, data.path)
    tallies = make_tallies(sources)
    eval_sources = open_sources(data, data.eval_path) if data.eval_path else []
    eval_tallies = make_tallies(eval_sources)
    digest = _digest(data, tallies, eval_tallies, tokenizer_digest, template)
    entry = cache_root(data.cache_dir) / digest
    found = load_entry(entry)
    if found is not None:
        report(f"data: tokens from the cache {entry}")
    else:
        encoder = make_encoder(tokenizer)

        def write(folder: Path) -> dict[str, Any]:
            rows = training_rows(data, sources, tallies)
            rows, lone = split_lone_document(rows, data.validation_split_percentage)
            count = _write_part(folder / "train", data, rows, tallies, encoder, template, progress)
            num_eval = 1 if lone else eval_count(count, data.validation_split_percentage)
            if eval_sources:
                rows = training_rows(data, eval_sources, eval_tallies)
                _write_part(folder / "eval", data, rows, eval_tallies, encoder, template, progress)
            if lone:  # one row all the same
                for tally in tallies:
                    tally.kept = min(tally.kept, tally.rows)
                    tally.overlong = Counter(dict.fromkeys(tally.overlong, 1))
            infos = [[tally.as_info() for tally in side] for side in (tallies, eval_tallies)]
            return {"train_rows": count - num_eval, "train": infos[0], "eval": infos[1]}

        build_entry(entry, write)
        found = load_entry(entry)
        if found is None:
            raise DataError(f"tokenised data in {entry} is damaged as soon as it is written; check the disk")
    prepared = _open(data, digest, *found)
    _report_counts(prepared, report)
    return prepared


def _digest(
    data: DataConfig, tallies: list[Tally], eval_tallies: list[Tally], tokenizer_digest: str, template: Template
) -> str:
    told = {
        "version": CACHE_VERSION,
        "train": [tally.digest for tally in tallies],
        "eval": [tally.digest for tally in eval_tallies],
        "settings": {name: getattr(data, name) for name in TELLING},
        "filters": vars(data.filters),
        "tokenizer": tokenizer_digest,
        "template": template,
    }
    return blake2b(json.dumps(told, sort_keys=True).encode(), digest_size=16).hexdigest()


def _write_part(
    folder: Path,
    data: DataConfig,
    rows: NumberedRows,
    tallies: list[Tally],
    encoder: Encoder,
    template: Template,
    progress: Progress | None,
) -> int:
    """Write the sequences of all rows, chunk by chunk; returns the number of rows before overlong ones were dropped."""
    writers = {name: ColumnWriter(folder / f"{name}.npy", dtype) for name, dtype in COLUMNS.items()}
    writers["offsets"].append(np.zeros(1))
    count = 0
    for chunk in _chunks(rows):
        columns = _tokenise_chunk(data, chunk, count, tallies, encoder, template)
        columns["offsets"] += writers["input_ids"].length
        for name, values in columns.items():
            writers[name].append(values)
        count += len(chunk)
        if progress is not None:
            progress(count, None)
    for writer in writers.values():
        writer.close()
    return count


def _tokenise_chunk(
    data: DataConfig,
    chunk: list[tuple[int, TrainingRow]],
    first_row: int,
    tallies: list[Tally],
    encoder: Encoder,
    template: Template,
) -> Columns:
    """The columns of one chunk, without the leading 0 of offsets, and with offsets that start from it."""
    cut: list[tuple[int, list[Segment]]] = []
    for i, (source, row) in enumerate(chunk):
        try:
            cut.append((i, row_segments(row, template, encoder.tokenizer.special_tokens_map, data.loss_on)))
        except RowError as error:
            tallies[source].bad_row(error, data.on_bad_row)
    sequences, numbers = [], []
    for (i, _), tokens in zip(cut, encode_rows(encoder, [segments for _, segments in cut]), strict=True):
        source, row = chunk[i]
        tally = tallies[source]
        overlong = data.overlong
        if overlong == "auto":
            overlong = "split" if isinstance(row, TextRow) else "truncate"
        fitted = fit_length(tokens, data.max_length, overlong)
        if isinstance(fitted, str):
            tally.dropped[fitted] += 1
            continue
        if len(tokens.input_ids) > data.max_length:
            tally.overlong[overlong] += 1
        tally.kept += 1
        tally.sequences += len(fitted)
        tally.tokens += sum(len(t.input_ids) for t in fitted)
        tally.trained_tokens += sum(int(t.trained.sum()) for t in fitted)
        sequences += fitted
        numbers += [i] * len(fitted)
    digests = {i: row_digest(chunk[i][1]) for i in set(numbers)}
    return {
        "input_ids": np.concatenate([t.input_ids for t in sequences] or [np.zeros(0)]),
        "trained": np.concatenate([t.trained for t in sequences] or [np.zeros(0)]),
        "offsets": np.cumsum([len(t.input_ids) for t in sequences], dtype=np.int64),
        "row_digests": np.array([digests[i] for i in numbers], np.uint64),
        "row_numbers": np.array(numbers, np.int64) + first_row,
        "sources": np.array([chunk[i][0] for i in numbers], np.int32),
    }


def _chunks(rows: NumberedRows) -> Iterator[list[tuple[int, TrainingRow]]]:
    """A bounded number of rows and characters at a time (one row at least)."""
    chunk: list[tuple[int, TrainingRow]] = []
    chars = 0
    for number, row in rows:
        chunk.append((number, row))
        chars += len(row.text) if isinstance(row, TextRow) else sum(len(m.content) for m in row.messages)
        if len(chunk) >= CHUNK_ROWS or chars >= CHUNK_CHARS:
            yield chunk
            chunk, chars = [], 0
    if chunk:
        yield chunk


def _open(data: DataConfig, digest: str, info: dict[str, Any], parts: dict[str, Columns]) -> Prepared:
    """The sequences of a cache entry: the train part cut at its evaluation split, or with an eval part of its own."""
    columns = parts["train"]
    infos = [*info["train"], *info["eval"]]
    for entry, path in zip(infos, [*_paths(data.path), *_paths(data.eval_path)], strict=True):
        entry["path"] = path  # the cache knows contents, not names
    num_train = int(np.searchsorted(columns["row_numbers"], info["train_rows"]))
    weights = np.array(data.weights)[columns["sources"][:num_train]] if data.weights else None
    train = _token_rows(columns, 0, num_train, weights)
    if not train.repeats.sum():
        raise DataError(_nothing_left("train", info["train"], data))
    evaluation = None
    if data.eval_path or data.validation_split_percentage:
        columns = parts.get("eval", columns)
        evaluation = _token_rows(columns, 0 if data.eval_path else num_train, len(columns["sources"]), None)
        if not len(evaluation):
            raise DataError(_nothing_left("evaluate", info["eval"] or info["train"], data))
    return Prepared(train, evaluation, infos, digest)


def _token_rows(columns: Columns, start: int, end: int, weights: np.ndarray | None) -> TokenRows:
    digests = columns["row_digests"][start:end]
    repeats = np.ones(end - start, np.int64)
    if weights is not None:
        repeats = repeats_from_weights(weights, digests, columns["row_numbers"][start:end])
    return TokenRows(columns["input_ids"], columns["trained"], columns["offsets"][start : end + 1], digests, repeats)


def _paths(path: str | list[str] | None) -> list[str]:
    return [path] if isinstance(path, str) else path or []


def _nothing_left(purpose: str, infos: list[dict[str, Any]], data: DataConfig) -> str:
    rows = sum(info["rows"] for info in infos)
    dropped: Counter[str] = sum((Counter(info["dropped"]) for info in infos), Counter())
    reasons = ", ".join(f"{reason}: {n}" for reason, n in dropped.most_common()) or "none was dropped"
    return (
        f"data.path: nothing is left to {purpose} on; of {rows} rows {reasons}."
        f" Check data.max_length={data.max_length}, data.overlong={data.overlong}, data.filters, data.weights and"
        f" data.validation_split_percentage={data.validation_split_percentage:g}"
    )


def _report_counts(prepared: Prepared, report: Callable[[str], None]) -> None:
    for info in prepared.info:
        line = f"data: {info['path']}: {info['kept']} of {info['rows']} rows, {info['sequences']} sequences,"
        line += f" {info['tokens']} tokens, {info['trained_tokens']} trained"
        counts = chain(info["dropped"].items(), info["overlong"].items())
        report(line + "".join(f"; {reason}: {n}" for reason, n in counts))
