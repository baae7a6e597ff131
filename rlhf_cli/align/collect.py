"""Responses of a policy: written on all ranks, judged by reward sources and rules, known to every rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlhf_cli.align.models import Models
from rlhf_cli.data.prompts import Prompt
from rlhf_cli.errors import RlhfError, RunFailed
from rlhf_cli.loop import heed_stop
from rlhf_cli.reward.answers import Writer, scored_text
from rlhf_cli.reward.rules import RuleHits, Rules
from rlhf_cli.reward.source import ScoredText
from rlhf_cli.rollout.sampler import Request, Response, Stopped, generate
from rlhf_cli.run import Run
from rlhf_cli.runtime.distributed import gather_objects
from rlhf_cli.runtime.engine import gathered_for_generation
from rlhf_cli.schema import AlignedConfig, RolloutConfig

EVALUATION = 1 << 62  # samples of evaluations are numbered from here: the same noise at each of them


class CollectingFailed(RunFailed):
    """An iteration could not be drawn or judged; raised on all ranks, before anything has changed."""


class Answer(NamedTuple):
    """A prompt and what the policy wrote. group: number of the prompt among those of the iteration."""

    prompt: Prompt
    response: Response
    group: int


class Judged(NamedTuple):
    """Of N responses. reward (N,) float64: what the sources say, weighted, before rules; by_source: name -> (N,)."""

    reward: Tensor
    rules: RuleHits
    by_source: dict[str, Tensor]

    def with_rules(self, rewards: Tensor) -> Tensor:
        """(N,): a rule's score where there is one, else the reward."""
        return torch.where(torch.isnan(self.rules.score), rewards, self.rules.score)


@dataclass
class Collector:
    """Writes and judges responses. order: cursor -> number of a prompt; writer: how to read the policy's tokens."""

    config: AlignedConfig
    models: Models
    prompts: Sequence[Prompt]
    order: Callable[[int], int]
    rules: Rules
    writer: Writer
    run: Run

    def write(
        self,
        requests: dict[int, Request],
        sampling: RolloutConfig,
        ended: Callable[[int, Response], None] | None = None,
    ) -> dict[int, Response]:
        """The answers to all requests, on every rank; the ranks share the work by prompts. Raises StopAsked.

        ended: called with the key of a request and its response as soon as there is one, on the rank that wrote it.
        """
        ranks, watch = self.run.ranks, self.run.process.watch
        keys = list(requests)
        starts = [n > 0 and requests[i].prompt is not requests[keys[n - 1]].prompt for n, i in enumerate(keys)]
        groups = np.cumsum(starts)
        mine = [i for i, group in zip(keys, groups.tolist(), strict=True) if group % ranks.world_size == ranks.rank]
        done: list[Response] = []
        with gathered_for_generation(self.models.policy) as module:
            try:
                done = generate(
                    module, self.models.text.tokenizer, [requests[i] for i in mine], sampling,
                    self.models.text.template.stop, self.config.train.seed,
                    ended=self._progress(mine, ended), should_stop=lambda: bool(watch.requested),
                )  # fmt: skip
            except Stopped:
                mine = []
        heed_stop(watch)
        parts = gather_objects(list(zip(mine, done, strict=True)))
        found = dict(pair for part in parts for pair in part)
        return {i: found[i] for i in keys}

    def judge(self, answers: Sequence[Answer]) -> Judged:
        """What sources and rules say, the same on every rank; the ranks share the work. Raises CollectingFailed on all
        of them when a source fails on one."""
        texts = [self._scored_text(answer) for answer in answers]
        hits = rule_hits(self.rules, [answer.response for answer in answers])
        mine = range(self.run.ranks.rank, len(texts), self.run.ranks.world_size)
        part: tuple[list[int], list[float], dict[str, list[float]]] | str
        with self.models.scoring() as rewards:
            try:
                scores = rewards.score([texts[i] for i in mine])
                by_name = {name: values.tolist() for name, values in scores.by_source.items()}
                part = (list(mine), scores.total.tolist(), by_name)
            except RlhfError as error:
                part = str(error)
        parts = gather_objects(part)
        reward = torch.zeros(len(texts), dtype=torch.float64)
        by_source = {source.name: torch.zeros_like(reward) for source in rewards.sources}
        for found in parts:
            if isinstance(found, str):
                raise CollectingFailed(found)
            rows, total, sources = found
            reward[rows] = torch.tensor(total, dtype=torch.float64)
            for name, values in sources.items():
                by_source[name][rows] = torch.tensor(values, dtype=torch.float64)
        return Judged(reward, hits, by_source)

    def _scored_text(self, answer: Answer) -> ScoredText:
        """What reward sources see of an answer; its very tokens where the text does not end inside one."""
        response = answer.response
        exact = response.num_text_tokens is not None
        tokens = response.token_ids[: response.num_text_tokens] if exact else None
        return scored_text(answer.prompt, response.text, tokens, self.writer)

    def _progress(
        self, keys: list[int], ended: Callable[[int, Response], None] | None
    ) -> Callable[[int, Response], None]:
        """What to do when the response to keys[i] is there: pass it on, and show how many there are."""
        finished = 0

        def pass_on(number: int, response: Response) -> None:
            nonlocal finished
            finished += 1
            if ended is not None:
                ended(keys[number], response)
            self.run.phase(f"writing {finished}/{len(keys)}")

        return pass_on


def rule_hits(rules: Rules, responses: Sequence[Response]) -> RuleHits:
    """What rules say of N responses."""
    return rules.apply([r.text for r in responses], [text_length(r) for r in responses])


def response_limits(sampling: RolloutConfig, count: int, key: tuple[int, ...]) -> np.ndarray:
    """(count,) longest length of each response: fixed, or drawn from generation.length_sampler by `key`."""
    if sampling.length_sampler is None:
        return np.full(count, sampling.max_new_tokens)
    low, high = sampling.length_sampler
    return np.random.default_rng(np.random.SeedSequence(key)).integers(low, high, size=count, endpoint=True)


def evaluation_requests(prompts: Sequence[Prompt], sampling: RolloutConfig) -> dict[int, Request]:
    """One answer to each held-out prompt, with the same noise whenever it is asked for."""
    return {i: Request(prompt.token_ids, EVALUATION + i, sampling.max_new_tokens) for i, prompt in enumerate(prompts)}


def evaluation_sampling(config: AlignedConfig) -> RolloutConfig:
    """As the rollouts, at the temperature of evaluations."""
    temperature = config.eval.temperature
    return config.generation if temperature is None else replace(config.generation, temperature=temperature)


def text_length(response: Response) -> int:
    """Tokens without the end."""
    if response.num_text_tokens is not None:
        return response.num_text_tokens
    return len(response.token_ids) - 1
