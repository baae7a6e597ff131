"""Texts that the model writes: samples of supervised stages, rollouts of ppo and raft."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rlhf_cli.errors import Problem
from rlhf_cli.schema.fields import opt


@dataclass
class SamplingConfig:
    """How a text is drawn, and where it ends."""

    max_new_tokens: int = opt(128, "longest text", ge=1)
    temperature: float = opt(1.0, "0 = always the likeliest token", ge=0)
    top_k: int = opt(0, "only the k likeliest tokens; 0 = all", ge=0)
    top_p: float = opt(1.0, "only the likeliest tokens with this share of probability", gt=0, le=1)
    stop: list[str] = opt([], "strings that end a text, beside the template's own")
    batch_size: int = opt(64, "texts written at the same time by one rank", ge=1)

    def check(self) -> Iterator[Problem]:
        if "" in self.stop:
            yield Problem("stop", "has an empty string, which stands everywhere; take it out")


@dataclass
class GenerationConfig(SamplingConfig):
    """Sample texts written at each evaluation."""

    prompts: list[str] = opt([], "fixed prompts; empty = the first ones of the evaluation data")
    num_prompts: int = opt(4, "how many to take from the evaluation data; 0 = write no samples", ge=0)


@dataclass
class RolloutConfig(SamplingConfig):
    """Responses that are scored and learnt from."""

    min_new_tokens: int = opt(0, "no end before so many tokens; then KL is no longer estimated without bias", ge=0)
    length_sampler: list[int] | None = opt(
        None, "[min, max]: the longest length of each response is drawn uniformly from it; null = max_new_tokens", ge=1
    )
    refill: bool = opt(
        True, "start further prompts as texts end, instead of letting the batch shrink; takes half as much cache again"
    )

    def check(self) -> Iterator[Problem]:
        yield from super().check()
        sampler = self.length_sampler
        if sampler is not None and (len(sampler) != 2 or sampler[0] > sampler[1]):
            yield Problem("length_sampler", f"got {sampler}; allowed: [min, max] with min <= max")
        elif sampler is not None and sampler[1] > self.max_new_tokens:
            yield Problem(
                "length_sampler", f"goes up to {sampler[1]}, generation.max_new_tokens is {self.max_new_tokens}"
            )
        shortest = min(sampler) if sampler else self.max_new_tokens
        if self.min_new_tokens > shortest:
            yield Problem("min_new_tokens", f"{self.min_new_tokens} is more than the shortest limit, {shortest}")

    @property
    def filters(self) -> list[str]:
        """Options that make the sampler another distribution than softmax(logits / temperature)."""
        changed = {"top_k": self.top_k > 0, "top_p": self.top_p < 1, "min_new_tokens": self.min_new_tokens > 0}
        return [f"generation.{name}" for name, is_set in changed.items() if is_set]
