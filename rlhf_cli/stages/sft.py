"""`rlhf sft`: supervised fine-tuning of a causal language model, or pre-training from scratch.

run reads top to bottom: ranks, tokenizer and data, model, engine, resume, loop, save.
"""

from __future__ import annotations

import math
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
from torch import nn

from rlhf_cli.assemble import (
    WEIGHTS,
    Text,
    build_model,
    check_length,
    describe_template,
    load_data,
    load_text,
    make_or_resume,
    model_config,
    redraw_lisa,
    whole_weights,
    write_model,
)
from rlhf_cli.data.dataset import prepare
from rlhf_cli.estimate import plan_run
from rlhf_cli.lm_objective import LanguageModelObjective
from rlhf_cli.loop import Hooks, LoopState, Trackers, Work, train
from rlhf_cli.models.load import resolve_dtype
from rlhf_cli.models.lora import plain_model
from rlhf_cli.models.tokenizer import tokenizer_digest
from rlhf_cli.models.trainable import ParameterCount, count_parameters
from rlhf_cli.run import (
    Checkpoints,
    Run,
    close_run,
    load_best,
    open_run,
    prune_best,
    save_best,
)
from rlhf_cli.runtime.distributed import Ranks, init, shutdown
from rlhf_cli.runtime.engine import (
    Engine,
    gathered_state_dict,
)
from rlhf_cli.runtime.flops import flops_per_token, measured_peak_flops
from rlhf_cli.runtime.metrics import MetricsLog
from rlhf_cli.runtime.plots import plot_losses
from rlhf_cli.runtime.process import RankProcess
from rlhf_cli.runtime.progress import Display
from rlhf_cli.schema import SftConfig, to_dict


def run(config: SftConfig, run_dir: Path, process: RankProcess) -> None:
    """One rank of the stage, from joining the others to leaving them."""
    ranks = init(config.launch.timeout)
    fine_tune(config, run_dir, process, ranks)
    shutdown()


def fine_tune(config: SftConfig, run_dir: Path, process: RankProcess, ranks: Ranks) -> dict[str, float]:
    """Train as the config says. Returns the final figures, which are also in the manifest; {} when interrupted."""
    run = open_run(config, run_dir, process, ranks)
    text = load_text(config, run_dir, run)
    data = load_data(config, text, run)
    run.update_manifest(template=text.template.name, data=data.info)
    run.say(describe_template(text.template, data))

    dtype = resolve_dtype(config.model.dtype, run.ranks.device)
    checkpoints = Checkpoints(run, {})
    found = checkpoints.newest()
    model = build_model(config, text, dtype, run, found)
    if config.model.trainable.mode == "lisa":
        checkpoints.extras[WEIGHTS] = whole_weights(config, model, text)
    engine, state = make_or_resume(config, model, dtype, checkpoints, run, found, data.digest)

    objective = LanguageModelObjective(config, data, text, run)
    trackers = open_trackers(config, engine.module, dtype, run, state.step)
    hooks = Hooks(
        partial(redraw_lisa, config=config, dtype=dtype, run=run),
        checkpoints.save,
        lambda engine, step: save_best(run, engine, step, only_trainable=config.model.trainable.mode != "lisa"),
    )
    process.watch.loop_started()
    work = Work(objective, objective.total_steps, config.train, config.optim)
    engine, ending = train(engine, work, state, run.ranks, process.watch, trackers, hooks)
    if trackers.log is not None:
        trackers.log.close()
    if ending == "interrupted":
        run.say(f"interrupted after step {state.step}; the same command goes on from there")
        close_run(run, status="interrupted")
        return {}
    return finish(config, engine, text, state, run, ending == "early_stopped")


def dry_run(config: SftConfig, world_size: int) -> None:
    """Open data and model for a job of `world_size` ranks and print what it would do. Weights are not loaded."""
    with tempfile.TemporaryDirectory() as scratch:
        text = load_text(config, Path(scratch), None)
    data = prepare(config.data, text.tokenizer, tokenizer_digest(text.tokenizer), text.template, print)
    architecture = model_config(config, text)
    check_length(architecture, config.data.max_length)
    # Several ranks are several GPUs, also when they are planned on a machine without.
    planned = plan_run(config, data, architecture, world_size, for_gpu=torch.cuda.is_available() or world_size > 1)
    Display(sys.stdout, "none", "sft").table("rlhf sft --dry-run: nothing was started", planned.rows)


# --- figures and the end


def open_trackers(config: SftConfig, model: nn.Module, dtype: torch.dtype, run: Run, step: int) -> Trackers:
    """Where figures go: files and the terminal on rank 0."""
    peak = measured_peak_flops(run.ranks.device, dtype)
    log = (
        MetricsLog(run.run_dir, config.logging, step, run.run_dir.name, to_dict(config)) if run.ranks.is_main else None
    )
    return Trackers(log, run.display, flops_per_token(*multiplied_parameters(model)), peak)


def multiplied_parameters(model: nn.Module) -> ParameterCount:
    """Parameters without the input embeddings, which are looked up, unless they are also the output head (tied)."""
    counted, plain = count_parameters(model), plain_model(model)
    if plain.config.get_text_config().tie_word_embeddings:
        return counted
    looked_up = count_parameters(plain.get_input_embeddings())
    return ParameterCount(counted.trainable - looked_up.trainable, counted.total - looked_up.total)


def finish(
    config: SftConfig, engine: Engine, text: Text, state: LoopState, run: Run, early_stopped: bool
) -> dict[str, float]:
    """Save the model (the best one with early stopping), draw the curves, print the summary, close the manifest."""
    engine.eval()
    weights = gathered_state_dict(engine, only_trainable=config.lora.enabled)
    use_best = config.train.early_stopping.patience > 0 and state.best_step is not None
    figures = dict(state.last_eval)
    if use_best and state.best_loss is not None:
        figures |= {"eval_loss": state.best_loss, "eval_perplexity": math.exp(min(state.best_loss, 700.0))}
        figures["best_step"] = float(state.best_step or 0)
    figures |= {"steps": float(state.step), "tokens": float(state.tokens), "seconds": round(state.seconds, 3)}
    if run.ranks.is_main:
        if use_best and state.best_step is not None:
            put(weights, load_best(run.run_dir, state.best_step))
        write_model(config, engine.module, weights, text, run.run_dir / "model")
        prune_best(run.run_dir)
        plot = plot_losses(run.run_dir, f"rlhf sft: {run.run_dir.name}")
        figures |= last_logged(run.run_dir)
        assert run.display is not None
        run.display.stop()
        if early_stopped:
            run.say(f"stopped early after step {state.step}; the best evaluation was after step {state.best_step}")
        rows = [(name, f"{value:,.4f}".rstrip("0").rstrip(".")) for name, value in figures.items()]
        run.display.table("rlhf sft", [*rows, ("model", str(run.run_dir / "model")), ("plot", str(plot))])
    kind = ("adapter", "peft") if config.lora.enabled else ("policy", "hf")
    output = {"kind": kind[0], "task": "causal_lm", "path": "model", "format": kind[1]}
    close_run(run, status="complete", output=output, metrics=figures)
    return figures


def put(weights: dict[str, torch.Tensor], best: dict[str, torch.Tensor]) -> None:
    """Replace values in place, so that names that share a tensor (tied embeddings) change together."""
    for name, value in best.items():
        weights[name].copy_(value)


def last_logged(run_dir: Path) -> dict[str, float]:
    """The training loss and speed of the last logged step."""
    from rlhf_cli.runtime.metrics import read_metrics

    lines = list(read_metrics(run_dir))
    wanted = ("loss", "perf/tokens_per_s", "perf/peak_memory_gb", "perf/mfu")
    return {name: lines[-1][name] for name in wanted if lines and name in lines[-1]}
