"""The fields of one row under our names, each checked when it is taken."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rlhf_cli.data.rows import Message, Row, RowError

# Our name: what files call it, first match wins.
ALIASES: dict[str, tuple[str, ...]] = {
    "text": ("text", "sample"),
    "prompt": ("prompt", "instruction", "question", "input"),
    "response": ("response", "output", "answer", "completion"),
    "responses": ("responses", "answers", "completions", "outputs", "output"),
    "ranks": ("ranks", "rank"),
    "scores": ("scores", "score"),
    "chosen": ("chosen", "positive"),
    "rejected": ("rejected", "negative"),
    "margin": ("margin",),
    "label": ("label", "sentiment"),
    "messages": ("messages", "conversations", "conversation"),
    "system": ("system",),
}
BESIDE_A_LABEL = "sample"  # a text where a label stands beside it; elsewhere a column of that name may be anything
ROLES = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "system": "system",
}


def find_column(values: Mapping[str, Any], name: str) -> str | None:
    """The column that holds our field `name`, or None."""
    return next((column for column in ALIASES[name] if column in values), None)


def has_columns(values: Mapping[str, Any], name: str) -> bool:
    """Whether a first row has our field. One answer is a text or messages, several are a list with ranks or scores."""
    column = find_column(values, name)
    if column is None:
        return False
    value = values[column]
    if column == BESIDE_A_LABEL:
        others = ("prompt", "messages", "chosen", "responses")
        return find_column(values, "label") is not None and not any(find_column(values, other) for other in others)
    if name == "response":
        return not isinstance(value, list) or _are_messages(value)
    if name == "responses":
        scored = find_column(values, "ranks") or find_column(values, "scores")
        return isinstance(value, list) and (scored is not None or _are_scored(value))
    return True


class Fields:
    """Takes fields out of a row; every complaint names file, row, field and reason."""

    def __init__(self, row: Row):
        self.row = row
        self.source = row.source

    def __contains__(self, name: str) -> bool:
        column = find_column(self.row.values, name)
        return column is not None and self.row.values[column] is not None

    def value(self, name: str) -> Any:
        """The value of a field that must be there."""
        column = find_column(self.row.values, name)
        if column is None:
            raise RowError(self.source, f"field {name!r} is missing", f"its columns are {', '.join(self.row.values)}")
        value = self.row.values[column]
        if value is None:
            raise RowError(self.source, f"field {column!r} is null")
        return value

    def others(self, *names: str) -> dict[str, Any]:
        """The columns that none of these fields takes."""
        taken = {find_column(self.row.values, name) for name in names}
        return {column: value for column, value in self.row.values.items() if column not in taken}

    def is_text(self, name: str) -> bool:
        return isinstance(self.value(name), str)

    def text(self, name: str) -> str:
        value = self.value(name)
        if not isinstance(value, str):
            raise self._wrong(name, "no text", value)
        return value

    def label(self, name: str) -> str | int:
        value = self.value(name)
        if not isinstance(value, str | int):
            raise self._wrong(name, "neither text nor a whole number", value)
        return value

    def number(self, name: str) -> float:
        value = self.value(name)
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise self._wrong(name, "no number", value) from None
        if not math.isfinite(number):
            raise self._wrong(name, "no finite number", value)
        return number

    def system(self) -> tuple[Message, ...]:
        """The system text as a message, if there is one."""
        return (Message("system", self.text("system")),) if "system" in self and self.value("system") else ()

    def prompt(self) -> tuple[Message, ...]:
        """The prompt as messages: system text first; Alpaca's "input" column is added to its "instruction"."""
        value = self.value("prompt")
        if isinstance(value, list | dict):
            messages = self.messages("prompt")
        else:
            text = self.text("prompt")
            extra = self.row.values.get("input")
            if find_column(self.row.values, "prompt") == "instruction" and isinstance(extra, str) and extra:
                text = f"{text}\n\n{extra}"
            messages = (Message("user", text),)
        return self.system() + messages

    def answer(self, name: str) -> tuple[Message, ...]:
        """An answer as messages: text is one message of the assistant."""
        if self.is_text(name):
            return (Message("assistant", self.text(name)),)
        return self.messages(name)

    def messages(self, name: str) -> tuple[Message, ...]:
        """[{"role", "content"}, ...], ShareGPT's [{"from", "value"}, ...], LMFlow's {"system", "messages": [...]}."""
        value = self.value(name)
        system: tuple[Message, ...] = ()
        if isinstance(value, dict):
            if isinstance(value.get("system"), str) and value["system"]:
                system = (Message("system", value["system"]),)
            value = value.get("messages")
        if not isinstance(value, list) or not value:
            raise self._wrong(name, "no list of messages", value)
        return system + tuple(self._message(name, number, item) for number, item in enumerate(value, start=1))

    def ranking(self) -> tuple[tuple[str, ...], tuple[float, ...]]:
        """(answers, ranks with smaller = better) from ranks, or from scores with larger = better."""
        value = self.value("responses")
        if not isinstance(value, list) or len(value) < 2:
            raise self._wrong("responses", "no list of two or more answers", value)
        scores: tuple[float, ...] | None = None
        if _are_scored(value):
            scores, value = self._numbers("score", [v["score"] for v in value]), [v["text"] for v in value]
        if not all(isinstance(v, str) for v in value):
            raise self._wrong("responses", "not all text", value)
        if scores is None and "ranks" not in self:
            scores = self._numbers("scores", self.value("scores"))
        # rank = 1 + how many answers score higher, so that ties share a rank
        ranks = (
            self._numbers("ranks", self.value("ranks"))
            if scores is None
            else tuple(1.0 + sum(other > score for other in scores) for score in scores)
        )
        if len(ranks) != len(value):
            raise RowError(self.source, "answers and ranks differ in number", f"{len(value)} and {len(ranks)}")
        return tuple(value), ranks

    def _numbers(self, name: str, values: Any) -> tuple[float, ...]:
        ok = isinstance(values, list) and all(
            isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in values
        )
        if not ok:
            raise RowError(self.source, f"field {name!r} is no list of numbers", f"got {values!r:.60}")
        return tuple(float(v) for v in values)

    def _message(self, name: str, number: int, item: Any) -> Message:
        if not isinstance(item, dict):
            raise self._wrong(name, f"wrong at message {number} (no object)", item)
        role, content = item.get("role", item.get("from")), item.get("content", item.get("value"))
        if role not in ROLES:
            raise RowError(
                self.source,
                f"field {name!r} has an unknown role",
                f"message {number} is of {role!r}; allowed: {', '.join(ROLES)}",
            )
        if not isinstance(content, str):
            raise RowError(
                self.source, f"field {name!r} has a message without text", f"message {number}: {content!r:.60}"
            )
        return Message(ROLES[role], content)

    def _wrong(self, name: str, what: str, value: Any) -> RowError:
        column = find_column(self.row.values, name)
        return RowError(self.source, f"field {column!r} is {what}", f"got {value!r:.60}")


def _are_messages(value: list[Any]) -> bool:
    return bool(value) and all(isinstance(v, dict) and ("role" in v or "from" in v) for v in value)


def _are_scored(value: list[Any]) -> bool:
    return bool(value) and all(isinstance(v, dict) and {"text", "score"} <= set(v) for v in value)
