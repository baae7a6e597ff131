"""What scores a response."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from rlhf_cli.errors import Problem
from rlhf_cli.schema.data import TemplateName
from rlhf_cli.schema.fields import opt


@dataclass
class RewardSourceConfig:
    """One source of rewards."""

    type: Literal["model", "classifier", "function", "rouge", "http"] = opt(
        "model",
        "model: a reward model (run directory, local HF directory, hub id); classifier: one label of a classifier;"
        " function: Python; rouge: overlap with a reference column; http: a scoring server",
    )
    path: str | None = opt(None, "model, classifier: where it is; function: the .py file (null = function is dotted)")
    revision: str | None = opt(None, "model, classifier: branch, tag or commit of a hub id")
    name: str | None = opt(None, "under which it is logged; null = its type, numbered if there are several")
    weight: float = opt(1.0, "factor in the sum of all sources")
    label: str | int | None = opt(
        None, "classifier (or model with several labels): the wanted label, by name or number"
    )
    measure: Literal["log_prob", "probability", "margin"] = opt(
        "log_prob", "what of the label: its log-probability, its probability, or its logit minus the best other one"
    )
    sees: Literal["dialogue", "response"] = opt("dialogue", "prompt and response, or the response alone")
    template: TemplateName = opt("auto", "model, classifier: how a dialogue becomes text; as data.template")
    max_length: int = opt(2048, "model, classifier: longest input in tokens; a longer one loses its start", ge=2)
    dtype: Literal["auto", "bf16", "fp32", "fp16"] = opt("auto", "model, classifier: precision; as model.dtype")
    trust_remote_code: bool = opt(False, "model, classifier: run Python code that comes with it")
    function: str | None = opt(None, "function: f(prompts, responses, **columns) -> list of numbers, by (dotted) name")
    reference: str = opt("reference", "rouge: the column with the reference text")
    rouge: Literal["rouge1", "rouge2", "rougeL"] = opt("rougeL", "rouge: which F-measure")
    url: str | None = opt(None, "http: POSTed {prompts, responses, columns}, must answer {rewards: [...]}")
    timeout: float = opt(30.0, "http: seconds to wait for an answer", gt=0)
    retries: int = opt(4, "http: further tries after a failure that may pass, each after twice the time", ge=0)

    # option: the types that read it. Setting it on another type would be ignored, so it is refused.
    BELONGS = {
        "path": ("model", "classifier", "function"),
        "revision": ("model", "classifier"),
        "label": ("model", "classifier"),
        "measure": ("model", "classifier"),
        "max_length": ("model", "classifier"),
        "dtype": ("model", "classifier"),
        "trust_remote_code": ("model", "classifier"),
        "sees": ("model", "classifier"),
        "template": ("model", "classifier"),
        "function": ("function",),
        "reference": ("rouge",),
        "rouge": ("rouge",),
        "url": ("http",),
        "timeout": ("http",),
        "retries": ("http",),
    }  # fmt: skip

    def check(self) -> Iterator[Problem]:
        default = RewardSourceConfig()
        for option, types in self.BELONGS.items():
            if self.type not in types and getattr(self, option) != getattr(default, option):
                yield Problem(option, f"is not read by type {self.type}; it belongs to {' and '.join(types)}")
        if self.type in ("model", "classifier") and not self.path:
            yield Problem("path", f"is required by type {self.type}: a run directory, local HF directory or hub id")
        if self.type == "classifier" and self.label is None:
            yield Problem("label", "is required by type classifier: the wanted label, by name or number")
        if self.type == "function" and not self.function:
            yield Problem("function", "is required by type function: a name in the file at path, or a dotted name")
        elif self.type == "function" and not self.path and "." not in str(self.function):
            yield Problem(
                "function",
                f"{self.function!r} is no dotted name; set path to its file, or write module.{self.function}",
            )
        if self.type == "http" and not self.url:
            yield Problem("url", "is required by type http, e.g. http://localhost:8000/score")


@dataclass
class RuleConfig:
    """A rule that a response should not hit. One of pattern, repeat and min_tokens says what is looked for."""

    pattern: str | None = opt(None, "regular expression searched in the response, e.g. '#' or a list of emoticons")
    repeat: int | None = opt(
        None, "a piece of text or emoticon that stands so many times in a row (or `ngram` words, anywhere)", ge=2
    )
    ngram: int | None = opt(None, "repeat: so many words that occur `repeat` times, in a row or not", ge=1)
    min_tokens: int | None = opt(None, "a response with fewer tokens, its end not counted", ge=1)
    name: str | None = opt(None, "under which hits are logged; null = what it looks for")
    action: Literal["score", "discard"] = opt(
        "score", "score: the reward is `score` instead; discard: the response is not used, and another one is drawn"
    )
    score: float = opt(-1.0, "reward of a response that hits the rule; of several hits the lowest counts")

    def check(self) -> Iterator[Problem]:
        named = [n for n in ("pattern", "repeat", "min_tokens") if getattr(self, n) is not None]
        if len(named) != 1:
            yield Problem("pattern", f"name one of pattern, repeat, min_tokens; got {' and '.join(named) or 'none'}")
        if self.ngram is not None and self.repeat is None:
            yield Problem("ngram", "belongs to repeat, e.g. {repeat: 4, ngram: 3}")
        if self.pattern is not None:
            try:
                re.compile(self.pattern)
            except re.error as error:
                yield Problem("pattern", f"{self.pattern!r} is no regular expression: {error}")


@dataclass
class RewardConfig:
    """What scores a response."""

    sources: list[RewardSourceConfig] = opt([], "what scores; the reward is the weighted sum")
    normalize: bool = opt(
        False, "bring each reward model's score to mean 0 and std 1, with the moments in its manifest"
    )
    clip: float | None = opt(None, "rewards are kept within -clip and clip, after normalisation", gt=0)
    batch_size: int = opt(16, "sequences per forward pass of a reward model", ge=1)

    def check(self) -> Iterator[Problem]:
        if not self.sources:
            yield Problem("sources", "is required, e.g. reward.sources=[{type: model, path: runs/rm}]")
        names = [source.name for source in self.sources if source.name]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            yield Problem("sources", f"has a name twice: {', '.join(twice)}")


@dataclass
class PolicyRewardConfig(RewardConfig):
    """What scores the responses of a policy that is being trained."""

    moments: Literal["manifest", "running"] = opt(
        "manifest",
        "normalize: mean and std that `rlhf rm` stored with each reward model; or, of the sum of all sources, those of"
        " all responses so far",
    )
    rules: list[RuleConfig] = opt([], "what a response should not do, e.g. {pattern: '#', score: -1}")

    def check(self) -> Iterator[Problem]:
        yield from super().check()
        if self.moments == "running" and not self.normalize:
            yield Problem("moments", "running is read with reward.normalize=true only; set it")

    @property
    def discarding(self) -> list[str]:
        """Rules by which a response is drawn again, so that what is kept follows another distribution."""
        return [f"reward.rules[{i}]" for i, rule in enumerate(self.rules) if rule.action == "discard"]
