"""One iteration of PPO: write, judge, measure, estimate advantages, update. The state changes only when all is done."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from rlhf_cli.loop import heed_stop
from rlhf_cli.ops import advantages as estimators
from rlhf_cli.ops.kl import next_kl_coef
from rlhf_cli.ppo.alarms import watch
from rlhf_cli.ppo.batch import Experience
from rlhf_cli.ppo.collect import Answer, Collector, Draw, Judged
from rlhf_cli.ppo.figures import negative_kl, objective_figures, text_figures
from rlhf_cli.ppo.forward import response_logprobs, response_values
from rlhf_cli.ppo.ptx import PtxTerm
from rlhf_cli.ppo.state import PpoState
from rlhf_cli.ppo.update import update
from rlhf_cli.reward.moments import RunningMoments
from rlhf_cli.runtime.peak_memory import peak_memory_gb


@dataclass
class Done:
    """An iteration. line: its figures; the rest is what was learnt from."""

    line: dict[str, Any]
    answers: list[Answer]
    judged: Judged
    experience: Experience
    warning: str | None


def iterate(collector: Collector, state: PpoState, ptx: PtxTerm | None, flops: Callable[[int, int], float]) -> Done:
    """Iteration number state.iteration. Raises StopAsked before anything has changed, never after.

    flops: (tokens written, tokens trained on, over all ranks) -> share of the ranks' peak work, times seconds.
    """
    config, run, models = collector.config, collector.run, collector.models
    clock = _Clock()
    drawn = collector.draw(state.iteration, state.cursor)
    clock.lap("generate")
    _phase(collector, "scoring")
    judged = collector.judge(drawn.answers)
    moments, scores = _scores(collector, drawn, judged, state)
    experience = _measure(collector, drawn, scores)
    heed_stop(run.process.watch)  # from here on the iteration is finished
    clock.lap("score")
    settings = config.ppo
    rewards = estimators.token_rewards(
        experience.scores, experience.logprobs, experience.ref_logprobs, experience.keep_mask, state.kl_coef,
        settings.kl_estimator,
    )  # fmt: skip
    advantages, returns = estimators.estimate(
        rewards, experience.values, experience.keep_mask, experience.groups, settings
    )
    _phase(collector, "updating")
    stats = update(
        models.policy, models.critic, experience, advantages, returns, config, state.iteration, run.ranks,
        models.text.tokenizer.pad_token_id, ptx, models.after_step,
    )  # fmt: skip
    clock.lap("train")

    figures = objective_figures(experience, judged, state.kl_coef, rewards)
    figures |= text_figures([a.response for a in drawn.answers], models.text.tokenizer, models.vocab_size)
    figures |= {f"rules/{name}_redrawn": float(count) for name, count in drawn.redrawn.items()}
    written = int(experience.keep_mask.sum())
    in_all = written + sum(len(p) for p in experience.prompts)
    _advance(state, drawn, experience, stats.steps, moments, figures, clock.total, collector)
    line = {
        "step": state.iteration, "episode": state.episodes, "optimizer_steps": state.steps, **figures, **stats.figures,
        "target_kl_stopped": float(stats.stopped),
        "epoch": round(state.cursor / len(collector.prompts), 6), "tokens": state.tokens, "num_tokens": state.tokens,
        "samples": state.episodes, "seconds": round(state.seconds, 3),
        **clock.figures(len(drawn.answers), written, flops(written, in_all)),
        "perf/peak_memory_gb": peak_memory_gb(run.ranks.device),
    }  # fmt: skip
    return Done(line, drawn.answers, judged, experience, negative_kl(experience))


def _scores(
    collector: Collector, drawn: Draw, judged: Judged, state: PpoState
) -> tuple[RunningMoments | None, torch.Tensor]:
    """(moments with this iteration in them, scores (R,) float64 that the policy learns from).

    Rewards are normalised and clipped, then responses without an end are marked down; a rule's score is final.
    """
    reward, moments = judged.reward, None
    settings = collector.config.reward
    if settings.moments == "running":
        moments = RunningMoments.from_dict(state.moments) if state.moments else RunningMoments()
        moments.update(reward)
        reward = moments.normalise(reward)
        if settings.clip is not None:
            reward = reward.clamp(-settings.clip, settings.clip)
    scores = reward.clone()
    for i, answer in enumerate(drawn.answers):
        if answer.response.ending == "length":
            scores[i] = collector.config.ppo.scored_ending(reward[i].item())
    return moments, judged.with_rules(scores)


def _measure(collector: Collector, drawn: Draw, scores: torch.Tensor) -> Experience:
    """Log-probabilities of policy and reference, and values, of all responses: the state before the update."""
    config, run, models = collector.config, collector.run, collector.models
    prompts = [answer.prompt.token_ids for answer in drawn.answers]
    responses = [answer.response.token_ids for answer in drawn.answers]
    shared = (
        prompts, responses, models.text.tokenizer.pad_token_id, config.train.micro_batch_size, run.ranks
    )  # fmt: skip
    temperature = config.generation.temperature
    logprobs = response_logprobs(models.policy.forward, *shared, temperature=temperature)
    heed_stop(run.process.watch)
    with models.reference() as call:
        reference = response_logprobs(call, *shared, temperature=temperature)
    heed_stop(run.process.watch)
    values = response_values(models.critic.forward, *shared) if models.critic is not None else None
    lengths = torch.tensor([len(r) for r in responses])
    keep_mask = torch.arange(logprobs.shape[1]) < lengths[:, None]
    groups = torch.tensor([answer.group for answer in drawn.answers])
    return Experience(prompts, responses, keep_mask, logprobs, reference, values, scores.float(), groups)


def _advance(
    state: PpoState,
    drawn: Draw,
    experience: Experience,
    steps: int,
    moments: RunningMoments | None,
    figures: dict[str, float],
    seconds: float,
    collector: Collector,
) -> None:
    settings = collector.config.ppo
    state.iteration += 1
    state.steps += steps
    state.cursor = drawn.cursor
    state.episodes += len(drawn.answers)
    state.tokens += int(experience.keep_mask.sum())
    state.seconds += seconds
    state.kl_coef = next_kl_coef(state.kl_coef, figures["objective/kl"], len(drawn.answers), settings)
    state.moments = moments.as_dict() if moments is not None else None
    state.watched = watch(state.watched, figures, settings.alarms.window)


def _phase(collector: Collector, text: str) -> None:
    if collector.run.display is not None:
        collector.run.display.phase(text)


class _Clock:
    """Seconds of each phase."""

    def __init__(self) -> None:
        self._last, self.seconds = time.monotonic(), {"generate": 0.0, "score": 0.0, "train": 0.0}

    def lap(self, phase: str) -> None:
        now = time.monotonic()
        self.seconds[phase] += now - self._last
        self._last = now

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    def figures(self, samples: int, tokens: int, work: float) -> dict[str, float]:
        """perf/...; tokens are those written; work: the ideal seconds of this iteration."""
        total = max(self.total, 1e-9)
        return {
            "perf/samples_per_s": samples / total,
            "perf/tokens_per_s": tokens / total,
            "perf/rollout_tokens_per_s": tokens / max(self.seconds["generate"], 1e-9),
            **{f"perf/{name}_s": seconds for name, seconds in self.seconds.items()},
            "perf/mfu": work / total,
        }
