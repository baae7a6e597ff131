"""Rewards from Python, in a few lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rlhf_cli.data.fields import ROLES
from rlhf_cli.data.rows import Message
from rlhf_cli.errors import DataError
from rlhf_cli.reward.combine import Rewards, open_rewards
from rlhf_cli.reward.source import ScoredText
from rlhf_cli.schema import RewardConfig, build

Prompt = str | Sequence[Mapping[str, str]] | None


@dataclass
class Scorer:
    """An opened reward source."""

    rewards: Rewards

    def score(
        self,
        prompts: Sequence[Prompt] | None,
        responses: Sequence[str],
        columns: Mapping[str, Sequence[Any]] | None = None,
    ) -> list[float]:
        """One reward per response.

        prompts: each a text (one message of the user), a list of {"role", "content"}, or None (the response is raw
        text, without a template); None for all of them at once. columns: further columns for functions and references.
        """
        _check_texts(prompts, responses)
        count = len(responses)
        given = {"prompts": [None] * count if prompts is None else prompts, **(columns or {})}
        wrong = {name: len(values) for name, values in given.items() if len(values) != count}
        if wrong:
            raise DataError(f"{count} responses, but {', '.join(f'{n} {name}' for name, n in wrong.items())}")
        texts = [
            ScoredText(
                _messages(prompt, number), response, {name: values[number] for name, values in (columns or {}).items()}
            )
            for number, (prompt, response) in enumerate(zip(given["prompts"], responses, strict=True))
        ]
        return [float(value) for value in self.rewards.score(texts).total]


def open_reward(
    path: str | Path | None = None,
    *,
    normalize: bool = False,
    clip: float | None = None,
    batch_size: int = 16,
    device: str | torch.device | None = None,
    **options: Any,
) -> Scorer:
    """Open one source of rewards: a reward model by its path (run directory, local HF directory, hub id), or any other
    by the options of reward.sources (type, label, measure, function, url ...).

    >>> reward = open_reward("runs/rm")                                                  # doctest: +SKIP
    >>> reward.score(["What is a floor?"], ["The lower side of a room."])                # doctest: +SKIP
    [1.37]
    >>> open_reward("runs/mood", type="classifier", label="happy").score(None, ["Hey!"]) # doctest: +SKIP
    [-0.22]

    device: None = the GPU if there is one. Raises RlhfError when it cannot be opened.
    """
    source = {"path": None if path is None else str(path), **options}
    given = {"sources": [source], "normalize": normalize, "clip": clip, "batch_size": batch_size}
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return Scorer(open_rewards(build(RewardConfig, given), where))


def _check_texts(prompts: Any, responses: Any) -> None:
    """Raise DataError for what would be read as something else than was meant."""
    for name, given in (("prompts", prompts), ("responses", responses)):
        if isinstance(given, str):
            raise DataError(f"{name} is one text, where a list of texts belongs: [{given[:40]!r}]")
    for number, response in enumerate(responses):
        if not isinstance(response, str):
            raise DataError(f"responses[{number}] is no text: {response!r:.60}")


def _messages(prompt: Prompt, number: int) -> tuple[Message, ...] | None:
    if prompt is None:
        return None
    if isinstance(prompt, str):
        return (Message("user", prompt),)
    try:
        return tuple(Message(ROLES[message["role"]], message["content"]) for message in prompt)
    except (TypeError, KeyError) as error:
        raise DataError(
            f'prompts[{number}] is neither text nor a list of {{"role": ..., "content": ...}} with the roles'
            f" {', '.join(ROLES)}: {prompt!r:.60}"
        ) from error
