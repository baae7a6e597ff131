"""`rlhf ppo`: a policy learns from the scores of what it writes."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from rlhf_cli.assemble import Text, pretrained_text
from rlhf_cli.data.dataset import prepare
from rlhf_cli.data.prompts import PreparedPrompts, prepare_prompts, prompt_order
from rlhf_cli.data.templates import Template
from rlhf_cli.errors import CheckpointError, RunFailed
from rlhf_cli.models.tokenizer import tokenizer_digest
from rlhf_cli.ppo import checkpoints
from rlhf_cli.ppo.collect import Collector
from rlhf_cli.ppo.evaluate import open_evaluation
from rlhf_cli.ppo.loop import Loop
from rlhf_cli.ppo.models import Models, open_models
from rlhf_cli.ppo.plan import print_plan
from rlhf_cli.ppo.ptx import PtxTerm
from rlhf_cli.ppo.state import PpoState
from rlhf_cli.reward.answers import writer_of
from rlhf_cli.reward.rules import Rules
from rlhf_cli.run import Run, close_run, load_best, open_run, prune_best
from rlhf_cli.runtime.distributed import Ranks, broadcast_object, init, local_first, shutdown
from rlhf_cli.runtime.flops import measured_peak_flops
from rlhf_cli.runtime.metrics import MetricsLog, read_metrics
from rlhf_cli.runtime.plots import plot_policy
from rlhf_cli.runtime.process import RankProcess
from rlhf_cli.schema import DataConfig, PpoConfig, to_dict

SHOWN = (
    "objective/scores", "objective/kl", "objective/rlhf_reward", "policy/entropy_avg", "text/length", "text/distinct_2",
    "perf/samples_per_s", "perf/tokens_per_s", "perf/peak_memory_gb", "perf/mfu",
)  # fmt: skip


def run(config: PpoConfig, run_dir: Path, process: RankProcess) -> None:
    """One rank of the stage, from joining the others to leaving them."""
    ranks = init(config.launch.timeout)
    align(config, run_dir, process, ranks)
    shutdown()


def align(config: PpoConfig, run_dir: Path, process: RankProcess, ranks: Ranks) -> dict[str, float]:
    """Train as the config says. Returns the final figures, which are also in the manifest; {} when interrupted."""
    run = open_run(config, run_dir, process, ranks)
    text = pretrained_text(config.model, config.data.template)
    prompts = load_prompts(config, text.tokenizer, text.template, run)
    for option in [*config.generation.filters, *config.reward.discarding]:
        run.say(f"warning: with {option} texts are not drawn from the policy itself, and KL is estimated with a bias")
    ptx, ptx_digest = open_ptx(config, text, run)
    digest = prompts.digest + ptx_digest
    found = checkpoints.newest(run)
    state = found.state if found is not None else PpoState(config.ppo.kl_coef, digest)
    if state.data_digest != digest:
        raise CheckpointError(
            f"the data has changed since {run_dir} was started; put it back, or start in another run_dir"
        )
    models = open_models(config, text, run, found.path if found is not None else None)
    if found is not None:
        checkpoints.load(found.path, models, run)
    order = prompt_order(len(prompts.train), config.train.seed)
    writer = writer_of(text.tokenizer, text.template)
    collector = Collector(config, models, prompts.train, order, Rules(config.reward.rules), writer, run)
    evaluation = open_evaluation(config, prompts.eval, models, run)
    log = open_log(state, run, resumed=found is not None)
    peak = measured_peak_flops(ranks.device, models.dtype) * ranks.world_size
    flops = lambda written, in_all: models.work(written, in_all) / peak
    process.watch.loop_started()
    ending = Loop(collector, evaluation, ptx, log, flops).run(state)
    if log is not None:
        log.close()
    if ending == "interrupted":
        run.say(f"interrupted after iteration {state.iteration}; the same command goes on from there")
        close_run(run, status="interrupted")
        return {}
    return finish(models, state, run)


def load_prompts(config: PpoConfig, tokenizer: object, template: Template, run: Run) -> PreparedPrompts:
    """The prompts, read and tokenised by rank 0 for all; the manifest gets what was dropped of them."""
    mine = prepare_prompts(config.data, tokenizer, template, run.say) if run.ranks.is_main else None
    prompts = broadcast_object(mine)
    assert prompts is not None
    run.update_manifest(template=template.name, data=prompts.info)
    return prompts


def open_ptx(config: PpoConfig, text: Text, run: Run) -> tuple[PtxTerm | None, str]:
    """Pretraining text beside the prompts, if its loss has a weight, and the digest of its tokens."""
    settings = config.ppo.ptx
    if settings.coef == 0:
        return None, ""
    with local_first(run.ranks):  # the others find its tokens in the cache
        report = run.say if run.ranks.is_main else print
        data = DataConfig(**vars(settings.data))
        prepared = prepare(data, text.tokenizer, tokenizer_digest(text.tokenizer), text.template, report)
    flatten = settings.data.packing and config.model.attn_implementation.startswith("flash")
    return PtxTerm(prepared.train, settings, config.train.seed, flatten), prepared.digest


def open_log(state: PpoState, run: Run, resumed: bool) -> MetricsLog | None:
    """metrics.jsonl and trackers, cut back to what the state has behind it."""
    if not run.ranks.is_main:
        return None
    written = state.iteration - (state.line is not None) if resumed else -1  # a new run evaluates before iteration 1
    return MetricsLog(run.run_dir, run.config.logging, written, run.run_dir.name, to_dict(run.config))


def finish(models: Models, state: PpoState, run: Run) -> dict[str, float]:
    """Save the policy (the best one when an alarm ended the run) and the critic, draw curves, close the manifest."""
    use_best = state.halted and state.best_step is not None
    if use_best:
        run.say(f"ended by an alarm after iteration {state.iteration}; the best evaluation was after {state.best_step}")
    best = None  # only rank 0 needs the weights, but every rank has to know that there are some
    if use_best:
        best = load_best(run.run_dir, state.best_step or 0) if run.ranks.is_main else {}
    try:
        output = models.save(run.run_dir, best)
    except RunFailed as error:
        checkpoints.save(models, state, run)
        raise RunFailed(f"{error}. A checkpoint of the last iteration is kept: make room, and start again") from error
    figures = dict(state.best_eval if use_best else state.last_eval)
    if use_best:
        figures["best_iteration"] = float(state.best_step or 0)
    if "eval_loss" in state.last_eval:
        figures["alignment_tax"] = figures["eval_loss"] - state.first_eval["eval_loss"]
    if "eval_reward" in state.last_eval:
        figures["eval_reward_before"] = state.first_eval["eval_reward"]
    figures |= {
        "iterations": float(state.iteration), "optimizer_steps": float(state.steps), "episodes": float(state.episodes),
        "tokens": float(state.tokens), "seconds": round(state.seconds, 3),
    }  # fmt: skip
    if run.ranks.is_main:
        prune_best(run.run_dir)
        lines = [line for line in read_metrics(run.run_dir) if "objective/scores" in line]
        figures |= {name: lines[-1][name] for name in SHOWN if lines and name in lines[-1]}
        show(run, figures)
    close_run(run, status="complete", output=output, metrics=figures)
    return figures


def show(run: Run, figures: dict[str, float]) -> None:
    """The last words in the terminal, and the curves."""
    curves = plot_policy(run.run_dir, f"rlhf ppo: {run.run_dir.name}")
    assert run.display is not None
    run.display.stop()
    rows = [(name, f"{value:,.4f}".rstrip("0").rstrip(".")) for name, value in figures.items() if math.isfinite(value)]
    rows += [("model", str(run.run_dir / "model"))] + ([("plot", str(curves))] if curves is not None else [])
    run.display.table("rlhf ppo", rows)


def dry_run(config: PpoConfig, world_size: int) -> None:
    """Print what a job of `world_size` ranks would do. Weights are not loaded."""
    text = pretrained_text(config.model, config.data.template)
    prompts = prepare_prompts(config.data, text.tokenizer, text.template, print)
    print_plan(config, text, prompts, world_size, for_gpu=torch.cuda.is_available() or world_size > 1)
