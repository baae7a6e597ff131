"""What a source of rewards is, and what it is given to score."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, Protocol

from rlhf_cli.data.rows import Message, plain_prompt
from rlhf_cli.data.templates import Template
from rlhf_cli.errors import RunFailed

Progress = Callable[[int], None]  # so many more texts are scored; 0 = still at work


@dataclass(frozen=True)
class ScoredText:
    """One thing to score.

    prompt: the dialogue that the response answers, to be written in a model's own template; None = the response is raw
    text, which stands for itself or continues `lead`. columns: further columns of the row, for functions, references
    and scoring servers. source: where the row stands, for messages.

    token_ids: prompt and response, without an end, as the policy had and wrote them, in tokens of the tokenizer with
    this digest and of this template; a model with the same two reads them as they are instead of tokenising the text
    again, which may cut it elsewhere.
    """

    prompt: tuple[Message, ...] | None
    response: str
    columns: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""
    lead: str = ""
    token_ids: tuple[int, ...] | None = None
    tokenizer_digest: str = ""
    template: Template | None = None

    @property
    def asked(self) -> str:
        """The prompt as text without a template."""
        return self.lead if self.prompt is None else plain_prompt(self.prompt)


class Source(Protocol):
    """One source of rewards. name: unique among the sources; weight: its factor in the sum."""

    name: str
    weight: float

    @property
    def about(self) -> str:
        """What it is, in a few words for the user."""

    def score(self, texts: Sequence[ScoredText], progress: Progress) -> list[float]:
        """A finite number for each text, in their order. Raises RlhfError."""


def no_progress(scored: int) -> None:
    """For callers that show none."""


def columns_of(texts: Sequence[ScoredText]) -> dict[str, list[Any]]:
    """column -> its value for each text, None where a text has no such column."""
    names = dict.fromkeys(name for text in texts for name in text.columns)
    return {name: [text.columns.get(name) for text in texts] for name in names}


def describe(text: ScoredText, index: int) -> str:
    """How messages name one text: its number in the batch, the row, and how it starts."""
    where = f" ({text.source})" if text.source else ""
    start = text.asked or text.response
    return f"sample {index}{where}, which starts {start[:60]!r}"


def checked_rewards(values: Any, texts: Sequence[ScoredText], who: str) -> list[float]:
    """What came back from outside as one finite float per text, or RunFailed. who: names the source."""
    if hasattr(values, "tolist"):  # arrays and tensors
        values = values.tolist()
    if not isinstance(values, list | tuple):
        raise RunFailed(f"{who} must give a list of {len(texts)} numbers, got {type(values).__name__}: {values!r:.80}")
    if len(values) != len(texts):
        raise RunFailed(f"{who} must give one number per response: {len(texts)} responses, {len(values)} numbers")
    rewards = []
    for index, value in enumerate(values):
        value = value.item() if hasattr(value, "item") and getattr(value, "ndim", 1) == 0 else value
        try:
            number = float(value) if isinstance(value, Real) else math.nan
        except OverflowError:  # an integer beyond all floats
            number = math.inf
        if not math.isfinite(number):
            raise RunFailed(f"{who} gave {value!r:.60}, no finite number, for {describe(texts[index], index)}")
        rewards.append(number)
    return rewards
