"""The supervised loop that sft, rm and raft share: steps, metrics, evaluation, checkpoints, stops.

A step is a pure function of its number: which rows, in which order, at which learning rate. So a checkpoint needs the
step, the engine's state and every rank's RNG, and a resumed run repeats the uninterrupted one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, NamedTuple, Protocol, TypeVar

import torch

from rlhf_cli.errors import RunFailed
from rlhf_cli.runtime.distributed import Ranks, any_rank, sum_over_ranks
from rlhf_cli.runtime.engine import Engine
from rlhf_cli.runtime.peak_memory import peak_memory_gb
from rlhf_cli.runtime.progress import Display
from rlhf_cli.runtime.stop import StopWatch
from rlhf_cli.schema import TrainConfig

BatchT = TypeVar("BatchT")


class Micro(NamedTuple):
    """One forward pass. loss_sum: scalar, not yet divided; sums: by name, added over ranks, logged per sample."""

    loss_sum: torch.Tensor
    sums: dict[str, torch.Tensor]


@dataclass(frozen=True)
class StepData(Generic[BatchT]):
    """What one optimizer step trains on.

    micro_batches: this rank's; as many on every rank. normaliser: loss terms of the whole step over all ranks, the
    denominator of the loss. tokens, samples: of the whole step over all ranks.
    """

    micro_batches: Sequence[BatchT]
    normaliser: float
    tokens: int
    samples: int


class Conclusion(NamedTuple):
    """What an objective knows at the end. figures: final ones beside the last evaluation's; reward: what is known of a
    reward model's scores, for the manifest; plots: drawn beside the curves; tables: (title, rows) for the terminal."""

    figures: dict[str, float] = {}
    reward: dict[str, Any] | None = None
    plots: tuple[Path, ...] = ()
    tables: tuple[tuple[str, list[tuple[str, str]]], ...] = ()


class StopAsked(Exception):
    """Some rank was asked to stop in the middle of an evaluation or of an iteration; raised on all ranks."""


def heed_stop(watch: StopWatch) -> None:
    """Between the parts of something long, on all ranks: raises StopAsked if any of them was asked to stop."""
    if any_rank(bool(watch.requested)):
        raise StopAsked


class Objective(Protocol[BatchT]):
    """What a stage brings to the loop. total_steps: optimizer steps from beginning to end."""

    total_steps: int

    def step_data(self, step: int) -> StepData[BatchT]:
        """Rows of step `step` (0 is the first) as this rank's micro-batches."""

    def forward(self, engine: Engine, batch: BatchT) -> Micro:
        """Loss of one micro-batch."""

    def evaluate(self, engine: Engine, step: int) -> dict[str, float]:
        """Figures after `step` steps, named eval_..., the same on every rank; {} without evaluation data. Beside them
        perf/generate_s, if texts were written: the seconds that this took.

        Raises StopAsked (see heed_stop), and is then asked again when the run goes on.
        """

    def epoch(self, step: int) -> float:
        """Passes over the data after `step` steps."""

    def conclude(self, engine: Engine, step: int) -> Conclusion:
        """The last word, when the loop has ended. step: the one whose weights are kept. All ranks call it."""


@dataclass
class LoopState:
    """Everything of the loop that a checkpoint keeps beside engine and RNG.

    best_eval: the figures of the evaluation with the lowest eval_loss.
    unevaluated: the line of the last step when a stop request came before its evaluation, which is then still to do.
    """

    step: int = 0
    tokens: int = 0
    samples: int = 0
    seconds: float = 0.0
    best_eval: dict[str, float] = field(default_factory=dict)
    best_step: int | None = None
    evaluations_without_gain: int = 0
    last_eval: dict[str, float] = field(default_factory=dict)
    unevaluated: dict[str, Any] | None = None
    data_digest: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """JSON-able; LoopState(**d) brings it back."""
        return asdict(self)


@dataclass
class Hooks:
    """What the loop calls at its turning points. All ranks call all of them.

    engine_for: the engine to train step `step` with (LISA makes a new one when other layers are drawn).
    save_checkpoint: write resumable state. save_best: write the weights of the best evaluation so far.
    """

    engine_for: Callable[[Engine, int], Engine]
    save_checkpoint: Callable[[Engine, LoopState], None]
    save_best: Callable[[Engine, int], None]


class LineSink(Protocol):
    """Takes the lines of logged steps; runtime.metrics.MetricsLog is one."""

    def write(self, line: dict[str, Any]) -> None:
        """line: `step` and its figures."""


@dataclass
class Trackers:
    """log and display: None on other ranks than 0. flops_per_token and peak_flops: for perf/mfu."""

    log: LineSink | None
    display: Display | None
    flops_per_token: float
    peak_flops: float


class Work(NamedTuple):
    """What is to be trained, and how. rate: step (0 is the first) -> its learning rate."""

    objective: Objective[Any]
    train: TrainConfig
    rate: Callable[[int], float]


Ending = Literal["finished", "early_stopped", "interrupted"]


def train(
    engine: Engine,
    work: Work,
    state: LoopState,
    ranks: Ranks,
    watch: StopWatch,
    trackers: Trackers,
    hooks: Hooks,
) -> tuple[Engine, Ending]:
    """Train from state.step to the objective's last step.

    Returns the engine that was used last and how it ended. When interrupted, a checkpoint has been written.
    Raises RunFailed when the loss or the gradient is no longer a number.
    """
    train, total_steps = work.train, work.objective.total_steps
    if trackers.display is not None:
        trackers.display.start(state.step, total_steps)
    window = _Window()
    if state.unevaluated is not None:
        line = state.unevaluated
        if not _evaluate(engine, work.objective, state, line, train, hooks):
            return engine, "interrupted"  # all is as the checkpoint has it
        _show(state, line, window, trackers)
    while state.step < total_steps:
        if stopped_early(state, train):
            return engine, "early_stopped"
        engine = hooks.engine_for(engine, state.step)
        line, stop = _one_step(engine, work, state, ranks, watch, window)
        last = state.step == total_steps
        due = last or (train.eval_every > 0 and state.step % train.eval_every == 0)
        if due or state.step % train.log_every == 0:
            line |= _speed_and_memory(window, trackers, ranks)
        if due:
            state.unevaluated = line  # an evaluation can take longer than whoever stops us waits
            stop = stop or not _evaluate(engine, work.objective, state, line, train, hooks)
        if state.unevaluated is None:
            _show(state, line, window, trackers)
        if stop:
            hooks.save_checkpoint(engine, state)
            return engine, "interrupted"
        if train.save_every > 0 and (state.step % train.save_every == 0 or last):
            hooks.save_checkpoint(engine, state)
    return engine, "finished"


def stopped_early(state: LoopState, train: TrainConfig) -> bool:
    """Whether the evaluation has not improved for `patience` evaluations."""
    patience = train.early_stopping.patience
    return 0 < patience <= state.evaluations_without_gain


def _one_step(
    engine: Engine, work: Work, state: LoopState, ranks: Ranks, watch: StopWatch, window: _Window
) -> tuple[dict[str, Any], bool]:
    """Returns the figures of the step, and whether any rank was asked to stop."""
    began = time.monotonic()
    objective = work.objective
    data = objective.step_data(state.step)
    sums: dict[str, torch.Tensor] = {}
    for batch in data.micro_batches:
        micro = objective.forward(engine, batch)
        engine.backward(micro.loss_sum / data.normaliser)
        for name, value in [("loss", micro.loss_sum), *micro.sums.items()]:
            sums[name] = sums.get(name, torch.zeros((), device=ranks.device)) + value.detach().float()
    lr = work.rate(state.step)
    grad_norm = engine.step(lr)
    names = sorted(sums)
    # One collective for all figures, and for whether any rank was told to stop.
    totals = sum_over_ranks(
        torch.stack([*(sums[n] for n in names), torch.tensor(float(watch.requested), device=ranks.device)])
    )
    divisors = {"loss": data.normaliser}
    means = {n: t / divisors.get(n, data.samples) for n, t in zip(names, totals.tolist(), strict=False)}
    state.step += 1
    state.tokens += data.tokens
    state.samples += data.samples
    if not math.isfinite(means["loss"]) or (not math.isfinite(grad_norm) and not engine.scales_loss):
        raise RunFailed(
            f"step {state.step}: loss {means['loss']}, gradient norm {grad_norm}: no longer a number."
            " Checkpoints written before it are kept. Lower optim.lr, use model.dtype=bf16 or fp32, or look at the"
            " data of this step."
        )
    line = {
        "step": state.step, "epoch": round(objective.epoch(state.step), 6), "loss": means.pop("loss"), **means,
        "grad_norm": grad_norm, "learning_rate": lr, "tokens": state.tokens, "num_tokens": state.tokens,
        "samples": state.samples,
    }  # fmt: skip
    if engine.skipped:
        line["skipped"] = 1
    seconds = time.monotonic() - began
    state.seconds += seconds
    window.add(data.tokens, data.samples, seconds)
    return line, totals[-1].item() > 0


def _evaluate(
    engine: Engine,
    objective: Objective[Any],
    state: LoopState,
    line: dict[str, Any],
    train: TrainConfig,
    hooks: Hooks,
) -> bool:
    """Evaluate after state.step steps, add the figures to that step's line, and keep the weights if they are better.

    Returns False when it was stopped; nothing has changed then, and state.unevaluated still asks for it.
    """
    began = time.monotonic()
    try:
        figures = objective.evaluate(engine, state.step)
    except StopAsked:
        return False
    state.unevaluated = None
    writing = figures.pop("perf/generate_s", 0.0)
    line |= figures | {"perf/generate_s": writing, "perf/score_s": time.monotonic() - began - writing}
    state.last_eval = figures
    if "eval_loss" in figures:
        best = state.best_eval.get("eval_loss", math.inf)
        if figures["eval_loss"] < best - train.early_stopping.min_delta:
            state.best_eval, state.best_step, state.evaluations_without_gain = figures, state.step, 0
            if train.early_stopping.patience:
                hooks.save_best(engine, state.step)
        else:
            state.evaluations_without_gain += 1
    state.seconds += time.monotonic() - began
    return True


class _Window:
    """Throughput since the last line."""

    def __init__(self) -> None:
        self.tokens, self.samples, self.seconds = 0, 0, 0.0

    def add(self, tokens: int, samples: int, seconds: float) -> None:
        self.tokens += tokens
        self.samples += samples
        self.seconds += seconds

    def speed(self) -> float:
        """Tokens per second."""
        return self.tokens / max(self.seconds, 1e-9)


def _speed_and_memory(window: _Window, trackers: Trackers, ranks: Ranks) -> dict[str, float]:
    """perf/... over the steps since the last line; another line begins."""
    speed, samples, seconds = window.speed(), window.samples / max(window.seconds, 1e-9), window.seconds
    window.tokens, window.samples, window.seconds = 0, 0, 0.0
    return {
        "perf/tokens_per_s": speed,
        "perf/samples_per_s": samples,
        "perf/train_s": seconds,
        "perf/generate_s": 0.0,  # of an evaluation
        "perf/score_s": 0.0,
        "perf/mfu": speed * trackers.flops_per_token / (trackers.peak_flops * ranks.world_size),
        "perf/peak_memory_gb": peak_memory_gb(ranks.device),
    }


def _show(state: LoopState, line: dict[str, Any], window: _Window, trackers: Trackers) -> None:
    """A finished step to the terminal, and to the log when it is its turn."""
    speed = line.get("perf/tokens_per_s") or window.speed()
    if trackers.display is not None:
        if "eval_loss" in line:
            trackers.display.say(
                f"step {state.step}: " + "  ".join(f"{k} {v:.4f}" for k, v in line.items() if k.startswith("eval_"))
            )
        trackers.display.step(state.step, {"loss": f"{line['loss']:.4f}", "tokens/s": f"{speed:,.0f}"})
    if trackers.log is not None and "perf/tokens_per_s" in line:
        trackers.log.write(line | {"seconds": round(state.seconds, 3)})
