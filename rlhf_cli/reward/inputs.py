"""From texts to a reward model's tokens: in its own template, as in its training, the end kept when it is too long."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from rlhf_cli.data.rows import DialogueRow, Message, RowError, TextRow
from rlhf_cli.data.templates import Template, render
from rlhf_cli.data.tokenize import Encoder, encode_rows, row_segments
from rlhf_cli.errors import DataError
from rlhf_cli.reward.source import ScoredText, plain_prompt


class Inputs(NamedTuple):
    """token_ids: one list per text; type_ids: the segment of each token, where the tokenizer tells (BERT); cut: how
    many texts lost their start."""

    token_ids: list[list[int]]
    type_ids: list[list[int]] | None
    cut: int


def decoder_inputs(encoder: Encoder, template: Template, texts: Sequence[ScoredText], max_length: int) -> Inputs:
    """The very tokens of training: BOS where the tokenizer adds one, prompt and response segment by segment, and EOS,
    whether or not whoever wrote the response ended it."""
    special = encoder.tokenizer.special_tokens_map
    rows = []
    for text in texts:
        if text.prompt is None or not any(message.content for message in _messages(text)):
            rows.append(row_segments(TextRow(text.response, text.source), template, special, "all"))
            continue
        dialogue = DialogueRow(_messages(text), text.source, num_context=len(text.prompt))
        try:
            rows.append(row_segments(dialogue, template, special, "auto"))
        except RowError as error:
            raise DataError(f"{error}; choose another one with the reward source's `template`") from error
    lead = [] if encoder.bos_id is None else [encoder.bos_id]
    token_ids, cut = [], 0
    for tokens in encode_rows(encoder, rows):
        ids = tokens.input_ids.tolist()
        if len(ids) > max_length:
            cut += 1
            ids = lead + ids[len(ids) - max_length + len(lead) :]
        token_ids.append(ids)
    return Inputs(token_ids, None, cut)


def encoder_inputs(tokenizer: Any, template: Template, texts: Sequence[ScoredText], max_length: int) -> Inputs:
    """What the tokenizer itself makes of a text, special tokens included. Without a template prompt and response are a
    pair of texts, which is how such models are trained to judge an answer."""
    made, cut = [], 0
    for text in texts:
        pair = _as_texts(tokenizer, template, text)
        encoded = tokenizer(*pair, verbose=False)
        if len(encoded["input_ids"]) > max_length:
            encoded = _cut(tokenizer, pair, max_length)
            cut += 1
        made.append(encoded)
    token_ids = [list(m["input_ids"]) for m in made]
    has_types = bool(made) and "token_type_ids" in made[0]
    return Inputs(token_ids, [list(m["token_type_ids"]) for m in made] if has_types else None, cut)


def _as_texts(tokenizer: Any, template: Template, text: ScoredText) -> tuple[str, ...]:
    if text.prompt is None:
        return (text.response,)
    if template.name == "none":
        return (plain_prompt(text.prompt), text.response)
    return (render(template, tokenizer.special_tokens_map, _messages(text), False),)


def _cut(tokenizer: Any, pair: tuple[str, ...], max_length: int) -> Any:
    """From the start: first of the prompt; the response loses its own start when the prompt is gone."""
    before = tokenizer.truncation_side
    tokenizer.truncation_side = "left"
    try:
        if len(pair) == 2:
            response = len(tokenizer(pair[1], add_special_tokens=False).input_ids)
            if response + tokenizer.num_special_tokens_to_add(pair=True) < max_length:
                return tokenizer(*pair, truncation="only_first", max_length=max_length)
        return tokenizer(pair[-1], truncation=True, max_length=max_length)
    finally:
        tokenizer.truncation_side = before


def _messages(text: ScoredText) -> tuple[Message, ...]:
    assert text.prompt is not None
    return (*text.prompt, Message("assistant", text.response))
