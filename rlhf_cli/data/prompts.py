"""Prompts that a policy answers: from files to tokens, and the order in which they are taken.

Every row gives one prompt: a dialogue up to the assistant's last word, rendered with its generation prompt so that its
tokens are those of training; or a raw text that the policy continues. A plain .txt gives many, one at each line.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np

from rlhf_cli.data.plan import epoch_order
from rlhf_cli.data.prompt_rows import EMPTY, Candidate, read_candidates
from rlhf_cli.data.rows import (
    DialogueRow,
    Message,
    RowError,
    TextRow,
    TrainingRow,
    num_chars,
    plain_prompt,
    row_digest,
)
from rlhf_cli.data.stream import Tally, eval_count, in_chunks, report_counts
from rlhf_cli.data.templates import Segment, Template, TemplateRefusal, segments
from rlhf_cli.data.tokenize import OVERLONG, Encoder, encode_open, make_encoder
from rlhf_cli.errors import DataError
from rlhf_cli.schema import PromptDataConfig

CHUNK_ROWS, CHUNK_CHARS = 4096, 1 << 22
# The settings that decide which prompts come out.
TELLING = (
    "format", "columns", "max_prompt_length", "overlong", "prompt_tokens", "validation_split_percentage", "limit",
    "on_bad_row", "deduplicate",
)  # fmt: skip


class Prompt(NamedTuple):
    """token_ids (P,) int32, BOS and generation prompt included; messages: the dialogue, None = raw text that the
    response continues; text: the raw text, or the dialogue without a template; columns: the further columns of the row;
    source: where it stands.

    A dialogue that lost its start (data.overlong=truncate) has all its messages here, and the tokens that are left.
    """

    token_ids: np.ndarray
    messages: tuple[Message, ...] | None
    text: str
    columns: Mapping[str, Any]
    source: str


class PreparedPrompts(NamedTuple):
    """train and eval prompts; info: one entry per data.path and data.eval_path for the manifest; digest of it all."""

    train: list[Prompt]
    eval: list[Prompt] | None
    info: list[dict[str, Any]]
    digest: str


def prompt_order(num_prompts: int, seed: int) -> Callable[[int], int]:
    """cursor (how many prompts were taken before) -> number of the prompt. Each pass over the prompts has a permutation
    of its own, a function of seed and pass; so the cursor is all that has to be saved."""
    order = lru_cache(maxsize=2)(lambda epoch: epoch_order(num_prompts, None, seed, epoch))
    return lambda cursor: int(order(cursor // num_prompts)[cursor % num_prompts])


def prepare_prompts(
    data: PromptDataConfig, tokenizer: Any, template: Template, report: Callable[[str], None]
) -> PreparedPrompts:
    """Read and tokenise the prompts. report gets lines for people.

    The last data.validation_split_percentage of the prompts are for evaluation, before overlong ones are dropped.
    Raises DataError for rows and files that cannot be used, or when nothing is left to train or to evaluate on.
    """
    encoder = make_encoder(tokenizer)
    rows, tallies = read_candidates(data, data.path, encoder, report)
    eval_rows, eval_tallies = read_candidates(data, data.eval_path, encoder, report) if data.eval_path else ([], [])
    owners = eval_tallies or tallies
    if data.validation_split_percentage:
        boundary = len(rows) - eval_count(len(rows), data.validation_split_percentage)
        rows, eval_rows = rows[:boundary], rows[boundary:]
    train = _tokenise(data, rows, tallies, encoder, template)
    evaluation = None
    if data.eval_path or data.validation_split_percentage:
        evaluation = _tokenise(data, eval_rows, owners, encoder, template)
    infos = [_info(tally) for tally in (*tallies, *eval_tallies)]
    if not train:
        raise _nothing_left("answer", infos[: len(tallies)], data)
    if evaluation is not None and not evaluation:
        raise _nothing_left("evaluate on", [_info(tally) for tally in owners], data)
    report_counts(infos, report)
    repeated = _count_repeated(rows, eval_rows)
    if repeated:
        report(
            f"data: {repeated} of {len(eval_rows)} evaluation prompts are trained on, too, so they do not tell how new"
            " prompts are answered; take them out of one side"
        )
    return PreparedPrompts(train, evaluation, infos, _digest(data, train, evaluation))


# --- tokens


def _tokenise(
    data: PromptDataConfig, candidates: list[Candidate], tallies: list[Tally], encoder: Encoder, template: Template
) -> list[Prompt]:
    """The prompts that fit, a bounded number of characters at a time."""
    prompts = []
    for chunk in in_chunks(iter(candidates), lambda c: num_chars(c.row), CHUNK_ROWS, CHUNK_CHARS):
        for candidate, token_ids in _encode_chunk(data, chunk, tallies, encoder, template):
            tally = tallies[candidate.source]
            fitted = _fit(token_ids, encoder, data)
            if fitted is None:
                tally.dropped[OVERLONG] += 1
                continue
            if len(fitted) < len(token_ids):
                tally.overlong["truncate"] += 1
            if not len(fitted):  # no BOS, no template, and a text of characters that the tokenizer drops
                tally.dropped[EMPTY] += 1
                continue
            tally.kept += 1
            tally.sequences += 1
            tally.tokens += len(fitted)
            prompts.append(_prompt(candidate.row, fitted, len(fitted) < len(token_ids), encoder))
    return prompts


def _encode_chunk(
    data: PromptDataConfig, chunk: list[Candidate], tallies: list[Tally], encoder: Encoder, template: Template
) -> Iterator[tuple[Candidate, np.ndarray]]:
    special = encoder.tokenizer.special_tokens_map
    open_rows: list[tuple[Candidate, list[Segment]]] = []
    for candidate in chunk:
        row = candidate.row
        if isinstance(row, TextRow):
            open_rows.append((candidate, [Segment(row.text, True)] if candidate.token_ids is None else []))
            continue
        try:
            open_rows.append((candidate, segments(template, special, row.messages, generation_prompt=True)))
        except TemplateRefusal as error:
            refused = RowError(row.source, "refused by the chat template", str(error))
            tallies[candidate.source].bad_row(refused, data.on_bad_row)
    encoded = iter(encode_open(encoder, [parts for candidate, parts in open_rows if candidate.token_ids is None]))
    for candidate, _ in open_rows:
        yield candidate, next(encoded) if candidate.token_ids is None else candidate.token_ids


def _fit(token_ids: np.ndarray, encoder: Encoder, data: PromptDataConfig) -> np.ndarray | None:
    """At most data.max_prompt_length tokens: None for one that is dropped; else without its start, but with BOS."""
    length = data.max_prompt_length
    if len(token_ids) <= length:
        return token_ids
    if data.overlong == "drop":
        return None
    bos = token_ids[:1] if token_ids[0] == encoder.bos_id else token_ids[:0]
    return np.concatenate([bos, token_ids[len(token_ids) - length + len(bos) :]])


def _prompt(row: TrainingRow, token_ids: np.ndarray, is_cut: bool, encoder: Encoder) -> Prompt:
    if isinstance(row, DialogueRow):
        return Prompt(token_ids, row.messages, plain_prompt(row.messages), row.columns, row.source)
    text = row.text
    if is_cut:
        own = token_ids[1:] if token_ids[0] == encoder.bos_id else token_ids
        text = str(encoder.tokenizer.decode(own.tolist(), clean_up_tokenization_spaces=False))
    return Prompt(token_ids, None, text, row.columns, row.source)


# --- the end


def _count_repeated(rows: list[Candidate], eval_rows: list[Candidate]) -> int:
    """How many evaluation prompts are also among the others."""
    if not eval_rows:
        return 0
    known = {row_digest(candidate.row) for candidate in rows}
    return sum(row_digest(candidate.row) in known for candidate in eval_rows)


def _info(tally: Tally) -> dict[str, Any]:
    """As the manifest holds it; nothing is trained in a prompt."""
    return {name: value for name, value in tally.as_info().items() if name != "trained_tokens"}


def _nothing_left(purpose: str, infos: list[dict[str, Any]], data: PromptDataConfig) -> DataError:
    rows = sum(info["rows"] for info in infos)
    dropped: Counter[str] = sum((Counter(info["dropped"]) for info in infos), Counter())
    reasons = ", ".join(f"{reason}: {n}" for reason, n in dropped.most_common()) or "none was dropped"
    return DataError(
        f"data.path: no prompt is left to {purpose}; of {rows} rows {reasons}."
        f" Check data.max_prompt_length={data.max_prompt_length}, data.overlong={data.overlong},"
        f" data.prompt_tokens={data.prompt_tokens} and"
        f" data.validation_split_percentage={data.validation_split_percentage:g}"
    )


def _digest(data: PromptDataConfig, train: list[Prompt], evaluation: list[Prompt] | None) -> str:
    """Of the settings and of all that a run takes from the files: tokens, so tokenizer and template, and columns."""
    digest = blake2b(
        json.dumps({name: getattr(data, name) for name in TELLING}, sort_keys=True).encode(), digest_size=16
    )
    for side in (train, evaluation or []):
        digest.update(f"{len(side)}:".encode())
        for prompt in side:
            digest.update(f"{len(prompt.token_ids)}:".encode() + prompt.token_ids.tobytes())
            digest.update(repr((prompt.messages, prompt.text, dict(prompt.columns))).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()
