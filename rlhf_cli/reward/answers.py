"""What a policy answered to its prompts, as texts to score."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from rlhf_cli.data.prompts import Prompt
from rlhf_cli.data.templates import Template, reply_frame
from rlhf_cli.errors import DataError
from rlhf_cli.models.tokenizer import tokenizer_digest
from rlhf_cli.reward.source import ScoredText


class Writer(NamedTuple):
    """What a policy writes with. lead: what its template has between the generation prompt and a reply, which the
    policy learnt to write itself; closing: what it has behind a reply, such as an end marker."""

    tokenizer_digest: str
    template: Template
    lead: str
    closing: str


def writer_of(tokenizer: Any, template: Template) -> Writer:
    """Look at a policy's tokenizer and template once."""
    try:
        lead, closing = reply_frame(template, tokenizer.special_tokens_map)
    except DataError:  # its dialogues have another form than its prompts: then nothing of a reply is known as its own
        lead = closing = ""
    return Writer(tokenizer_digest(tokenizer), template, lead, closing)


def scored_text(prompt: Prompt, response: str, token_ids: np.ndarray | None, writer: Writer) -> ScoredText:
    """A prompt with its response, for all sources of rewards.

    response: the text without an end; token_ids (T,): the tokens that are exactly this text, None where no tokens are
    (a stop string began inside one).
    """
    tokens = None
    if token_ids is not None and len(token_ids):  # an empty response reads the same for every model
        tokens = (*prompt.token_ids.tolist(), *token_ids.tolist())
    is_dialogue = prompt.messages is not None
    return ScoredText(
        prompt.messages,
        response.removeprefix(writer.lead) if is_dialogue else response,
        prompt.columns,
        prompt.source,
        lead="" if is_dialogue else prompt.text,
        token_ids=tokens,
        tokenizer_digest=writer.tokenizer_digest,
        template=writer.template,
    )
