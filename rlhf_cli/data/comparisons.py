"""Pairs, rankings and labelled texts -> token sequences in groups, prepared once and cached."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rlhf_cli.data.cache import Columns, PartWriter, cache_root, load_or_build
from rlhf_cli.data.comparison_rows import ComparisonRows, comparison_rows
from rlhf_cli.data.comparison_stream import (
    IDENTICAL,
    Group,
    Kind,
    Labels,
    comparison_groups,
    find_kind,
    has_contrast,
    survey_labels,
)
from rlhf_cli.data.rows import DialogueRow, RowError, num_chars
from rlhf_cli.data.stream import (
    Tally,
    eval_count,
    in_chunks,
    make_tallies,
    named_infos,
    nothing_left,
    open_sources,
    paths_of,
    report_counts,
)
from rlhf_cli.data.templates import Segment, Template
from rlhf_cli.data.tokenize import OVERLONG, Encoder, encode_rows, make_encoder, row_segments
from rlhf_cli.schema import ComparisonDataConfig

# Raised whenever the same data and settings give other tokens or another split than before.
CACHE_VERSION = 3
SHOWN_LABELS = 20  # in the terminal
CHUNK_GROUPS, CHUNK_CHARS = 1024, 1 << 22
# as ComparisonRows has them
COLUMNS = {
    "input_ids": np.int32,
    "offsets": np.int64,
    "groups": np.int64,
    "ranks": np.float64,
    "margins": np.float64,
    "labels": np.int64,
    "sequence_digests": np.uint64,
    "row_numbers": np.int64,
    "sources": np.int32,
    "lines": np.int64,
}
LINE = re.compile(r"\d+$")  # of a row's source: "a.jsonl:17", "b.parquet row 3"
# The settings that decide which tokens come out, and the split. Weights act on the prepared groups.
TELLING = (
    "format",
    "columns",
    "max_length",
    "overlong",
    "validation_split_percentage",
    "split_seed",
    "limit",
    "on_bad_row",
    "deduplicate",
)

NumberedGroups = list[tuple[int, Group]]


class PreparedComparisons(NamedTuple):
    """train and eval groups; info: one entry per data.path and data.eval_path for the manifest; digest of it all.

    labels: their names in order, empty for pairs and rankings. templated: whether rows go through the template, because
    they have a prompt.
    """

    train: ComparisonRows
    eval: ComparisonRows | None
    info: list[dict[str, Any]]
    digest: str
    kind: Kind
    labels: tuple[str, ...]
    templated: bool

    @property
    def sequences_per_row(self) -> int:
        """Sequences that a row counts as in train.micro_batch_size; a ranking of K counts as K / 2 rows."""
        return 1 if self.kind == "labels" else 2


class _Making(NamedTuple):
    """What turns groups into tokens. label_numbers: name -> number."""

    data: ComparisonDataConfig
    encoder: Encoder
    special_tokens: dict[str, str]
    template: Template
    label_numbers: dict[str, int]


def prepare_comparisons(
    data: ComparisonDataConfig,
    tokenizer: Any,
    tokenizer_digest: str,
    template: Template,
    report: Callable[[str], None],
) -> PreparedComparisons:
    """Read, tokenise and cache the data, or open what an earlier run cached. report gets lines for people.

    Pairs and rankings: the last data.validation_split_percentage of the rows are for evaluation. Labelled texts: that
    share of each label, drawn with data.split_seed. Which rows these are does not depend on the tokenizer.
    Raises DataError for rows and files that cannot be used, or when nothing is left to train or to evaluate on.
    """
    sources = open_sources(data, data.path)
    tallies = make_tallies(sources)
    eval_sources = open_sources(data, data.eval_path) if data.eval_path else []
    eval_tallies = make_tallies(eval_sources)
    digest = _digest(data, tallies, eval_tallies, tokenizer_digest, template)

    def write(folder: Path) -> dict[str, Any]:
        expected = find_kind(data, sources)
        labels = Labels((), None)
        if expected.kind == "labels":
            labels = survey_labels(data, sources, eval_sources, expected)
        numbers = {name: number for number, name in enumerate(labels.names)}
        making = _Making(data, make_encoder(tokenizer), dict(tokenizer.special_tokens_map), template, numbers)
        held_out, parts = labels.held_out, [folder / "train"]
        if held_out is not None:
            parts.append(folder / "eval")
        templated = False

        def watched() -> Iterator[Group]:
            nonlocal templated
            for group in comparison_groups(data, sources, tallies, expected):
                templated |= isinstance(group.rows[0], DialogueRow)
                yield group

        count = _write(parts, watched(), lambda row: 0 if held_out is None else int(held_out[row]), tallies, making)
        num_eval = 0 if expected.kind == "labels" else eval_count(count, data.validation_split_percentage)
        if eval_sources:
            groups = comparison_groups(data, eval_sources, eval_tallies, expected)
            _write([folder / "eval"], groups, lambda row: 0, eval_tallies, making)
        infos = [[_info(tally) for tally in side] for side in (tallies, eval_tallies)]
        told = {"kind": expected.kind, "labels": labels.names, "train_rows": count - num_eval, "templated": templated}
        return told | {"train": infos[0], "eval": infos[1]}

    prepared = _open(data, digest, *load_or_build(cache_root(data.cache_dir) / digest, write, report))
    report_counts(prepared.info, report)
    _report_labels(prepared, report)
    return prepared


def _digest(
    data: ComparisonDataConfig,
    tallies: list[Tally],
    eval_tallies: list[Tally],
    tokenizer_digest: str,
    template: Template,
) -> str:
    told = {
        "comparisons": CACHE_VERSION,
        "train": [tally.digest for tally in tallies],
        "eval": [tally.digest for tally in eval_tallies],
        "settings": {name: getattr(data, name) for name in TELLING},
        "tokenizer": tokenizer_digest,
        "template": template,
    }
    return blake2b(json.dumps(told, sort_keys=True).encode(), digest_size=16).hexdigest()


def _write(
    parts: list[Path], groups: Iterator[Group], part_of: Callable[[int], int], tallies: list[Tally], making: _Making
) -> int:
    """Write group i to parts[part_of(i)]; returns the number of groups before overlong ones were dropped."""
    writers = [PartWriter(part, COLUMNS, bounds={"offsets": "input_ids", "groups": "ranks"}) for part in parts]
    count = 0
    for chunk in in_chunks(groups, _num_chars, CHUNK_GROUPS, CHUNK_CHARS):
        numbered = list(enumerate(chunk, start=count))
        for part, writer in enumerate(writers):
            writer.append(_tokenise([item for item in numbered if part_of(item[0]) == part], tallies, making))
        count += len(chunk)
    for writer in writers:
        writer.close()
    return count


def _tokenise(numbered: NumberedGroups, tallies: list[Tally], making: _Making) -> Columns:
    """The columns of some groups, as PartWriter takes them."""
    cut: list[tuple[int, Group, list[list[Segment]]]] = []
    for number, group in numbered:
        try:
            segments = [row_segments(row, making.template, making.special_tokens, "auto") for row in group.rows]
        except RowError as error:
            tallies[group.source].bad_row(error, making.data.on_bad_row)
        else:
            cut.append((number, group, segments))
    encoded = iter(encode_rows(making.encoder, [row for _, _, segments in cut for row in segments]))
    kept: list[tuple[int, Group]] = []
    sequences: list[np.ndarray] = []
    for number, group, segments in cut:
        fitted = _fit([next(encoded).input_ids for _ in segments], group, tallies[group.source], making.data)
        if fitted:
            kept.append((number, group))
            sequences += fitted
    return {
        "input_ids": np.concatenate(sequences or [np.zeros(0)]),
        "offsets": np.cumsum([len(ids) for ids in sequences], dtype=np.int64),
        "groups": np.cumsum([len(group.rows) for _, group in kept], dtype=np.int64),
        "ranks": np.array([rank for _, group in kept for rank in group.ranks]),
        "margins": np.array([group.margin for _, group in kept]),
        "labels": np.array([-1 if g.label is None else making.label_numbers[g.label] for _, g in kept], np.int64),
        "sequence_digests": np.array([digest for _, group in kept for digest in group.digests], np.uint64),
        "row_numbers": np.array([number for number, _ in kept], np.int64),
        "sources": np.array([group.source for _, group in kept], np.int32),
        "lines": np.array([int(LINE.findall(group.rows[0].source)[0]) for _, group in kept], np.int64),
    }


def _fit(sequences: list[np.ndarray], group: Group, tally: Tally, data: ComparisonDataConfig) -> list[np.ndarray]:
    """The sequences of one group, each at most data.max_length long; none if the group is dropped. Counts what became
    of it."""
    overlong = any(len(ids) > data.max_length for ids in sequences)
    if overlong and data.overlong == "drop":
        tally.dropped[OVERLONG] += 1
        return []
    sequences = [ids[: data.max_length] for ids in sequences]
    if group.label is None and not has_contrast(group.ranks, [ids.tobytes() for ids in sequences]):
        tally.dropped[IDENTICAL] += 1
        return []
    if overlong:
        tally.overlong["truncate"] += 1
    tally.kept += 1
    tally.sequences += len(sequences)
    tally.tokens += sum(map(len, sequences))
    return sequences


def _open(
    data: ComparisonDataConfig, digest: str, info: dict[str, Any], parts: dict[str, Columns]
) -> PreparedComparisons:
    """The groups of a cache entry: the train part cut at its evaluation split, or with an eval part of its own."""
    columns = parts["train"]
    settings = f"data.overlong={data.overlong}"
    end = int(np.searchsorted(columns["row_numbers"], info["train_rows"]))
    train = comparison_rows(columns, 0, end, data.weights, tuple(paths_of(data.path)))
    if not train.repeats.sum():
        raise nothing_left("train", info["train"], data, settings)
    evaluation = None
    if data.eval_path or data.validation_split_percentage:
        columns, start = (parts["eval"], 0) if "eval" in parts else (columns, end)
        evaluation = comparison_rows(
            columns, start, len(columns["sources"]), None, tuple(paths_of(data.eval_path or data.path))
        )
        if not len(evaluation):
            raise nothing_left("evaluate", info["eval"] or info["train"], data, settings)
    infos = named_infos(data, [*info["train"], *info["eval"]])
    return PreparedComparisons(train, evaluation, infos, digest, info["kind"], tuple(info["labels"]), info["templated"])


def _info(tally: Tally) -> dict[str, Any]:
    """Without the count of tokens that a language model would learn to predict."""
    return {name: value for name, value in tally.as_info().items() if name != "trained_tokens"}


def _report_labels(prepared: PreparedComparisons, report: Callable[[str], None]) -> None:
    """How often each label stands on either side, and which ones cannot be learnt."""
    sides = [side for side in (prepared.train, prepared.eval) if side is not None]
    counts = [[int((side.labels == number).sum()) for side in sides] for number in range(len(prepared.labels))]
    shown = 0
    for name, (train, *evaluation) in zip(prepared.labels, counts, strict=True):
        line = f"data: label {name}: {train} rows to train on"
        line += "".join(f", {number} to evaluate on" for number in evaluation)
        if not train:
            report(f"{line}; it cannot be learnt")
        elif shown < SHOWN_LABELS:
            report(line)
            shown += 1
    further = sum(train > 0 for train, *_ in counts) - shown
    if further:
        report(f"data: and {further} further labels")


def _num_chars(group: Group) -> int:
    return sum(map(num_chars, group.rows))
