"""One iteration of RAFT: write, score, select, fine-tune. The state changes only when all is done, or says how far the
fine-tuning has come."""

from __future__ import annotations

import math
from typing import Any

from rlhf_cli.align.alarms import DISTINCT_2, KL, LENGTH, SEPARATORS, watch
from rlhf_cli.align.collect import Collector
from rlhf_cli.align.figures import Clock, shares
from rlhf_cli.align.loop import Turn
from rlhf_cli.align.samples import show_samples
from rlhf_cli.errors import CheckpointError
from rlhf_cli.loop import heed_stop
from rlhf_cli.raft.figures import diversity_figures, reward_figures
from rlhf_cli.raft.models import Models
from rlhf_cli.raft.record import Record, record_of
from rlhf_cli.raft.samples import Samples, describe, from_rows, make_samples, to_rows, unselected
from rlhf_cli.raft.selection import Selection, describe_choice, select, training_rows
from rlhf_cli.raft.state import RaftState
from rlhf_cli.raft.tune import fine_tune
from rlhf_cli.runtime.distributed import barrier, broadcast_object
from rlhf_cli.runtime.metrics import MetricsLog
from rlhf_cli.runtime.peak_memory import peak_memory_gb
from rlhf_cli.schema import RaftConfig


def iterate(collector: Collector, config: RaftConfig, models: Models, state: RaftState, peak_flops: float) -> Turn:
    """Iteration number state.iteration. Raises StopAsked with a state from which it goes on.

    peak_flops: of all ranks together, per second.
    """
    run, tokenizer = collector.run, models.text.tokenizer
    clock, record = Clock(), record_of(run.run_dir, state.iteration + 1)
    samples, selection = _selected(collector, config, models, record, state, clock)
    heed_stop(run.process.watch)
    rewards = reward_figures(samples, selection, config)
    texts = diversity_figures(samples, selection, config, tokenizer, models.vocab_size)
    trained, tuned = 0, {"steps": 0.0}
    if len(selection.chosen):
        answers = [samples.answers[i] for i in selection.chosen.tolist()]
        always = config.raft.train_eos == "always"
        rows = training_rows(answers, models.text, collector.writer.closing, always, models.positions)
        tuned = fine_tune(models, config, rows, selection.weights, state, run)
        trained = int(rows.lengths.sum()) * config.raft.epochs
    else:
        run.say(f"iteration {state.iteration + 1}: all responses are discarded, nothing is learnt; see reward.rules")
    if config.raft.keep_models:
        models.save_iteration(run.run_dir, state.iteration + 1)
    clock.lap("train")
    written = sum(len(answer.response.token_ids) for answer in samples.answers)
    in_all = written + sum(len(answer.prompt.token_ids) for answer in samples.answers)
    # Of an iteration that an earlier start has begun the time is not known: no speeds then.
    known = 1.0 if samples.num_written == written else math.nan
    work = known * models.work(in_all, trained) / peak_flops
    _advance(state, config, rewards, texts, int(tuned.pop("steps")), written, clock.total)
    line = {
        "step": state.iteration, "episode": state.episodes, "optimizer_steps": state.steps, **rewards, **texts, **tuned,
        **state.counters(len(collector.prompts)), **clock.figures(known * len(samples.answers), known * written, work),
        "perf/peak_memory_gb": peak_memory_gb(run.ranks.device),
    }  # fmt: skip
    return Turn(
        {name: value for name, value in line.items() if value == value},  # such as a mean reward of nothing selected
        _shown(line), {}, lambda log: _show(samples, selection, config, state.iteration, collector, log),
    )  # fmt: skip


def _selected(
    collector: Collector, config: RaftConfig, models: Models, record: Record, state: RaftState, clock: Clock
) -> tuple[Samples, Selection]:
    """The responses of the iteration and what is selected: from disk if they were finished before."""
    run = collector.run
    if broadcast_object(record.is_done() if run.ranks.is_main else None):
        samples = from_rows(collector, config, record.generated(describe(config, state)), state.cursor)
        run.say(f"iteration {state.iteration + 1}: its {len(samples.answers)} responses are in {record.done}")
        return samples, select(samples, config)
    if state.tuning is not None:
        raise CheckpointError(
            f"{record.done} is missing, from which iteration {state.iteration + 1} had begun to learn; put it back, or"
            f" remove the newest checkpoint in {run.run_dir / 'checkpoints'}"
        )
    samples = make_samples(collector, config, models, record, state, clock)
    selection = select(samples, config)
    if run.ranks.is_main:
        rows = to_rows(samples, describe_choice(selection, samples, config))
        record.finish(rows, [row for row in rows if row["kept"]])
    barrier()
    clock.lap("score")
    return samples, selection


def _advance(
    state: RaftState,
    config: RaftConfig,
    rewards: dict[str, float],
    texts: dict[str, float],
    steps: int,
    written: int,
    seconds: float,
) -> None:
    """written: tokens of the responses."""
    state.iteration += 1
    state.steps += steps
    state.cursor += config.raft.num_prompts
    state.episodes += config.raft.num_samples
    state.tokens += written
    state.seconds += seconds
    watched = {
        KL: rewards["raft/kl"],
        DISTINCT_2: texts["raft/distinct_2"],
        SEPARATORS: texts["text/separator_ratio"],
        LENGTH: texts["raft/length"],
    }
    state.watched = watch(state.watched, watched, config.raft.alarms.window)


def _shown(line: dict[str, Any]) -> dict[str, str]:
    """The figures of an iteration beside the bar."""
    return {
        "reward": f"{line['raft/reward_policy']:.3f}",
        "selected": f"{line['raft/reward_selected']:.3f}",
        "KL": f"{line['raft/kl']:.2f}",
        "length": f"{line['raft/length']:.0f}",
        "tokens/s": f"{line['perf/rollout_tokens_per_s']:,.0f}",
        "generate/score/train": shares(line),
    }


def _show(
    samples: Samples, selection: Selection, config: RaftConfig, iteration: int, collector: Collector, log: MetricsLog
) -> None:
    """Some responses as the policy writes them, with their rank among those that they compete with."""
    count = config.raft.num_candidates if config.raft.strategy == "local" else config.raft.num_samples
    rewards = samples.judged.with_rules(samples.judged.reward).tolist()
    cells = []
    for i in unselected(config):
        answer, score = samples.answers[i], selection.scores[i].item()
        rank = "discarded" if score == float("-inf") else f"{int(selection.ranks[i])} of {count}"
        cells.append([answer.prompt.text, answer.response.text, f"{rewards[i]:.3f}", rank])
    show_samples(("prompt", "response", "reward", "rank"), cells, iteration, collector.run, log)
