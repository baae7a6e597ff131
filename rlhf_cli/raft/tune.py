"""Fine-tuning on the selected responses of an iteration, by the supervised loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlhf_cli.align.models import Models
from rlhf_cli.data import plan
from rlhf_cli.data.collate import IGNORED, collate
from rlhf_cli.data.token_rows import TokenRows
from rlhf_cli.loop import Conclusion, Hooks, LoopState, Micro, StepData, StopAsked, Trackers, Work, train
from rlhf_cli.ops.schedule import learning_rate
from rlhf_cli.raft.state import RaftState, Tuning
from rlhf_cli.run import Run
from rlhf_cli.runtime import engine_state
from rlhf_cli.runtime.engine import Engine
from rlhf_cli.schema import RaftConfig, TrainConfig

ITERATION_SEED = 1_000_003  # iterations have other orders than their neighbours


class SelectedObjective:
    """Cross-entropy of the responses; weights (S,) multiply all tokens of a row. total_steps: of this iteration.

    A step is divided by its tokens times the mean weight of all tokens of the iteration, not by its own weights: one
    that happens to have light rows only moves the policy little.
    """

    def __init__(self, rows: TokenRows, weights: Tensor | None, config: RaftConfig, iteration: int, models: Models):
        self.rows, self.weights, self.models = rows, weights, models
        self.size, self.ranks = config.train.micro_batch_size, models.policy.ranks
        seed = config.train.seed * ITERATION_SEED + iteration
        self.course = plan.Course(len(rows), None, config.train.global_batch_size, seed)
        steps = plan.steps_per_epoch(len(rows), config.train.global_batch_size)
        self.total_steps = config.raft.epochs * steps
        self.mean_weight = 1.0
        if weights is not None:
            tokens = [rows.num_trained([row]) for row in range(len(rows))]
            self.mean_weight = sum(n * self._weight(row) for row, n in enumerate(tokens)) / sum(tokens)

    def epoch(self, step: int) -> float:
        """Passes over the selected responses."""
        return self.course.epoch(step)

    def step_data(self, step: int) -> StepData[plan.MicroBatch]:
        """The global batch of a step; this rank's part of it as micro-batches of row numbers."""
        rows = self.course.rows(step)
        spread = plan.plan_step(rows, self.rows.lengths[rows], self.ranks.world_size, self.size)
        normaliser = self.rows.num_trained(rows) * self.mean_weight
        return StepData(spread.ranks[self.ranks.rank], normaliser, int(self.rows.lengths[rows].sum()), len(rows))

    def forward(self, engine: Engine, batch: plan.MicroBatch) -> Micro:
        """Sum of the weighted token losses of one micro-batch."""
        read = collate(self.rows, batch, self.models.text.tokenizer.pad_token_id, packed=False)
        device = self.ranks.device
        inputs = {
            "input_ids": read.input_ids.to(device, non_blocking=True),
            "position_ids": read.position_ids.to(device, non_blocking=True),
            "targets": read.targets.to(device, non_blocking=True),
        }
        if self.weights is None:
            return Micro(engine.forward(**inputs).loss_sum, {})
        lines = (read.targets != IGNORED).nonzero(as_tuple=True)[0]  # (N,) the row of each target
        weights = torch.tensor([self._weight(row) for (row,) in batch] or [0.0])[lines].to(device)
        return Micro(-(engine.forward(**inputs, temperature=1.0, logprobs=True).logprobs * weights).sum(), {})

    def evaluate(self, engine: Engine, step: int) -> dict[str, float]:
        """Iterations are evaluated, not steps."""
        return {}

    def conclude(self, engine: Engine, step: int) -> Conclusion:
        """The iteration has the last word."""
        return Conclusion()

    def _weight(self, row: int) -> float:
        assert self.weights is not None
        return float(self.weights[row])


class _Steps:
    """Takes the lines of the loop: for the bar, and for the figures of the iteration."""

    def __init__(self, tuning: Tuning, total: int, run: Run):
        self.tuning, self.total, self.run = tuning, total, run

    def write(self, line: dict[str, Any]) -> None:
        self.tuning.losses.append(line["loss"])
        self.tuning.grad_norms.append(line["grad_norm"])
        self.run.phase(f"training {line['step']}/{self.total}  loss {line['loss']:.4f}")


def fine_tune(
    models: Models, config: RaftConfig, rows: TokenRows, weights: Tensor | None, state: RaftState, run: Run
) -> dict[str, float]:
    """Train the policy on the selected rows of iteration state.iteration; weights (S,) as of Selection.

    Returns loss, grad_norm and learning_rate of the iteration, and "steps". When it is interrupted, `state` knows where
    it is, and StopAsked is raised.
    """
    objective = SelectedObjective(rows, weights, config, state.iteration, models)
    tuning = state.unfinished
    if tuning is None:
        tuning = Tuning(LoopState().as_dict(), [], [])
        if config.raft.optimizer == "fresh":
            engine_state.forget_moments(models.policy)
    rate = learning_rates(config, state.iteration, objective.total_steps)
    loop_state = tuning.loop_state

    def keep(engine: Engine, at: LoopState) -> None:
        tuning.loop = at.as_dict()
        state.interrupt(tuning)

    hooks = Hooks(lambda engine, step: engine, keep, lambda engine, step: None)
    trackers = Trackers(_Steps(tuning, objective.total_steps, run), None, 0.0, 1.0)
    settings = TrainConfig(seed=config.train.seed, save_every=0, eval_every=0, log_every=1)
    work = Work(objective, settings, rate)
    _, ending = train(models.policy, work, loop_state, run.ranks, run.process.watch, trackers, hooks)
    if ending == "interrupted":
        raise StopAsked
    state.tuning = None
    mean = lambda values: sum(values) / len(values)
    return {
        "loss": mean(tuning.losses),
        "grad_norm": mean(tuning.grad_norms),
        "learning_rate": rate(objective.total_steps - 1),
        "steps": float(objective.total_steps),
    }


def learning_rates(config: RaftConfig, iteration: int, steps: int) -> Callable[[int], float]:
    """Step of an iteration -> its learning rate: a schedule for each iteration of so many steps, or one for all, in
    which an iteration has its place however many responses were discarded."""
    if config.raft.optimizer == "fresh":
        return lambda step: learning_rate(config.optim, step, steps)
    planned = planned_steps(config)
    total = config.raft.num_iterations * planned
    return lambda step: learning_rate(config.optim, iteration * planned + step, total)


def planned_steps(config: RaftConfig) -> int:
    """Optimizer steps of an iteration in which no response is discarded."""
    rows = config.raft.rows_per_iteration
    return config.raft.epochs * plan.steps_per_epoch(rows, config.train.global_batch_size)
