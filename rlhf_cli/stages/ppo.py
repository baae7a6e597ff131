"""`rlhf ppo`: a policy learns from the scores of what it writes."""

from __future__ import annotations

from pathlib import Path

import torch

from rlhf_cli.align import checkpoints
from rlhf_cli.align.evaluate import open_evaluation
from rlhf_cli.align.loop import Loop
from rlhf_cli.align.opening import check_data, final_figures, load_prompts, open_collector, open_log, show_end
from rlhf_cli.assemble import Text, pretrained_text
from rlhf_cli.data.dataset import prepare
from rlhf_cli.data.prompts import prepare_prompts
from rlhf_cli.errors import RunFailed
from rlhf_cli.models.tokenizer import tokenizer_digest
from rlhf_cli.ppo.iteration import iterate
from rlhf_cli.ppo.models import Models, open_models
from rlhf_cli.ppo.plan import print_plan
from rlhf_cli.ppo.ptx import PtxTerm
from rlhf_cli.ppo.state import PpoState
from rlhf_cli.run import Run, close_run, load_best, open_run, prune_best
from rlhf_cli.runtime.distributed import Ranks, init, local_first, shutdown
from rlhf_cli.runtime.flops import measured_peak_flops
from rlhf_cli.runtime.metrics import read_metrics
from rlhf_cli.runtime.plots import plot_policy
from rlhf_cli.runtime.process import RankProcess
from rlhf_cli.schema import DataConfig, PpoConfig

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
    found = checkpoints.newest(run, PpoState)
    state = found.state if found is not None else PpoState(digest, kl_coef=config.ppo.kl_coef)
    check_data(state, digest, run_dir)
    models = open_models(config, text, run, found.path if found is not None else None)
    if found is not None:
        checkpoints.load(found.path, models, run)
    collector = open_collector(config, models, prompts.train, run)
    evaluation = open_evaluation(config, prompts.eval, models, run)
    log = open_log(state, run, resumed=found is not None)
    peak = measured_peak_flops(ranks.device, models.dtype) * ranks.world_size
    process.watch.loop_started()
    turn = lambda: iterate(collector, config, models, state, ptx, peak)
    ending = Loop(collector, evaluation, turn, log, keeps_best=config.ppo.alarms.action == "stop").run(state)
    if log is not None:
        log.close()
    if ending == "interrupted":
        run.say(f"interrupted after iteration {state.iteration}; the same command goes on from there")
        close_run(run, status="interrupted")
        return {}
    return finish(models, state, run)


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
    figures = final_figures(state, use_best)
    if run.ranks.is_main:
        prune_best(run.run_dir)
        lines = [line for line in read_metrics(run.run_dir) if "objective/scores" in line]
        figures |= {name: lines[-1][name] for name in SHOWN if lines and name in lines[-1]}
        show_end(run, figures, plot_policy(run.run_dir, f"rlhf ppo: {run.run_dir.name}"))
    close_run(run, status="complete", output=output, metrics=figures)
    return figures


def dry_run(config: PpoConfig, world_size: int) -> None:
    """Print what a job of `world_size` ranks would do. Weights are not loaded."""
    text = pretrained_text(config.model, config.data.template)
    prompts = prepare_prompts(config.data, text.tokenizer, text.template, print)
    print_plan(config, text, prompts, world_size, for_gpu=torch.cuda.is_available() or world_size > 1)
