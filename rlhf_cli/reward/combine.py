"""All reward sources of a config as one: opened, normalised, weighted, summed, clipped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_cli.reward.function import open_function
from rlhf_cli.reward.http import open_http
from rlhf_cli.reward.model import ModelSource
from rlhf_cli.reward.open_model import Load, check_model, open_model
from rlhf_cli.reward.rouge import open_rouge
from rlhf_cli.reward.source import Progress, ScoredText, Source, no_progress
from rlhf_cli.schema import PolicyRewardConfig, RewardConfig, RewardSourceConfig


class Scores(NamedTuple):
    """total (N,) float64: the reward; by_source: name -> (N,) float64, normalised, before weight and clipping."""

    total: Tensor
    by_source: dict[str, Tensor]


@dataclass
class Rewards:
    """The opened sources. clip: largest absolute reward, or None."""

    sources: list[Source]
    clip: float | None

    def score(self, texts: Sequence[ScoredText], progress: Progress = no_progress) -> Scores:
        """Rewards of all texts, in their order. progress: called with the number of texts that a source has scored, so
        with len(texts) x len(sources) in all."""
        by_source = {s.name: torch.tensor(s.score(texts, progress), dtype=torch.float64) for s in self.sources}
        total = torch.zeros(len(texts), dtype=torch.float64)
        for source in self.sources:
            total += source.weight * by_source[source.name]
        return Scores(total if self.clip is None else total.clamp(-self.clip, self.clip), by_source)

    @property
    def about(self) -> dict[str, str]:
        """reward NAME -> what it is."""
        return dict(_line(source.name, source.about, source.weight) for source in self.sources)

    @property
    def cut(self) -> int:
        """Texts that were too long for a model and lost their start, so far."""
        return sum(source.cut for source in self.sources if isinstance(source, ModelSource))


def open_rewards(config: RewardConfig, device: torch.device, load: Load | None = None) -> Rewards:
    """Open every source of a config, models on `device`. load: see open_model. Raises RlhfError for one that cannot
    be.

    With running moments the sum is left as it is, to be normalised and then clipped by whoever keeps them.
    """
    sources = [_open(*named, config, device, load) for named in _named_sources(config)]
    return Rewards(sources, None if has_running_moments(config) else config.clip)


def has_running_moments(config: RewardConfig) -> bool:
    """Whether the sum of all sources is normalised by what it was so far (RunningMoments)."""
    return config.normalize and isinstance(config, PolicyRewardConfig) and config.moments == "running"


def _normalizes_sources(config: RewardConfig) -> bool:
    """Whether each model's score is normalised by the moments stored with it."""
    return config.normalize and not has_running_moments(config)


def describe_rewards(config: RewardConfig) -> dict[str, str]:
    """As Rewards.about: each source is found and checked as open_rewards does, but no weights are loaded."""
    cpu = torch.device("cpu")
    return dict(
        _line(name, check_model(source, key, _normalizes_sources(config)).about, source.weight)
        if source.type in ("model", "classifier")
        else _line(name, _open(source, name, key, config, cpu).about, source.weight)
        for source, name, key in _named_sources(config)
    )


def _line(name: str, about: str, weight: float) -> tuple[str, str]:
    return f"reward {name}", about + ("" if weight == 1 else f", weight {weight:g}")


def _named_sources(config: RewardConfig) -> list[tuple[RewardSourceConfig, str, str]]:
    """(source, its name, its place in the config)."""
    names = source_names(config.sources)
    return [(source, names[number], f"reward.sources[{number}]") for number, source in enumerate(config.sources)]


def source_names(sources: Sequence[RewardSourceConfig]) -> list[str]:
    """The given names, else the types; a name that is taken gets a number (model, model_2 ...)."""
    taken = {source.name for source in sources if source.name}
    names, seen = [], Counter[str]()
    for source in sources:
        name = source.name
        while name is None:
            seen[source.type] += 1
            candidate = source.type if seen[source.type] == 1 else f"{source.type}_{seen[source.type]}"
            name = candidate if candidate not in taken else None
        names.append(name)
    return names


def _open(
    source: RewardSourceConfig,
    name: str,
    key: str,
    config: RewardConfig,
    device: torch.device,
    load: Load | None = None,
) -> Source:
    match source.type:
        case "model" | "classifier":
            return open_model(source, name, key, device, config.batch_size, _normalizes_sources(config), load)
        case "function":
            return open_function(source, name, key)
        case "rouge":
            return open_rouge(source, name)
        case "http":
            return open_http(source, name, key, config.batch_size)
