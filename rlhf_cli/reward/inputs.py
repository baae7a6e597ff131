"""From texts to a reward model's tokens: in its own template, as in its training, the end kept when it is too long."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rlhf_cli.data.rows import DialogueRow, Message, RowError, TextRow, plain_prompt
from rlhf_cli.data.templates import Segment, Template, TemplateRefusal, render, reply_frame
from rlhf_cli.data.tokenize import Encoder, encode_pieces, encode_rows, row_segments
from rlhf_cli.errors import DataError
from rlhf_cli.reward.source import ScoredText


class Inputs(NamedTuple):
    """token_ids: one list per text; type_ids: the segment of each token, where the tokenizer tells (BERT); cut: how
    many texts lost their start."""

    token_ids: list[list[int]]
    type_ids: list[list[int]] | None
    cut: int


def decoder_inputs(
    encoder: Encoder, template: Template, texts: Sequence[ScoredText], max_length: int, tokenizer_digest: str = ""
) -> Inputs:
    """The very tokens of training: BOS where the tokenizer adds one, prompt and response segment by segment, and EOS,
    whether or not whoever wrote the response ended it.

    tokenizer_digest: of the model's tokenizer; texts whose tokens are known in that one, and in this template, are not
    tokenised again.
    """
    known = {
        number: text.token_ids
        for number, text in enumerate(texts)
        if text.token_ids is not None and _same_tokens(text, template, tokenizer_digest)
    }
    others = [text for number, text in enumerate(texts) if number not in known]
    special = encoder.tokenizer.special_tokens_map
    made = iter(encode_rows(encoder, [_segments(text, template, special) for text in others]))
    closing = _closing(encoder, template) if any(texts[number].prompt is not None for number in known) else []
    bos = [] if encoder.bos_id is None else [encoder.bos_id]
    token_ids, cut = [], 0
    for number, text in enumerate(texts):
        if number in known:
            ids = [*known[number], *(closing if text.prompt is not None else [])]
            ids += [encoder.eos_id] if ids[-1:] != [encoder.eos_id] else []
        else:
            ids = next(made).input_ids.tolist()
        if len(ids) > max_length:
            cut += 1
            ids = bos + ids[len(ids) - max_length + len(bos) :]
        token_ids.append(ids)
    return Inputs(token_ids, None, cut)


def _same_tokens(text: ScoredText, template: Template, tokenizer_digest: str) -> bool:
    """Whether the policy's tokens are those that this model would have been trained on; a raw text has no template."""
    if not tokenizer_digest or text.tokenizer_digest != tokenizer_digest:
        return False
    return text.prompt is None or (text.template is not None and text.template.jinja == template.jinja)


def _segments(text: ScoredText, template: Template, special: Mapping[str, str]) -> list[Segment]:
    if text.prompt is None or not any(message.content for message in _messages(text)):
        return row_segments(TextRow(text.lead + text.response, text.source), template, special, "all")
    dialogue = DialogueRow(_messages(text), text.source, num_context=len(text.prompt))
    try:
        return row_segments(dialogue, template, special, "auto")
    except RowError as error:
        raise DataError(f"{error}; choose another one with the reward source's `template`") from error


def _closing(encoder: Encoder, template: Template) -> list[int]:
    """Tokens that training has behind the words of a last reply, but EOS."""
    try:
        closing = reply_frame(template, encoder.tokenizer.special_tokens_map).closing
    except TemplateRefusal as error:
        raise DataError(f"{error}; choose another one with the reward source's `template`") from error
    ids: list[int] = encode_pieces(encoder, [closing], first=False)[0].tolist()
    return ids


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
        return (text.lead + text.response,)
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
