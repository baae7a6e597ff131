"""Which prompts the files of a policy's data hold: one for each row, or those that are cut from a plain text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import NamedTuple

import numpy as np

from rlhf_cli.data.readers import Source
from rlhf_cli.data.rows import (
    DialogueRow,
    LabelledRow,
    PairRow,
    ParsedRow,
    PromptRow,
    RankedRow,
    RowError,
    TextRow,
    TrainingRow,
    check_unicode,
    num_chars,
    row_digest,
)
from rlhf_cli.data.stream import Tally, make_tallies, open_sources, parsed_rows
from rlhf_cli.data.tokenize import Encoder, encode_pieces
from rlhf_cli.errors import DataError
from rlhf_cli.schema import PromptDataConfig

EMPTY, DUPLICATE = "empty", "duplicate"
REFERENCE = "reference"  # the column that rouge reads unless told otherwise
HALF_CHARACTER = "\ufffd"  # what decoding makes of a part of a character's bytes
CHUNK_STARTS = 4096
# Tokenizers cut a text into words and runs of blanks first; the last few tokens of a piece may be of a cut word.
SPARE_TOKENS, CHARS_PER_TOKEN = 8, 5


class Candidate(NamedTuple):
    """A prompt before its tokens are counted. source: number of the data.path; row: a raw text, or a dialogue that the
    assistant is to answer; token_ids: where they are known already, since the text was cut by tokens."""

    source: int
    row: TrainingRow
    token_ids: np.ndarray | None = None


def read_candidates(
    data: PromptDataConfig, path: str | list[str] | None, encoder: Encoder, report: Callable[[str], None]
) -> tuple[list[Candidate], list[Tally]]:
    """Every prompt of these files that is kept, and what became of the others."""
    sources = open_sources(data, path)
    _refuse_documents(data, sources)
    tallies = make_tallies(sources)
    seen: set[int] = set()
    kept = []
    for candidate in islice(_candidates(data, sources, tallies, encoder, report), data.limit):
        tally, row = tallies[candidate.source], candidate.row
        try:
            check_unicode(row)
        except RowError as error:
            tally.bad_row(error, data.on_bad_row)
            continue
        digest = row_digest(row) if data.deduplicate else None
        if not num_chars(row):
            tally.dropped[EMPTY] += 1
        elif digest is not None and digest in seen:
            tally.dropped[DUPLICATE] += 1
        else:
            kept.append(candidate)
        if digest is not None:
            seen.add(digest)
    return kept, tallies


def _refuse_documents(data: PromptDataConfig, sources: list[Source]) -> None:
    """data.format=prompts would make one question of a whole file."""
    for file in (file for source in sources for file in source.files):
        if data.format == "prompts" and file.name.lower().removesuffix(".gz").endswith(".txt"):
            raise DataError(
                f"{file}: a .txt file is one plain text, from which prompts are cut; use data.format=auto, or write one"
                ' prompt per line as .jsonl: {"prompt": ...}'
            )


def _candidates(
    data: PromptDataConfig,
    sources: list[Source],
    tallies: list[Tally],
    encoder: Encoder,
    report: Callable[[str], None],
) -> Iterator[Candidate]:
    for number, parsed in parsed_rows(data, sources, tallies):
        if isinstance(parsed, TextRow) and parsed.document:
            report(
                f"data: {parsed.source}: prompts of data.prompt_tokens={data.prompt_tokens} tokens are cut from it, one"
                " from the start of each line that begins with a word"
            )
            tallies[number].rows -= 1  # its prompts are the rows
            for text, token_ids in cut_document(parsed, encoder, data.prompt_tokens):
                tallies[number].rows += 1
                yield Candidate(number, text, token_ids)
            continue
        try:
            row = open_row(parsed)
        except RowError as error:
            tallies[number].bad_row(error, data.on_bad_row)
            continue
        yield Candidate(number, row)


def open_row(row: ParsedRow) -> TrainingRow:
    """What a row leaves to the policy: a raw text to continue, or the dialogue before the assistant's last word, which
    becomes the column `reference` unless the row has one.

    Raises RowError for a pair of raw texts.
    """
    match row:
        case TextRow():
            return row
        case LabelledRow():
            return TextRow(row.text, row.source, {**row.columns, "label": row.label})
        case DialogueRow():
            spoken = [i for i, message in enumerate(row.messages) if message.role == "assistant"]
            if not spoken:
                return row
            reply = row.messages[spoken[-1]].content
            return DialogueRow(row.messages[: spoken[-1]], row.source, {REFERENCE: reply, **row.columns})
        case PromptRow() | RankedRow():
            return DialogueRow(row.prompt, row.source, row.columns)
        case PairRow():
            if row.prompt is None:
                raise RowError(row.source, "two raw texts without a prompt", "name it with data.columns={prompt: ...}")
            return DialogueRow(row.prompt, row.source, row.columns)


def cut_document(row: TextRow, encoder: Encoder, length: int) -> Iterator[tuple[TextRow, np.ndarray]]:
    """(text, token_ids (length,)) from the start of each line that begins with a word: what follows there, over line
    ends, in the tokens that the text has from there on. Starts with less than `length` tokens behind them give none.

    BOS counts as a token. A prompt that would end inside a character ends before it.
    """
    text = row.text
    bos = np.array([] if encoder.bos_id is None else [encoder.bos_id], np.int32)
    starts = [0, *(i + 1 for i, c in enumerate(text) if c == "\n")]
    numbered = [(line, s) for line, s in enumerate(starts, start=1) if s < len(text) and not text[s].isspace()]
    for first in range(0, len(numbered), CHUNK_STARTS):
        chunk = numbered[first : first + CHUNK_STARTS]
        for (line, _), found in zip(chunk, _tokens_from(text, [s for _, s in chunk], encoder, length), strict=True):
            tokens = np.concatenate([bos, found])[:length]
            if len(tokens) == length:
                tokens, shown = _whole_characters(encoder, tokens, len(bos))
                yield TextRow(shown, f"{row.source}:{line}", row.columns), tokens


def _tokens_from(text: str, starts: list[int], encoder: Encoder, length: int) -> list[np.ndarray]:
    """At least `length` tokens of the text from each start on, or all there are to its end.

    A piece is tokenised that is long enough to give some more, since its own end may be cut into other tokens.
    """
    tokens: list[np.ndarray] = [np.zeros(0, np.int32)] * len(starts)
    width, waiting = CHARS_PER_TOKEN * (length + SPARE_TOKENS), list(range(len(starts)))
    while waiting:
        pieces = [text[starts[i] : starts[i] + width] for i in waiting]
        for i, found in zip(waiting, encode_pieces(encoder, pieces, first=True), strict=True):
            tokens[i] = found
        short = (i for i in waiting if len(tokens[i]) < length + SPARE_TOKENS)
        waiting = [i for i in short if starts[i] + width < len(text)]
        width *= 2
    return tokens


def _whole_characters(encoder: Encoder, tokens: np.ndarray, num_bos: int) -> tuple[np.ndarray, str]:
    """Tokens without a last part of a character, and their text."""
    decode = lambda ids: str(encoder.tokenizer.decode(ids[num_bos:].tolist(), clean_up_tokenization_spaces=False))
    text = decode(tokens)
    while text.endswith(HALF_CHARACTER) and len(tokens) > num_bos + 1:
        tokens = tokens[:-1]
        text = decode(tokens)
    return tokens, text
