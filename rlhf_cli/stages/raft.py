"""`rlhf raft`: a policy learns from the best of what it writes."""

from __future__ import annotations

from pathlib import Path

import torch

from rlhf_cli.align import checkpoints
from rlhf_cli.align.evaluate import open_evaluation
from rlhf_cli.align.loop import Loop
from rlhf_cli.align.opening import check_data, final_figures, load_prompts, open_collector, open_log, show_end
from rlhf_cli.assemble import pretrained_text
from rlhf_cli.data.prompts import prepare_prompts
from rlhf_cli.errors import RunFailed
from rlhf_cli.raft.iteration import iterate
from rlhf_cli.raft.models import Models, open_models
from rlhf_cli.raft.plan import print_plan
from rlhf_cli.raft.state import RaftState
from rlhf_cli.run import Run, close_run, load_best, open_run, prune_best
from rlhf_cli.runtime.distributed import Ranks, init, shutdown
from rlhf_cli.runtime.flops import measured_peak_flops
from rlhf_cli.runtime.metrics import read_metrics
from rlhf_cli.runtime.plots import plot_ranking
from rlhf_cli.runtime.process import RankProcess
from rlhf_cli.schema import RaftConfig

SHOWN = (
    "raft/reward_policy", "raft/reward_selected", "raft/kl", "raft/length", "raft/distinct_2", "raft/discarded", "loss",
    "perf/samples_per_s", "perf/rollout_tokens_per_s", "perf/generate_s", "perf/score_s", "perf/train_s",
    "perf/peak_memory_gb", "perf/mfu",
)  # fmt: skip


def run(config: RaftConfig, run_dir: Path, process: RankProcess) -> None:
    """One rank of the stage, from joining the others to leaving them."""
    ranks = init(config.launch.timeout)
    rank_and_tune(config, run_dir, process, ranks)
    shutdown()


def rank_and_tune(config: RaftConfig, run_dir: Path, process: RankProcess, ranks: Ranks) -> dict[str, float]:
    """Train as the config says. Returns the final figures, which are also in the manifest; {} when interrupted."""
    run = open_run(config, run_dir, process, ranks)
    text = pretrained_text(config.model, config.data.template)
    prompts = load_prompts(config, text.tokenizer, text.template, run)
    for option in config.generation.filters:
        run.say(f"warning: with {option} texts are not drawn from the policy itself, and KL is estimated with a bias")
    if not config.reward.sources:
        run.say("no reward.sources: responses are ranked by their mean token log-probability under the policy itself")
    found = checkpoints.newest(run, RaftState)
    state = found.state if found is not None else RaftState(prompts.digest)
    check_data(state, prompts.digest, run_dir)
    models = open_models(config, text, run, found.path if found is not None else None)
    if found is not None:
        checkpoints.load(found.path, models, run)
    collector = open_collector(config, models, prompts.train, run)
    evaluation = open_evaluation(config, prompts.eval, models, run)
    log = open_log(state, run, resumed=found is not None)
    peak = measured_peak_flops(ranks.device, models.dtype) * ranks.world_size
    process.watch.loop_started()
    turn = lambda: iterate(collector, config, models, state, peak)
    ending = Loop(collector, evaluation, turn, log, keeps_best=prompts.eval is not None).run(state)
    if log is not None:
        log.close()
    if ending == "interrupted":
        run.say(f"interrupted after iteration {state.iteration}; the same command goes on from there")
        close_run(run, status="interrupted")
        return {}
    return finish(models, config, state, run, halted=ending == "halted")


def finish(models: Models, config: RaftConfig, state: RaftState, run: Run, halted: bool) -> dict[str, float]:
    """Save the last policy and the best one, draw curves, close the manifest."""
    if halted:
        run.say(f"ended by an alarm after iteration {state.iteration}; the best evaluation was after {state.best_step}")
    hands_over_best = halted or config.raft.result == "best"
    best = None  # only rank 0 needs the weights, but every rank has to know that there are some
    if state.best_step is not None and state.best_step != state.iteration:
        best = load_best(run.run_dir, state.best_step) if run.ranks.is_main else {}
    try:
        output = models.save(run.run_dir, best, hands_over_best)
    except RunFailed as error:
        checkpoints.save(models, state, run)
        raise RunFailed(f"{error}. A checkpoint of the last iteration is kept: make room, and start again") from error
    figures = final_figures(state, use_best=state.best_step is not None and hands_over_best)
    if run.ranks.is_main:
        prune_best(run.run_dir)
        lines = [line for line in read_metrics(run.run_dir) if "raft/reward_policy" in line]
        figures |= {name: lines[-1][name] for name in SHOWN if lines and name in lines[-1]}
        show_end(run, figures, plot_ranking(run.run_dir, f"rlhf raft: {run.run_dir.name}"))
    close_run(run, status="complete", output=output, metrics=figures)
    return figures


def dry_run(config: RaftConfig, world_size: int) -> None:
    """Print what a job of `world_size` ranks would do. Weights are not loaded."""
    text = pretrained_text(config.model, config.data.template)
    prompts = prepare_prompts(config.data, text.tokenizer, text.template, print)
    print_plan(config, text, prompts, world_size, for_gpu=torch.cuda.is_available() or world_size > 1)
