"""A data section of the config -> token sequences to train and to evaluate on, prepared once and cached."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rlhf_cli.data.cache import Columns, PartWriter, cache_root, load_or_build
from rlhf_cli.data.rows import RowError, TextRow, TrainingRow, num_chars, row_digest
from rlhf_cli.data.stream import (
    Tally,
    eval_count,
    in_chunks,
    make_tallies,
    named_infos,
    nothing_left,
    open_sources,
    report_counts,
    split_lone_document,
    training_rows,
)
from rlhf_cli.data.templates import Segment, Template
from rlhf_cli.data.token_rows import TokenRows, repeats_from_weights
from rlhf_cli.data.tokenize import Encoder, encode_rows, fit_length, make_encoder, row_segments
from rlhf_cli.schema import DataConfig

# Raised whenever the same data and settings give other tokens than before; old entries are then not found.
CACHE_VERSION = 1
CHUNK_ROWS, CHUNK_CHARS = 2048, 1 << 22
# (tokens,) the first two, (N + 1,) offsets, (N,) the rest
COLUMNS = {
    "input_ids": np.int32,
    "trained": np.bool_,
    "offsets": np.int64,
    "row_digests": np.uint64,
    "row_numbers": np.int64,
    "sources": np.int32,
}
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

    def write(folder: Path) -> dict[str, Any]:
        encoder = make_encoder(tokenizer)
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

    prepared = _open(data, digest, *load_or_build(entry, write, report))
    report_counts(prepared.info, report)
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
    writer = PartWriter(folder, COLUMNS, bounds={"offsets": "input_ids"})
    count = 0
    for chunk in in_chunks(rows, lambda numbered: num_chars(numbered[1]), CHUNK_ROWS, CHUNK_CHARS):
        writer.append(_tokenise_chunk(data, chunk, count, tallies, encoder, template))
        count += len(chunk)
        if progress is not None:
            progress(count, None)
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
    """The columns of one chunk, as PartWriter takes them."""
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


def _open(data: DataConfig, digest: str, info: dict[str, Any], parts: dict[str, Columns]) -> Prepared:
    """The sequences of a cache entry: the train part cut at its evaluation split, or with an eval part of its own."""
    columns = parts["train"]
    settings = f"data.overlong={data.overlong}, data.filters"
    num_train = int(np.searchsorted(columns["row_numbers"], info["train_rows"]))
    weights = np.array(data.weights)[columns["sources"][:num_train]] if data.weights else None
    train = _token_rows(columns, 0, num_train, weights)
    if not train.repeats.sum():
        raise nothing_left("train", info["train"], data, settings)
    evaluation = None
    if data.eval_path or data.validation_split_percentage:
        columns = parts.get("eval", columns)
        evaluation = _token_rows(columns, 0 if data.eval_path else num_train, len(columns["sources"]), None)
        if not len(evaluation):
            raise nothing_left("evaluate", info["eval"] or info["train"], data, settings)
    return Prepared(train, evaluation, named_infos(data, [*info["train"], *info["eval"]]), digest)


def _token_rows(columns: Columns, start: int, end: int, weights: np.ndarray | None) -> TokenRows:
    digests = columns["row_digests"][start:end]
    repeats = np.ones(end - start, np.int64)
    if weights is not None:
        repeats = repeats_from_weights(weights, digests, columns["row_numbers"][start:end])
    return TokenRows(columns["input_ids"], columns["trained"], columns["offsets"][start : end + 1], digests, repeats)
