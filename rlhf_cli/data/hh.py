"""Anthropic's raw HH layout ("\\n\\nHuman: ...\\n\\nAssistant: ...", arXiv 2204.05862) -> messages."""

from __future__ import annotations

import re
from typing import Any

from rlhf_cli.data.rows import Message, RowError

TURN = re.compile(r"\n\n(Human|Assistant):")
ROLES = {"Human": "user", "Assistant": "assistant"}


def looks_like_hh(value: Any) -> bool:
    """Whether a value starts as HH dialogues do."""
    return isinstance(value, str) and value.startswith("\n\nHuman:") and "\n\nAssistant:" in value


def parse_hh(text: str, source: str, name: str) -> tuple[Message, ...]:
    """Messages of one dialogue, blanks around their contents removed. Roles need not alternate (569 real rows hold 3
    with two assistant turns in a row) and a content may be empty (1 of them)."""
    pieces = TURN.split(text if text.startswith("\n\n") else "\n\n" + text.lstrip("\n"))
    if pieces[0].strip() or len(pieces) < 3:
        raise RowError(
            source,
            f"field {name!r} is no HH dialogue",
            f"it must start with '\\n\\nHuman:' or '\\n\\nAssistant:', got {text[:60]!r}",
        )
    return tuple(
        Message(ROLES[role], content.strip()) for role, content in zip(pieces[1::2], pieces[2::2], strict=True)
    )


def split_common_prompt(
    chosen: tuple[Message, ...], rejected: tuple[Message, ...]
) -> tuple[tuple[Message, ...], tuple[Message, ...], tuple[Message, ...]] | None:
    """(prompt, rest of chosen, rest of rejected): the longest common start after which both sides let the assistant
    speak; None if there is no such place. Equal dialogues differ, so to say, in their last reply."""
    prompt = None
    for i in range(min(len(chosen), len(rejected))):
        if chosen[i].role == rejected[i].role == "assistant":
            prompt = i
        if chosen[i] != rejected[i]:
            break
    if prompt is None:
        return None
    return chosen[:prompt], chosen[prompt:], rejected[prompt:]
