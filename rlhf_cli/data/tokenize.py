"""Training rows -> token sequences with their loss mask; what happens to rows that are too long."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rlhf_cli.data.rows import Message, RowError, TextRow, TrainingRow
from rlhf_cli.data.templates import Segment, Template, TemplateRefusal, segments
from rlhf_cli.errors import DataError, ModelError

PIECE_CHARS = 1 << 20  # longer texts are tokenised in pieces: a fast tokenizer needs about 100 bytes per character
BATCH_CHARS = 1 << 22
OVERLONG, NOTHING_TRAINED = "overlong", "no trained token left"


class Tokens(NamedTuple):
    """input_ids (T,) int32; trained (T,) bool: whether this token is to be predicted (before any shift)."""

    input_ids: np.ndarray
    trained: np.ndarray


class Encoder(NamedTuple):
    """A tokenizer and what was found out about it. bos_id is None unless the tokenizer adds BOS itself."""

    tokenizer: Any
    bos_id: int | None
    eos_id: int
    adds_prefix: bool


def make_encoder(tokenizer: Any) -> Encoder:
    """Look at a tokenizer once. Raises ModelError if it has no EOS, which every trained sample needs."""
    if tokenizer.eos_token_id is None:
        raise ModelError("the tokenizer has no end-of-sequence token; set eos_token in its tokenizer_config.json")
    start = tokenizer("").input_ids[:1]
    adds_bos = bool(start) and start[0] == tokenizer.bos_token_id
    return Encoder(
        tokenizer, tokenizer.bos_token_id if adds_bos else None, tokenizer.eos_token_id, _adds_prefix(tokenizer)
    )


def row_segments(
    row: TrainingRow, template: Template, special_tokens: Mapping[str, str], loss_on: str
) -> list[Segment]:
    """What is trained in a row. loss_on auto = all of a text, the replies of a dialogue."""
    if isinstance(row, TextRow):
        if loss_on == "completion":
            raise DataError(
                f"{row.source}: plain text has no completion to put the loss on; use data.loss_on=all or auto,"
                " or data with prompt and response"
            )
        return [Segment(row.text, True)]
    try:
        parts = segments(template, special_tokens, row.messages, num_context=row.num_context)
    except TemplateRefusal as error:
        raise RowError(row.source, "refused by the chat template", str(error)) from error
    if not parts[-1].text.strip() and not parts[-1].trained:
        parts.pop()  # the line break after an end marker: nothing follows it in training
    return [Segment(text, True) for text, _ in parts] if loss_on == "all" else parts


def encode_rows(encoder: Encoder, rows: Sequence[Sequence[Segment]]) -> list[Tokens]:
    """Tokens of each row: BOS if the tokenizer adds one, the segments one by one (so that a prompt has the same tokens
    in training and at generation), EOS."""
    return [
        _with_eos(encoder, tokens, row[-1].trained) for tokens, row in zip(_encode(encoder, rows), rows, strict=True)
    ]


def encode_prompt(encoder: Encoder, template: Template, messages: Sequence[Message]) -> np.ndarray:
    """Tokens (T,) of a prompt with generation prompt: exactly those that a reply follows in training."""
    parts = segments(template, encoder.tokenizer.special_tokens_map, messages, generation_prompt=True)
    return encode_open(encoder, [parts])[0]


def encode_open(encoder: Encoder, rows: Sequence[Sequence[Segment]]) -> list[np.ndarray]:
    """Tokens (T,) int32 of each row, as encode_rows but without EOS: of texts that are still to be continued."""
    return [tokens.input_ids for tokens in _encode(encoder, rows)]


def encode_pieces(encoder: Encoder, texts: Sequence[str], first: bool) -> list[np.ndarray]:
    """Tokens (T,) int32 of each text, without BOS and EOS. first: each begins a text; else each goes on within one."""
    return list(_encode_texts(encoder, list(texts), [first] * len(texts)))


def fit_length(tokens: Tokens, max_length: int, overlong: str) -> list[Tokens] | str:
    """The sequences of one row, each at most max_length long; or the reason why there is none.

    drop: none. truncate: the start (so without EOS). split: windows of max_length that overlap by one token: the first
    token of a later window is context only, so that each token is predicted exactly once; windows without a trained
    token are left out.
    """
    assert overlong in ("drop", "truncate", "split")
    ids, trained = tokens
    if len(ids) <= max_length:
        found = [tokens]
    elif overlong == "drop":
        return OVERLONG
    elif overlong == "truncate":
        found = [Tokens(ids[:max_length], trained[:max_length])]
    else:
        starts = range(0, len(ids) - 1, max_length - 1)
        found = [Tokens(ids[s : s + max_length], trained[s : s + max_length]) for s in starts]
    # nothing predicts the first token of a sequence
    found = [Tokens(i, np.concatenate([[False], t[1:]])) for i, t in found if t[1:].any()]
    return found or NOTHING_TRAINED


def _encode(encoder: Encoder, rows: Sequence[Sequence[Segment]]) -> list[Tokens]:
    """As encode_rows, without EOS."""
    texts: list[str] = []
    owners: list[tuple[int, bool]] = []  # per text: its row, and whether it is trained
    for number, row in enumerate(rows):
        for segment in row:
            for piece in _cut(segment.text):
                texts.append(piece)
                owners.append((number, segment.trained))
    first = [i == 0 or owners[i][0] != owners[i - 1][0] for i in range(len(texts))]
    ids: list[list[np.ndarray]] = [[] for _ in rows]
    trained: list[list[np.ndarray]] = [[] for _ in rows]
    for (number, is_trained), tokens in zip(owners, _encode_texts(encoder, texts, first), strict=True):
        if encoder.bos_id is not None and not ids[number] and tokens[:1].tolist() != [encoder.bos_id]:
            # a chat template may have written BOS itself
            ids[number].append(np.array([encoder.bos_id], np.int32))
            trained[number].append(np.array([False]))
        ids[number].append(tokens)
        trained[number].append(np.full(len(tokens), is_trained))
    return [Tokens(np.concatenate(i), np.concatenate(t)) for i, t in zip(ids, trained, strict=True)]


def _with_eos(encoder: Encoder, tokens: Tokens, trained: bool) -> Tokens:
    if len(tokens.input_ids) and tokens.input_ids[-1] == encoder.eos_id:
        return tokens
    return Tokens(np.append(tokens.input_ids, np.int32(encoder.eos_id)), np.append(tokens.trained, trained))


def _cut(text: str) -> list[str]:
    """A long text in pieces that end after a line break before a word, where tokenizers part words anyway."""
    pieces, start = [], 0
    while len(text) - start > PIECE_CHARS:
        end = start + PIECE_CHARS
        at = text.rfind("\n", start, end - 1)
        while at > start and text[at + 1].isspace():
            at = text.rfind("\n", start, at)
        end = at + 1 if at > start else end
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]]


def _adds_prefix(tokenizer: Any) -> bool:
    """Whether the tokenizer puts a blank in front of every text (Llama 2, Mistral 7B and other SentencePiece ones)."""
    encode = lambda text: tokenizer(text, add_special_tokens=False).input_ids
    return bool(encode("\nx") != encode("\n") + encode("x"))


def _encode_texts(encoder: Encoder, texts: list[str], first: list[bool]) -> Iterator[np.ndarray]:
    """Token ids (T,) int32 of each text, with a bounded number of characters in work at a time."""
    start, chars = 0, 0
    for end, text in enumerate(texts):
        if chars and chars + len(text) > BATCH_CHARS:
            yield from _encode_batch(encoder, texts[start:end], first[start:end])
            start, chars = end, 0
        chars += len(text)
    if start < len(texts):
        yield from _encode_batch(encoder, texts[start:], first[start:])


def _encode_batch(encoder: Encoder, texts: list[str], first: list[bool]) -> Iterator[np.ndarray]:
    """A text that goes on within a row gets no blank in front: it is encoded after a line break, whose tokens are
    then removed."""
    encode = lambda shown: (
        encoder.tokenizer(
            shown, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
        ).input_ids
    )
    lead: list[int] = encode("\n") if encoder.adds_prefix else []
    shown = [text if is_first or not lead else "\n" + text for text, is_first in zip(texts, first, strict=True)]
    different = list(dict.fromkeys(shown))  # the answers to one prompt repeat it
    found = dict(zip(different, encode(different), strict=True))
    for text, is_first, key in zip(texts, first, shown, strict=True):
        ids = found[key]
        if lead and not is_first:
            # else: the line break grew together with the text
            ids = ids[len(lead) :] if ids[: len(lead)] == lead else encode(text)
        yield np.array(ids, np.int32)
