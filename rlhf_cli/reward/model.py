"""Rewards from a sequence classifier: a reward model of `rlhf rm`, or any other that transformers can load.

Shapes: N texts of a batch, T positions, C scores of each (1, or one per label).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_cli.data.rows import half_character
from rlhf_cli.errors import DataError, RunFailed
from rlhf_cli.reward.inputs import Inputs
from rlhf_cli.reward.source import Progress, ScoredText, describe

Encode = Callable[[Sequence[ScoredText]], Inputs]

log = logging.getLogger(__name__)


class Moments(NamedTuple):
    """Of the scores on reference responses."""

    mean: float
    std: float


@dataclass
class ModelSource:
    """A model that scores. encode: texts -> tokens; forward: a padded batch -> logits (N, C); read: logits -> (N,).

    pad_id: None = sequences of one batch must have the same length. cut: texts so far that lost their start.
    """

    name: str
    weight: float
    about: str
    encode: Encode
    forward: Callable[[Batch], Tensor]
    read: Callable[[Tensor], Tensor]
    moments: Moments | None
    pad_id: int | None
    max_length: int
    batch_size: int
    device: torch.device
    cut: int = 0

    @torch.no_grad()
    def score(self, texts: Sequence[ScoredText], progress: Progress) -> list[float]:
        """In batches of texts of like length; the score of a text does not depend on what it is padded with."""
        for index, text in enumerate(texts):
            for content in (text.response, text.lead, *(message.content for message in text.prompt or ())):
                if half_character(content) is not None:
                    raise DataError(
                        f"reward source {self.name!r}: half a character (a cut surrogate pair, no valid Unicode) in"
                        f" {describe(text, index)}; correct the row or take it out"
                    )
        inputs = self.encode(texts)
        self._count_cut(inputs.cut)
        scores = [0.0] * len(texts)
        for rows in length_batches([len(ids) for ids in inputs.token_ids], self.batch_size, self.pad_id is None):
            logits = self.forward(pad(inputs, rows, self.pad_id or 0, self.device))
            values = self.read(logits.float())
            if not torch.isfinite(values).all():
                first = rows[int((~torch.isfinite(values)).nonzero()[0])]
                raise RunFailed(
                    f"reward source {self.name!r} gave a score that is no number for {describe(texts[first], first)};"
                    " use dtype: fp32, or look at the model"
                )
            for row, value in zip(rows, values.tolist(), strict=True):
                scores[row] = value
            progress(len(rows))
        if self.moments is not None:
            scores = [(score - self.moments.mean) / self.moments.std for score in scores]
        return scores

    def _count_cut(self, cut: int) -> None:
        if cut and not self.cut:
            log.warning(
                "reward source %r: a text is longer than %d tokens and loses its start (max_length, or the model's own"
                " limit); further ones are counted",
                self.name, self.max_length,
            )  # fmt: skip
        self.cut += cut


class Batch(NamedTuple):
    """Right-padded. input_ids, position_ids (N, T) int64; keep_mask (N, T) bool, True = a token of the text;
    last (N,) int64, index of the last such token; type_ids (N, T) or None."""

    input_ids: Tensor
    position_ids: Tensor
    keep_mask: Tensor
    last: Tensor
    type_ids: Tensor | None


def length_batches(lengths: Sequence[int], batch_size: int, same_length: bool) -> list[list[int]]:
    """Numbers of the sequences of each batch: neighbours in length, the longest first, so that memory runs out early
    or never. same_length: only sequences of one length together."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    batches: list[list[int]] = []
    for i in order:
        full = not batches or len(batches[-1]) == batch_size
        if full or (same_length and lengths[batches[-1][-1]] != lengths[i]):
            batches.append([])
        batches[-1].append(i)
    return batches


def pad(inputs: Inputs, rows: Sequence[int], pad_id: int, device: torch.device) -> Batch:
    """The batch of these rows."""
    lengths = torch.tensor([len(inputs.token_ids[row]) for row in rows])
    width = int(lengths.max())
    positions = torch.arange(width).expand(len(rows), -1)
    fill = lambda lists, value: torch.tensor([lists[row] + [value] * (width - len(lists[row])) for row in rows])
    return Batch(
        fill(inputs.token_ids, pad_id).to(device),
        positions.to(device),
        (positions < lengths[:, None]).to(device),
        (lengths - 1).to(device),
        None if inputs.type_ids is None else fill(inputs.type_ids, 0).to(device),
    )


def forward_at_last(model: Any) -> Callable[[Batch], Tensor]:
    """The call of models.reward.enable_scores: no mask, since causal attention never looks at padding behind."""
    return lambda batch: model(input_ids=batch.input_ids, position_ids=batch.position_ids, last=batch.last)


def forward_with_mask(model: Any) -> Callable[[Batch], Tensor]:
    """The model's own forward, for encoders and others."""

    def forward(batch: Batch) -> Tensor:
        types = {} if batch.type_ids is None else {"token_type_ids": batch.type_ids}
        logits: Tensor = model(input_ids=batch.input_ids, attention_mask=batch.keep_mask.long(), **types).logits
        return logits

    return forward
