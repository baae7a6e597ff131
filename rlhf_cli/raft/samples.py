"""The responses of an iteration: written, scored and measured; what is on disk is not done again.

Shapes: N responses of an iteration, number i answers prompt i // samples_per_prompt of it; M of them are measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf_cli.align.collect import Answer, Collector, Judged, response_limits, rule_hits
from rlhf_cli.align.figures import Clock
from rlhf_cli.align.forward import Call, response_logprobs
from rlhf_cli.align.models import Models
from rlhf_cli.loop import heed_stop
from rlhf_cli.raft.record import Record, Row, Scored, response_of, response_row
from rlhf_cli.raft.state import RaftState
from rlhf_cli.rollout.sampler import Request, Response
from rlhf_cli.runtime.distributed import barrier, broadcast_object
from rlhf_cli.schema import RaftConfig

PART = 256  # responses that are scored between two looks at whether to stop, and then are on disk
OWN = "mean_logprob"  # the reward where there is no source


@dataclass
class Samples:
    """Of an iteration, the same on every rank. judged: of N; kl, ref_logprobs (N,) float64: sums over a response's
    tokens of log(policy / reference) and log reference at the temperature of the rollout, nan where not measured.
    num_written: tokens that this start of the run wrote, on all ranks; the others were on disk."""

    answers: list[Answer]
    judged: Judged
    kl: Tensor
    ref_logprobs: Tensor
    num_written: int

    @property
    def groups(self) -> Tensor:
        """(N,) int64: number of the prompt."""
        return torch.tensor([answer.group for answer in self.answers])


def make_samples(
    collector: Collector,
    config: RaftConfig,
    models: Models,
    record: Record,
    state: RaftState,
    clock: Clock,
) -> Samples:
    """The responses of iteration state.iteration, rewards and measures, without writing the trail.

    Raises StopAsked; what was written and scored by then is on disk.
    """
    run, settings = collector.run, config.raft
    iteration, cursor = state.iteration, state.cursor
    if run.ranks.is_main:
        record.begin(describe(config, state))
    barrier()
    prompts = [collector.prompts[collector.order(cursor + i)] for i in range(settings.num_prompts)]
    limits = response_limits(config.generation, settings.num_samples, (config.train.seed, iteration))
    group_size = settings.samples_per_prompt
    requests = {
        i: Request(prompts[i // group_size].token_ids, iteration << 32 | i, int(limits[i]))
        for i in range(settings.num_samples)
    }
    responses, num_written = _write(collector, config, record, requests)
    answers = [Answer(prompts[i // group_size], responses[i], i // group_size) for i in requests]
    clock.lap("generate")
    run.phase("scoring")
    judged = _judge(collector, config, record, answers) if config.reward.sources else None
    if judged is None:
        judged = _own_judgement(collector, models, answers)
    kl, ref_logprobs = _measure(collector, config, models, answers)
    return Samples(answers, judged, kl, ref_logprobs, num_written)


def describe(config: RaftConfig, state: RaftState) -> dict[str, Any]:
    """What the responses of an iteration answer to."""
    return {"num_samples": config.raft.num_samples, "cursor": state.cursor, "data": state.data_digest}


def unselected(config: RaftConfig) -> range:
    """Responses as the policy writes them: the first to each prompt, whatever its rank."""
    return range(0, config.raft.num_samples, config.raft.samples_per_prompt)


def to_rows(samples: Samples, figures: Sequence[Row]) -> list[Row]:
    """What `from_rows` needs, for people too. figures: further entries of each row."""
    judged, rows = samples.judged, []
    for i, (answer, more) in enumerate(zip(samples.answers, figures, strict=True)):
        kl, reference = samples.kl[i].item(), samples.ref_logprobs[i].item()
        measured = {"kl": kl, "ref_logprob": reference} if kl == kl else {"kl": None, "ref_logprob": None}
        rewards = {f"reward/{name}": values[i].item() for name, values in judged.by_source.items()}
        rows.append(
            {"sample": i, "prompt": answer.prompt.text, **response_row(answer.response)}
            | {"reward": judged.reward[i].item(), **rewards, **measured, **more}
        )
    return rows


def from_rows(collector: Collector, config: RaftConfig, rows: Sequence[Row], cursor: int) -> Samples:
    """The samples of an iteration that was finished before."""
    prompts = [collector.prompts[collector.order(cursor + i)] for i in range(config.raft.num_prompts)]
    group_size = config.raft.samples_per_prompt
    answers = [Answer(prompts[i // group_size], response_of(row), i // group_size) for i, row in enumerate(rows)]
    column = lambda name: torch.tensor(
        [float("nan") if row[name] is None else row[name] for row in rows], dtype=torch.float64
    )
    names = [name for name in rows[0] if name.startswith("reward/")]
    by_source = {name.removeprefix("reward/"): column(name) for name in names}
    hits = rule_hits(collector.rules, [answer.response for answer in answers])
    return Samples(answers, Judged(column("reward"), hits, by_source), column("kl"), column("ref_logprob"), 0)


def _write(
    collector: Collector, config: RaftConfig, record: Record, requests: dict[int, Request]
) -> tuple[dict[int, Response], int]:
    """(all responses, tokens that were written now)."""
    run = collector.run
    found = broadcast_object(record.written() if run.ranks.is_main else None)
    assert found is not None
    missing = {i: request for i, request in requests.items() if i not in found}
    if found:
        run.say(f"{len(found)} of {len(requests)} responses were written before")
    if not missing:
        return found, 0
    with record.writer(run.ranks.rank) as file:

        def keep(sample: int, response: Response) -> None:
            file.write(record.line(sample, response))

        written = collector.write(missing, config.generation, keep)
    return found | written, sum(len(response.token_ids) for response in written.values())


def _judge(collector: Collector, config: RaftConfig, record: Record, answers: Sequence[Answer]) -> Judged:
    """What the sources say, part by part, and the rules."""
    run = collector.run
    known = broadcast_object(record.scored() if run.ranks.is_main else None)
    assert known is not None
    for first in range(0, len(answers), PART):
        if first in known:
            continue
        judged = collector.judge(answers[first : first + PART])
        by_source = {name: values.tolist() for name, values in judged.by_source.items()}
        known[first] = Scored(first, judged.reward.tolist(), by_source)
        if run.ranks.is_main:
            record.add_scored(known[first])
        run.phase(f"scoring {min(first + PART, len(answers))}/{len(answers)}")
        heed_stop(run.process.watch)
    parts = [known[first] for first in sorted(known)]
    joined = lambda lists: torch.tensor([value for values in lists for value in values], dtype=torch.float64)
    by_name = {name: joined(part.by_source[name] for part in parts) for name in parts[0].by_source}
    hits = rule_hits(collector.rules, [answer.response for answer in answers])
    return Judged(joined(part.reward for part in parts), hits, by_name)


def _own_judgement(collector: Collector, models: Models, answers: Sequence[Answer]) -> Judged:
    """The mean log-probability of a response's tokens under the policy itself, at temperature 1, instead of a reward
    (Codex, arXiv 2107.03374, picks samples so)."""
    sums = _sums(collector, models.policy.forward, answers, temperature=1.0)
    mean = sums / torch.tensor([len(answer.response.token_ids) for answer in answers])
    hits = rule_hits(collector.rules, [answer.response for answer in answers])
    return Judged(mean, hits, {OWN: mean})


def _measure(
    collector: Collector, config: RaftConfig, models: Models, answers: Sequence[Answer]
) -> tuple[Tensor, Tensor]:
    """(kl, ref_logprobs), each (N,): of all responses if they are ranked by it, else of one to each of batch_size
    prompts, which is enough to watch it."""
    settings, watch = config.raft, collector.run.process.watch
    measured = range(len(answers)) if settings.kl_coef else unselected(config)[: settings.batch_size]
    chosen, temperature = [answers[i] for i in measured], config.generation.temperature
    logprobs = _sums(collector, models.policy.forward, chosen, temperature)
    heed_stop(watch)
    with models.reference() as call:
        reference = _sums(collector, call, chosen, temperature)
    heed_stop(watch)
    kl = torch.full((len(answers),), torch.nan, dtype=torch.float64)
    ref_logprobs = kl.clone()
    kl[list(measured)], ref_logprobs[list(measured)] = logprobs - reference, reference
    return kl, ref_logprobs


def _sums(collector: Collector, call: Call, answers: Sequence[Answer], temperature: float) -> Tensor:
    """(M,) float64: log-probability of each response."""
    prompts = [answer.prompt.token_ids for answer in answers]
    responses: list[np.ndarray] = [answer.response.token_ids for answer in answers]
    tokenizer, size = collector.models.text.tokenizer, collector.config.train.micro_batch_size
    logprobs = response_logprobs(
        call, prompts, responses, tokenizer.pad_token_id, size, collector.run.ranks, temperature=temperature
    )
    return logprobs.double().sum(1)
