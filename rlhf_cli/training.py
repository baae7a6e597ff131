"""A supervised training from its data to its model: what sft and rm (and later raft) do alike.

train_to_end reads top to bottom: model, engine, resume, loop, best weights, save, curves, manifest. dry_run says what
it would do.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from rlhf_cli.assemble import (
    WEIGHTS,
    PreparedT,
    Reading,
    Task,
    Text,
    build_model,
    check_rows,
    load_text,
    make_or_resume,
    model_config,
    redraw_lisa,
    whole_weights,
    write_model,
)
from rlhf_cli.errors import RlhfError, RunFailed
from rlhf_cli.estimate import plan_run
from rlhf_cli.loop import Conclusion, Hooks, LoopState, Objective, Trackers, Work, train
from rlhf_cli.models.load import resolve_dtype
from rlhf_cli.models.lora import plain_model
from rlhf_cli.models.tokenizer import tokenizer_digest
from rlhf_cli.models.trainable import multiplied_parameters
from rlhf_cli.ops.schedule import learning_rate
from rlhf_cli.run import Checkpoints, Run, close_run, load_best, prune_best, save_best
from rlhf_cli.runtime.checkpoint import WRITE_FAILURES
from rlhf_cli.runtime.distributed import gather_objects
from rlhf_cli.runtime.engine import Engine, gathered_state_dict
from rlhf_cli.runtime.flops import flops_per_token, measured_peak_flops
from rlhf_cli.runtime.metrics import MetricsLog, read_metrics
from rlhf_cli.runtime.plots import plot_training
from rlhf_cli.runtime.progress import Display
from rlhf_cli.schema import TrainedConfig, to_dict

SHOWN = ("loss", "accuracy", "perf/tokens_per_s", "perf/samples_per_s", "perf/peak_memory_gb", "perf/mfu")


def train_to_end(
    config: TrainedConfig,
    run: Run,
    text: Text,
    task: Task,
    make_objective: Callable[[PretrainedConfig], Objective[Any]],
    data_digest: str,
) -> dict[str, float]:
    """Train as the config says. Returns the final figures, which are also in the manifest; {} when interrupted."""
    dtype = resolve_dtype(config.model.dtype, run.ranks.device)
    checkpoints = Checkpoints(run, {})
    found = checkpoints.newest()
    model = build_model(config, text, task, dtype, run, found)
    if config.model.trainable.mode == "lisa":
        checkpoints.extras[WEIGHTS] = whole_weights(config, model, text, task)
    engine, state = make_or_resume(config, model, dtype, checkpoints, run, found, data_digest)

    objective = make_objective(plain_model(engine.module).config)
    log = open_log(config, run, state.step)
    peak = measured_peak_flops(run.ranks.device, dtype)
    trackers = Trackers(log, run.display, flops_per_token(*multiplied_parameters(engine.module)), peak)
    hooks = Hooks(
        partial(redraw_lisa, config=config, dtype=dtype, run=run),
        checkpoints.save,
        lambda engine, step: save_best(run, engine, step, only_trainable=config.model.trainable.mode != "lisa"),
    )
    run.process.watch.loop_started()
    rate = lambda step: learning_rate(config.optim, step, objective.total_steps)
    work = Work(objective, config.train, rate)
    engine, ending = train(engine, work, state, run.ranks, run.process.watch, trackers, hooks)
    if log is not None:
        log.close()
    if ending == "interrupted":
        run.say(f"interrupted after step {state.step}; the same command goes on from there")
        close_run(run, status="interrupted")
        return {}
    if ending == "early_stopped":
        run.say(f"stopped early after step {state.step}; the best evaluation was after step {state.best_step}")
    return finish(config, engine, text, task, objective, state, checkpoints)


def dry_run(
    config: TrainedConfig, world_size: int, reading: Reading[PreparedT], task_of: Callable[[PreparedT], Task]
) -> None:
    """Open data and model for a job of `world_size` ranks and print what it would do. Weights are not loaded."""
    with tempfile.TemporaryDirectory() as scratch:
        text = load_text(config, Path(scratch), None, reading)
    data = reading.prepare(config.data, text.tokenizer, tokenizer_digest(text.tokenizer), text.template, print)
    architecture = model_config(config, text, task_of(data))
    check_rows(architecture, config.data)
    # Several ranks are several GPUs, also when they are planned on a machine without.
    planned = plan_run(config, data, architecture, world_size, for_gpu=torch.cuda.is_available() or world_size > 1)
    title = f"rlhf {config.stage} --dry-run: nothing was started"
    Display(sys.stdout, "none", config.stage).table(title, planned.rows)


def open_log(config: TrainedConfig, run: Run, step: int) -> MetricsLog | None:
    """metrics.jsonl and trackers, from rank 0."""
    if not run.ranks.is_main:
        return None
    return MetricsLog(run.run_dir, config.logging, step, run.run_dir.name, to_dict(config))


def finish(
    config: TrainedConfig,
    engine: Engine,
    text: Text,
    task: Task,
    objective: Objective[Any],
    state: LoopState,
    checkpoints: Checkpoints,
) -> dict[str, float]:
    """Save the model (the best one with early stopping), draw the curves, print the summary, close the manifest.

    Raises RunFailed, on all ranks, when something of this cannot be written; a checkpoint then keeps the training.
    """
    run = checkpoints.run
    engine.eval()
    use_best = config.train.early_stopping.patience > 0 and state.best_step is not None
    with training_kept(engine, state, checkpoints, WRITE_FAILURES):
        concluded = objective.conclude(engine, state.best_step if use_best and state.best_step else state.step)
    figures = state.best_eval | {"best_step": float(state.best_step or 0)} if use_best else dict(state.last_eval)
    figures |= concluded.figures
    figures |= {"steps": float(state.step), "tokens": float(state.tokens), "seconds": round(state.seconds, 3)}
    weights = gathered_state_dict(engine, only_trainable=config.lora.enabled)
    with training_kept(engine, state, checkpoints, Exception):  # rank 0 is by itself here, so whatever it is
        if run.ranks.is_main:
            if use_best and state.best_step is not None:
                put(weights, load_best(run.run_dir, state.best_step))
            write_model(config, engine.module, weights, text, task, run.run_dir / "model", concluded.reward)
            figures |= last_logged(run.run_dir)
            show(run, figures, concluded)
    if run.ranks.is_main:
        prune_best(run.run_dir)  # not before: a checkpoint of the failure would speak of them
    kind = ("adapter", "peft") if config.lora.enabled else ("reward" if task.is_reward else "policy", "hf")
    output = {"kind": kind[0], "task": task.name, "path": "model", "format": kind[1]}
    close_run(run, status="complete", output=output, reward=concluded.reward, metrics=figures)
    return figures


@contextmanager
def training_kept(
    engine: Engine,
    state: LoopState,
    checkpoints: Checkpoints,
    failures: type[Exception] | tuple[type[Exception], ...],
) -> Iterator[None]:
    """Around what can fail on one rank after its collectives, when the training is done: all ranks then save a
    checkpoint, for the same command to go on from, and raise RunFailed."""
    failure: Exception | None = None
    text: str | None = None
    try:
        yield
    except failures as error:
        failure = error
        text = str(error) if isinstance(error, WRITE_FAILURES) else f"{type(error).__name__}: {error}"
    told = [text for text in gather_objects(text) if text is not None]
    if not told:
        return
    begin = f"training is done, but not its end: {told[0]}."
    try:
        found = checkpoints.newest()
        if found is None or found.state.step != state.step:
            checkpoints.save(engine, state)
    except RlhfError as error:
        raise RunFailed(f"{begin} Nor could a checkpoint be saved: {error}") from failure
    raise RunFailed(
        f"{begin} A checkpoint of step {state.step} is kept, and the same command goes on from it"
    ) from failure


def show(run: Run, figures: dict[str, float], concluded: Conclusion) -> None:
    """The last words in the terminal, and the curves."""
    title = f"rlhf {run.config.stage}"
    curves = plot_training(run.run_dir, f"{title}: {run.run_dir.name}")
    assert run.display is not None
    run.display.stop()
    for table in concluded.tables:
        run.display.table(*table)
    rows = [(name, f"{value:,.4f}".rstrip("0").rstrip(".")) for name, value in figures.items()]
    rows += [("model", str(run.run_dir / "model"))]
    rows += [("plot", str(path)) for path in (curves, *concluded.plots) if path is not None]
    run.display.table(title, rows)


def put(weights: dict[str, torch.Tensor], best: dict[str, torch.Tensor]) -> None:
    """Replace values in place, so that names that share a tensor (tied embeddings) change together."""
    for name, value in best.items():
        weights[name].copy_(value)


def last_logged(run_dir: Path) -> dict[str, float]:
    """The training figures and speed of the last logged step."""
    lines = list(read_metrics(run_dir))
    return {name: lines[-1][name] for name in SHOWN if lines and name in lines[-1]}
