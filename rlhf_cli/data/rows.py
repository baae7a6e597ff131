"""What a row is on its way from a file to tokens: raw columns first, then one of a few typed rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, NamedTuple

from rlhf_cli.errors import DataError

DOCUMENT = "document"  # Row.kind of a whole .txt file


class Row(NamedTuple):
    """values: column -> value; source: where it stands, e.g. "a.jsonl:17"; kind: the type that the file declares
    (LMFlow's "type", or DOCUMENT), or None."""

    values: dict[str, Any]
    source: str
    kind: str | None = None


class RowError(DataError):
    """One row that cannot be used. `reason` is the same words for all rows with that fault, so that it can be counted.

    Readers yield it in the row's place: whether it ends the run or is counted is data.on_bad_row, decided in one place.
    """

    def __init__(self, source: str, reason: str, detail: str = ""):
        self.source, self.reason = source, reason
        super().__init__(f"{source}: {reason}{': ' + detail if detail else ''}")


class Message(NamedTuple):
    """role: system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True)
class TextRow:
    """Plain text. document: a whole .txt file, which may be cut for the evaluation split."""

    text: str
    source: str = ""
    columns: Mapping[str, Any] = field(default_factory=dict)
    document: bool = False


@dataclass(frozen=True)
class DialogueRow:
    """A dialogue. num_context: so many leading messages are prompt only, also where the assistant speaks in them."""

    messages: tuple[Message, ...]
    source: str = ""
    columns: Mapping[str, Any] = field(default_factory=dict)
    num_context: int = 0


@dataclass(frozen=True)
class PairRow:
    """A better and a worse answer. With a prompt the sides are messages after it; without one they are raw text."""

    prompt: tuple[Message, ...] | None
    chosen: tuple[Message, ...] | str
    rejected: tuple[Message, ...] | str
    margin: float | None = None
    source: str = ""
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RankedRow:
    """K answers to one prompt. ranks: smaller is better, equal ranks are ties."""

    prompt: tuple[Message, ...]
    responses: tuple[str, ...]
    ranks: tuple[float, ...]
    source: str = ""
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LabelledRow:
    """A text with its class."""

    text: str
    label: str | int
    source: str = ""
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PromptRow:
    """A prompt without an answer: the last message is not the assistant's."""

    prompt: tuple[Message, ...]
    source: str = ""
    columns: Mapping[str, Any] = field(default_factory=dict)


TrainingRow = TextRow | DialogueRow
ParsedRow = TextRow | DialogueRow | PairRow | RankedRow | LabelledRow | PromptRow


def num_chars(row: TrainingRow) -> int:
    """Characters of a row's text or messages."""
    return len(row.text) if isinstance(row, TextRow) else sum(len(message.content) for message in row.messages)


def plain_prompt(prompt: Sequence[Message]) -> str:
    """A prompt as text without any template: its words alone if it is one message of the user, else with the roles.

    >>> plain_prompt((Message("user", "Hi"), Message("assistant", "Yes?"), Message("user", "Why?")))
    'User: Hi\\n\\nAssistant: Yes?\\n\\nUser: Why?'
    """
    if len(prompt) == 1 and prompt[0].role == "user":
        return prompt[0].content
    return "\n\n".join(f"{message.role.capitalize()}: {message.content}" for message in prompt)


def half_character(text: str) -> int | None:
    """Where a text holds half a surrogate pair, which JSON can hold and no tokenizer takes; None for valid Unicode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None


def check_unicode(row: TrainingRow) -> None:
    """Raise RowError for a row that cannot be tokenised."""
    for text in [row.text] if isinstance(row, TextRow) else [message.content for message in row.messages]:
        at = half_character(text)
        if at is not None:
            raise RowError(
                row.source,
                "half a character",
                f"{text[max(0, at - 20) : at + 20]!r} is no valid Unicode: it was cut inside a surrogate pair",
            )


def row_digest(row: TrainingRow) -> int:
    """64 bits of the row's canonical text: equal for equal text or dialogue, whatever file or format it came from."""
    if isinstance(row, TextRow):
        parts = ["text", row.text]
    else:
        parts = [part for message in row.messages for part in message]
    canonical = "".join(f"{len(part)}:{part}" for part in parts)  # lengths keep ("a", "bc") and ("ab", "c") apart
    return int.from_bytes(blake2b(canonical.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
