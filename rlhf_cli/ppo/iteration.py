"""One iteration of PPO: write, judge, measure, estimate advantages, update. The state changes only when all is done."""

from __future__ import annotations

from typing import Any

import torch

from rlhf_cli.align.alarms import watch
from rlhf_cli.align.collect import Collector, Judged
from rlhf_cli.align.figures import Clock, shares, text_figures, watched_figures
from rlhf_cli.align.forward import response_logprobs, response_values
from rlhf_cli.align.loop import Turn
from rlhf_cli.loop import heed_stop
from rlhf_cli.ops import advantages as estimators
from rlhf_cli.ops.kl import next_kl_coef
from rlhf_cli.ppo.draw import Draw, draw
from rlhf_cli.ppo.experience import Experience
from rlhf_cli.ppo.figures import negative_kl, objective_figures
from rlhf_cli.ppo.models import Models
from rlhf_cli.ppo.ptx import PtxTerm
from rlhf_cli.ppo.samples import write_samples
from rlhf_cli.ppo.state import PpoState
from rlhf_cli.ppo.update import update
from rlhf_cli.reward.moments import RunningMoments
from rlhf_cli.runtime.peak_memory import peak_memory_gb
from rlhf_cli.schema import AlgorithmConfig, PpoConfig


def iterate(
    collector: Collector, config: PpoConfig, models: Models, state: PpoState, ptx: PtxTerm | None, peak_flops: float
) -> Turn:
    """Iteration number state.iteration. Raises StopAsked before anything has changed, never after.

    peak_flops: of all ranks together, per second.
    """
    run = collector.run
    clock = Clock()
    drawn = draw(collector, config, state.iteration, state.cursor)
    clock.lap("generate")
    run.phase("scoring")
    judged = collector.judge(drawn.answers)
    moments, scores = _scores(config, drawn, judged, state)
    experience = _measure(collector, models, drawn, scores)
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
    run.phase("updating")
    stats = update(
        models.policy, models.critic, experience, advantages, returns, config, state.iteration, run.ranks,
        models.text.tokenizer.pad_token_id, ptx, models.after_step,
    )  # fmt: skip
    clock.lap("train")

    figures = objective_figures(experience, judged, state.kl_coef, rewards)
    text = text_figures([a.response for a in drawn.answers], models.text.tokenizer, models.vocab_size)
    figures |= text
    figures |= {f"rules/{name}_redrawn": float(count) for name, count in drawn.redrawn.items()}
    written = int(experience.keep_mask.sum())
    in_all = written + sum(len(p) for p in experience.prompts)
    work = models.work(written, in_all) / peak_flops
    kl = figures["objective/kl"]
    state.steps += stats.steps
    state.seconds += clock.total
    state.watched = watch(state.watched, watched_figures(kl, text), settings.alarms.window)
    state.moments = moments.as_dict() if moments is not None else None
    _advance(state, drawn, written, kl, settings)
    line = {
        "step": state.iteration, "episode": state.episodes, "optimizer_steps": state.steps, **figures, **stats.figures,
        "target_kl_stopped": float(stats.stopped),
        **state.counters(len(collector.prompts)), **clock.figures(len(drawn.answers), written, work),
        "perf/peak_memory_gb": peak_memory_gb(run.ranks.device),
    }  # fmt: skip
    warning, number = negative_kl(experience), state.iteration - 1
    return Turn(
        line, _shown(line), {} if warning is None else {"negative_kl": warning},
        lambda log: write_samples(drawn.answers, judged, experience, number, run, log),
    )  # fmt: skip


def _scores(
    config: PpoConfig, drawn: Draw, judged: Judged, state: PpoState
) -> tuple[RunningMoments | None, torch.Tensor]:
    """(moments with this iteration in them, scores (R,) float64 that the policy learns from).

    Rewards are normalised and clipped, then responses without an end are marked down; a rule's score is final.
    """
    reward, moments = judged.reward, None
    settings = config.reward
    if settings.moments == "running":
        moments = RunningMoments.from_dict(state.moments) if state.moments else RunningMoments()
        moments.update(reward)
        reward = moments.normalise(reward)
        if settings.clip is not None:
            reward = reward.clamp(-settings.clip, settings.clip)
    scores = reward.clone()
    for i, answer in enumerate(drawn.answers):
        if answer.response.ending == "length":
            scores[i] = config.ppo.scored_ending(reward[i].item())
    return moments, judged.with_rules(scores)


def _measure(collector: Collector, models: Models, drawn: Draw, scores: torch.Tensor) -> Experience:
    """Log-probabilities of policy and reference, and values, of all responses: the state before the update."""
    config, run = collector.config, collector.run
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


def _advance(state: PpoState, drawn: Draw, written: int, kl: float, settings: AlgorithmConfig) -> None:
    """written: tokens of the responses; kl: the policy's, before the update."""
    state.iteration += 1
    state.cursor = drawn.cursor
    state.episodes += len(drawn.answers)
    state.tokens += written
    state.kl_coef = next_kl_coef(state.kl_coef, kl, len(drawn.answers), settings)


def _shown(line: dict[str, Any]) -> dict[str, str]:
    """The figures of an iteration beside the bar."""
    return {
        "reward": f"{line['objective/scores']:.3f}",
        "KL": f"{line['objective/kl']:.2f}",
        "length": f"{line['text/length']:.0f}",
        "tokens/s": f"{line['perf/tokens_per_s']:,.0f}",
        "generate/score/train": shares(line),
    }
