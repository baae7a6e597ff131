"""RAFT: how responses are ranked and learnt from, rhythm."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from rlhf_cli.errors import Problem
from rlhf_cli.schema.fields import opt, unread
from rlhf_cli.schema.reward import PolicyRewardConfig, RuleConfig
from rlhf_cli.schema.rl import AlignmentConfig, EvalConfig, RlTrainConfig

WHOLE = 1e-5  # so far, relatively, may 1 / top_fraction be from a whole number: 0.142857 is meant as 1/7


@dataclass
class RankingConfig(AlignmentConfig):
    """Reward-ranked fine-tuning (arXiv 2304.06767): write K responses, learn from the best of them, repeat."""

    num_iterations: int = opt(20, "rounds of writing, ranking and fine-tuning", ge=1)
    batch_size: int = opt(256, "responses selected in an iteration, over all ranks", ge=1)
    top_fraction: float = opt(
        0.125, "share of the responses that is selected; K = 1 / top_fraction must be a whole number", gt=0, le=1
    )
    strategy: Literal["local", "top"] = opt(
        "local",
        "local: K responses to each of batch_size prompts, the best to each; top: one response to each of"
        " K x batch_size prompts, the best batch_size of all",
    )
    kl_coef: float = opt(0.0, "rank by reward - kl_coef x log(policy / reference) of the response", ge=0)
    soft_temperature: float | None = opt(
        None,
        "learn from all responses, each weighted by softmax(reward / soft_temperature), within its prompt (local) or"
        " among all (top); null = from the selected ones alike",
        gt=0,
    )
    epochs: int = opt(1, "passes over the selected responses", ge=1)
    optimizer: Literal["fresh", "continue"] = opt(
        "fresh", "in each iteration: a new optimizer and schedule, or those of the iteration before, going on"
    )
    train_eos: Literal["ended", "always"] = opt(
        "ended", "responses that are trained with an EOS: those that came to an end, or also those cut by their limit"
    )
    result: Literal["best", "last"] = opt(
        "best", "which policy is the run's model: best by reward on held-out prompts, or last; the other is kept beside"
    )
    keep_models: bool = opt(False, "keep the model of every iteration in models/")

    def check(self) -> Iterator[Problem]:
        exact = 1 / self.top_fraction
        if abs(exact - round(exact)) > WHOLE * exact:
            below = int(exact)
            yield Problem(
                "top_fraction",
                f"1 / {self.top_fraction:g} = {exact:.7g} responses are no whole number; allowed: 1/K, e.g."
                f" {1 / below:.10g} (K = {below}) or {1 / (below + 1):.10g} (K = {below + 1})",
            )

    @property
    def num_candidates(self) -> int:
        """K: responses written for each one that is selected."""
        return round(1 / self.top_fraction)

    @property
    def samples_per_prompt(self) -> int:
        """Responses to each prompt."""
        return self.num_candidates if self.strategy == "local" else 1

    @property
    def num_prompts(self) -> int:
        """Prompts of an iteration."""
        return self.batch_size if self.strategy == "local" else self.batch_size * self.num_candidates

    @property
    def num_samples(self) -> int:
        """Responses that are written in an iteration."""
        return self.batch_size * self.num_candidates

    @property
    def rows_per_iteration(self) -> int:
        """Responses that are learnt from in an iteration, if none is discarded."""
        return self.batch_size if self.soft_temperature is None else self.num_samples


@dataclass
class DiscardRuleConfig(RuleConfig):
    """A rule that a response should not hit. One of pattern, repeat and min_tokens says what is looked for."""

    action: Literal["score", "discard"] = opt(
        "discard", "discard: the response is not learnt from; score: the reward is `score` instead"
    )

    def check(self) -> Iterator[Problem]:
        yield from super().check()
        if self.action == "discard":
            yield from unread(self, ("score",), "action: score")


@dataclass
class RankingRewardConfig(PolicyRewardConfig):
    """What responses are ranked by."""

    rules: list[DiscardRuleConfig] = opt(  # type: ignore[assignment]  # nobody appends another kind of rule
        [], "what a response should not do, e.g. {pattern: '#'}"
    )

    def check(self) -> Iterator[Problem]:
        if self.sources:
            yield from super().check()
            if self.moments == "running":
                yield Problem("moments", "running moments change no ranking; leave it at manifest")
            if all(source.weight == 0 for source in self.sources):
                yield Problem("sources", "have the weight 0, all of them, so no response is better; give one a weight")
        else:
            yield from unread(self, ("normalize", "clip", "moments", "batch_size"), "reward.sources")


@dataclass
class RaftTrainConfig(RlTrainConfig):
    """The fine-tuning of an iteration, and the rhythm of the iterations."""

    global_batch_size: int = opt(64, "responses per optimizer step, over all ranks", ge=1)
    eval_every: int = opt(1, "iterations between evaluations; 0 = at the start and at the end", ge=0)
    save_every: int = opt(1, "iterations between checkpoints; 0 = only when the run is interrupted", ge=0)


@dataclass
class RaftEvalConfig(EvalConfig):
    """What is measured beside the reward of the rollouts."""

    temperature: float | None = opt(0.3, "of the answers to held-out prompts; null = generation.temperature", ge=0)
