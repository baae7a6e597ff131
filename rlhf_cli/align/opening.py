"""What an aligning stage opens before its loop: prompts, state, the collector, the log."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from rlhf_cli.align.collect import Collector
from rlhf_cli.align.models import Models
from rlhf_cli.align.state import AlignState
from rlhf_cli.data.prompts import PreparedPrompts, Prompt, prepare_prompts, prompt_order
from rlhf_cli.data.templates import Template
from rlhf_cli.errors import CheckpointError
from rlhf_cli.reward.answers import writer_of
from rlhf_cli.reward.rules import Rules
from rlhf_cli.run import Run
from rlhf_cli.runtime.distributed import broadcast_object
from rlhf_cli.runtime.metrics import MetricsLog
from rlhf_cli.schema import AlignedConfig, to_dict

StateT = TypeVar("StateT", bound=AlignState)


def load_prompts(config: AlignedConfig, tokenizer: object, template: Template, run: Run) -> PreparedPrompts:
    """The prompts, read and tokenised by rank 0 for all; the manifest gets what was dropped of them."""
    mine = prepare_prompts(config.data, tokenizer, template, run.say) if run.ranks.is_main else None
    prompts = broadcast_object(mine)
    assert prompts is not None
    run.update_manifest(template=template.name, data=prompts.info)
    return prompts


def check_data(state: AlignState, digest: str, run_dir: Path) -> None:
    """Raise CheckpointError when a state belongs to other data."""
    if state.data_digest != digest:
        raise CheckpointError(
            f"the data has changed since {run_dir} was started; put it back, or start in another run_dir"
        )


def open_collector(config: AlignedConfig, models: Models, prompts: Sequence[Prompt], run: Run) -> Collector:
    """prompts: to learn from, handed out in an order of their own in each epoch."""
    order = prompt_order(len(prompts), config.train.seed)
    writer = writer_of(models.text.tokenizer, models.text.template)
    return Collector(config, models, prompts, order, Rules(config.reward.rules), writer, run)


def open_log(state: AlignState, run: Run, resumed: bool) -> MetricsLog | None:
    """metrics.jsonl and trackers, cut back to what the state has behind it."""
    if not run.ranks.is_main:
        return None
    written = state.iteration - (state.line is not None) if resumed else -1  # a new run evaluates before iteration 1
    return MetricsLog(run.run_dir, run.config.logging, written, run.run_dir.name, to_dict(run.config))


def final_figures(state: AlignState, use_best: bool) -> dict[str, float]:
    """For the manifest: of the best evaluation or the last one, what has changed since the start, and how much was
    done."""
    figures = dict(state.best_eval if use_best else state.last_eval)
    if use_best:
        figures["best_iteration"] = float(state.best_step or 0)
    if "eval_loss" in state.last_eval:
        figures["alignment_tax"] = figures["eval_loss"] - state.first_eval["eval_loss"]
    if "eval_reward" in state.last_eval:
        figures["eval_reward_before"] = state.first_eval["eval_reward"]
    return figures | {
        "iterations": float(state.iteration), "optimizer_steps": float(state.steps), "episodes": float(state.episodes),
        "tokens": float(state.tokens), "seconds": round(state.seconds, 3),
    }  # fmt: skip


def show_end(run: Run, figures: dict[str, float], curves: Path | None) -> None:
    """The last words in the terminal. Rank 0 only."""
    assert run.display is not None
    run.display.stop()
    rows = [(name, f"{value:,.4f}".rstrip("0").rstrip(".")) for name, value in figures.items() if math.isfinite(value)]
    rows += [("model", str(run.run_dir / "model"))] + ([("plot", str(curves))] if curves is not None else [])
    run.display.table(f"rlhf {run.config.stage}", rows)
