"""Rewards from the overlap of a response with a reference text (ROUGE, Lin 2004, aclanthology.org/W04-1013)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_cli.errors import DataError
from rlhf_cli.reward.source import Progress, ScoredText, describe
from rlhf_cli.schema import RewardSourceConfig


@dataclass
class RougeSource:
    """F-measure between 0 and 1, words lower-cased and not stemmed, as Google's package computes it."""

    name: str
    weight: float
    about: str
    column: str
    kind: str
    scorer: Any

    def score(self, texts: Sequence[ScoredText], progress: Progress) -> list[float]:
        """Raises DataError for a text without a reference, or with one in which ROUGE sees no word."""
        scores = []
        for index, text in enumerate(texts):
            reference = self._reference(text, index)
            scores.append(float(self.scorer.score(reference, text.response)[self.kind].fmeasure))
        progress(len(texts))
        return scores

    def _reference(self, text: ScoredText, index: int) -> str:
        reference = text.columns.get(self.column)
        if not isinstance(reference, str):
            found = (
                f"the column holds {reference!r:.60}"
                if self.column in text.columns
                else f"the further columns are {', '.join(text.columns) or '(none)'}"
            )
            raise DataError(
                f"reward source {self.name!r} needs the text of a reference in the column {self.column!r} for"
                f" {describe(text, index)}; {found}. Name the column with the source's `reference`"
            )
        # The package reads a-z and 0-9 only: with another script every response would score 0.
        if reference.strip() and not any(c.isascii() and c.isalnum() for c in reference):
            raise DataError(
                f"reward source {self.name!r}: ROUGE sees no word (a-z, 0-9) in the reference of"
                f" {describe(text, index)}: {reference[:40]!r}"
            )
        return reference


def open_rouge(config: RewardSourceConfig, name: str) -> RougeSource:
    """The package is imported here, since few runs need it."""
    from rouge_score.rouge_scorer import RougeScorer

    about = f"{config.rouge} of the column {config.reference}"
    scorer = RougeScorer([config.rouge], use_stemmer=False)
    return RougeSource(name, config.weight, about, config.reference, config.rouge, scorer)
