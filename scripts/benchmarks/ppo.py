#!/usr/bin/env python3
"""Speed and memory of `rlhf ppo`, side by side with TRL's last PPOTrainer (trl.experimental.ppo of TRL 1.9.0).

    python scripts/benchmarks/ppo.py --trl-env ~/trl19-env               responses of full length, on CPU
    python scripts/benchmarks/ppo.py --trl-env ~/trl19-env --ragged      prompts and responses of different lengths
    python scripts/benchmarks/ppo.py --mini-batches 4 --runs 1 --json figures.json
    python scripts/benchmarks/ppo.py --quick                             tiny, ours only: a minute, to see that it works

All programs align the same random Llama on the same prompts in the same order with the same reward model, from which
the critic starts, too; batches, epochs, learning rate and threads are the same; one after the other, several times in
turn. A reward adapter is trained (one step) and merged with `rlhf rm` and `rlhf merge-lora` for it: hydra takes the
adapter, everything else the merged model. Prints a Markdown table, writes all figures as JSON. Speed is responses per
second of wall clock between the ends of iterations, the first left out; memory is the most that the training process
held by the end of its last iteration, less what its imports take. The programs sample with noise of their own, so the
first scores agree only within their standard error, and KL is 0 in the first iteration; ends with 1 where it is not so.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import _compare  # noqa: E402
import _ours  # noqa: E402
import _ppo_table  # noqa: E402
from _compare import Job, Variant  # noqa: E402
from _probe import Probe  # noqa: E402
from _process import directory, run_quietly  # noqa: E402

VARIANTS = {
    "ours": Variant("ours", {}),
    "ours-lora": Variant("ours", {"overrides": ["lora=r16"]}),
    "ours-hydra": Variant("ours", {"overrides": ["lora=r16", "ppo.sharing=hydra"], "reward_run": "adapter"}),
    "trl": Variant("trl", {}),
    "trl-lora": Variant("trl", {"lora": True}),  # adapters for the policy; the critic is trained in full
    "trl-defaults": Variant("trl", {"defaults": True}),  # gradient checkpointing, bf16 autocast
}
SIZES = {"hidden": 256, "layers": 6, "heads": 4, "vocab": 4096, "prompt": 64, "response": 64}
WORK = {"batch": 64, "micro-batch": 8, "epochs": 4, "mini-batches": 1, "steps": 4, "skip": 1, "runs": 3}
RAGGED = 1 / 3  # mean length / longest length: that of the pairs in rm.py, and nearly that of the documents in sft.py
# Names of ours for what _ppo_trl notes of an iteration.
FIGURES = {
    "scores": "objective/scores", "scores_std": "objective/scores_std", "kl": "objective/kl", "length": "text/length",
    "value_loss": "loss/value_avg", "optimizer_steps": "optimizer_steps", "generate_s": "perf/generate_s",
    "score_s": "perf/score_s", "train_s": "perf/train_s",
}  # fmt: skip
QUICK = {
    "hidden": 32, "layers": 2, "heads": 2, "vocab": 600, "prompt": 12, "response": 12, "batch": 16, "micro_batch": 4,
    "epochs": 2, "steps": 2, "runs": 1, "variants": "ours,ours-hydra",
}  # fmt: skip


def main() -> int:
    options = parse()
    with directory(options.work) as work:
        env = _compare.environment(options, work) | {"TRL_EXPERIMENTAL_SILENCE": "1"}
        make_material(options, env, work)
        print(describe(options), flush=True)
        jobs = {name: (VARIANTS[name].program, job_of(options, name, work)) for name in options.variants}
        probes = compare(options, jobs, env, work)
        rows = [_ppo_table.summarise(name, found, options.skip) for name, found in probes.items()]
        versions = {name: found[0].versions.get(name) for found in probes.values() for name in found[0].versions}
        print(f"\n{', '.join(f'{k} {v}' for k, v in sorted(versions.items()))}\n")
        print(_ppo_table.table(rows, "trl"))
        doubts = _ppo_table.disagreements(rows, options.batch)
        print("".join(f"\nVOID: {doubt}" for doubt in doubts))
        figures = {name: [asdict(probe) for probe in found] for name, found in probes.items()}
        _compare.finish(options, {"comparison": figures, "disagreements": doubts})
    return 1 if doubts else 0


# --- options


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (SIZES | WORK | {"seed": 0, "threads": 2}).items():
        about = "iterations; default" if name == "steps" else "default"
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{about} {default}")
    parser.add_argument("--lr", type=float, default=1e-5, help="default 1e-5")
    parser.add_argument("--ragged", action="store_true", help="a third of these lengths on average, all different")
    parser.add_argument("--variants", default="ours,ours-hydra,trl", help=f"from {', '.join(VARIANTS)}")
    parser.add_argument("--trl-env", type=Path, help="virtual environment with TRL; made when it is not there")
    parser.add_argument("--trl", default="trl[peft]==1.9.0", help="what pip installs there; 1.9.0 has the last PPO")
    parser.add_argument("--work", type=Path, help="keep model, data and run directories here")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, our programs only")
    if parser.parse_known_args()[0].quick:
        parser.set_defaults(**QUICK)
    parser.set_defaults(gpu=None)  # what _compare.environment asks for
    options = _compare.parse(parser, VARIANTS)
    if options.batch % (options.micro_batch * options.mini_batches):
        parser.error("--batch must be a multiple of --micro-batch x --mini-batches")
    return options


def describe(options: argparse.Namespace) -> str:
    """The heading of the table: what ran, on what."""
    up_to = "up to " if options.ragged else ""
    return (
        f"Llama hidden {options.hidden}, {options.layers} layers, vocabulary {options.vocab}; fp32;"
        f" prompts of {up_to}{options.prompt} tokens, responses of up to {options.response};"
        f" {options.batch} responses per iteration, {options.epochs} epochs,"
        f" {options.mini_batches} mini-batches, micro-batch {options.micro_batch};"
        f" {options.steps} iterations, the first {options.skip} left out; {options.runs} runs, in turn;"
        f" {options.threads} threads on {os.cpu_count()} cores; load average at the start {os.getloadavg()[0]:.1f}"
    )


# --- material


def make_material(options: argparse.Namespace, env: dict[str, str], work: Path) -> None:
    """model/, prompts, and a reward model of it: adapter/ and, merged, reward/."""
    names = ("seed", *SIZES)
    job = {name: getattr(options, name) for name in names} | {
        "out": str(work),
        # A pass of its own for accumulation: TRL steps on every micro-batch at the end of the data.
        "prompts": (options.steps + 1) * options.batch,
        "mean_share": RAGGED if options.ragged else None,
    }
    run_quietly([sys.executable, HERE / "_ppo_material.py", json.dumps(job)], env, work)
    for name in ("adapter", "reward"):
        shutil.rmtree(work / name, ignore_errors=True)
    rm = {
        "run_dir": work / "adapter", "model.path": work / "model", "model.dtype": "fp32", "lora": "r16",
        "data.path": work / "pairs.jsonl", "data.format": "paired", "data.template": "none", "train.max_steps": 1,
        "train.global_batch_size": 4, "train.micro_batch_size": 4, "launch.num_processes": 1,
    }  # fmt: skip
    merge = {"run_dir": work / "reward", "merge.adapter": work / "adapter"}
    for stage, settings in (("rm", rm), ("merge-lora", merge)):
        words = [f"{key}={value}" for key, value in (settings | {"logging.progress": "none"}).items()]
        run_quietly([sys.executable, "-m", "rlhf_cli", stage, *words], env, _ours.ROOT)


# --- programs


def job_of(options: argparse.Namespace, name: str, work: Path) -> Job:
    """What one program does."""
    names = ("seed", "response", "batch", "micro_batch", "epochs", "mini_batches", "steps", "lr")
    return {name: getattr(options, name) for name in names} | {
        "model": str(work / "model"), "reward": str(work / "reward" / "model"), "rows": str(work / "prompts.jsonl"),
        "data": str(work / "in_order.jsonl"), "result": str(work / "result.json"), "kl_coef": 0.05, "lora": False,
        "defaults": False, "reward_run": "reward", "overrides": [],
    } | VARIANTS[name].settings  # fmt: skip


def compare(
    options: argparse.Namespace, jobs: dict[str, tuple[str, Job]], env: dict[str, str], work: Path
) -> dict[str, list[Probe]]:
    """All variants in turn, `runs` times."""
    has_trl = any(program == "trl" for program, _ in jobs.values())
    python = _compare.trl_python(options, work) if has_trl else Path(sys.executable)
    imports = _ours.imports_mib("ppo", env)
    probes: dict[str, list[Probe]] = {name: [] for name in jobs}
    for run in range(options.runs):
        for name, (program, job) in jobs.items():
            print(f"run {run + 1}: {name}", file=sys.stderr, flush=True)
            if program == "trl":
                run_quietly([python, HERE / "_ppo_trl.py", json.dumps(job)], env, work)
                probe = Probe(**json.loads(Path(job["result"]).read_text(encoding="utf-8")))
            else:
                probe = run_ours(job, env, work)
                probe.imports_mib = imports
            probes[name].append(probe)
    return probes


def run_ours(job: Job, env: dict[str, str], work: Path) -> Probe:
    """Through the command line, into an empty run directory."""
    run_dir = work / "run"
    shutil.rmtree(run_dir, ignore_errors=True)
    run_quietly(command(job, run_dir, work), env, _ours.ROOT)
    return read_run(run_dir)


def command(job: Job, run_dir: Path, work: Path) -> list[str]:
    """The command line for a job; everything else is the program's default."""
    settings: dict[str, Any] = {
        "run_dir": run_dir,
        "resume": "never",
        "model.path": job["model"],
        "model.dtype": "fp32",
        "data.path": job["rows"],
        "data.format": "text_only",
        "data.template": "none",
        "reward.sources": f"[{{path: {work / job['reward_run']}}}]",
        "generation.max_new_tokens": job["response"],
        "ppo.critic": "reward",
        "ppo.num_iterations": job["steps"],
        "ppo.rollout_batch_size": job["batch"],
        "ppo.ppo_epochs": job["epochs"],
        "ppo.num_mini_batches": job["mini_batches"],
        "ppo.kl_coef": job["kl_coef"],
        "optim.lr": job["lr"],
        "optim.schedule": "constant",
        "train.micro_batch_size": job["micro_batch"],
        "train.seed": job["seed"],
        "launch.num_processes": 1,
        "logging.progress": "none",
    }
    words = [f"{key}={value}" for key, value in settings.items()]
    return [sys.executable, "-m", "rlhf_cli", "ppo", *words, *job["overrides"]]


def read_run(run_dir: Path) -> Probe:
    """Times from TensorBoard's file, so that logging is counted; the rest from metrics.jsonl."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if "objective/kl" in line]
    figures = [{ours: line[name] for ours, name in FIGURES.items()} for line in lines]
    for line, found in zip(lines, figures, strict=True):
        found["nats_per_token"] = line["objective/entropy"] / line["text/length"]
    return Probe(
        peak_mib=max(line["perf/peak_memory_gb"] for line in lines) * 1024,
        times=_ours.wall_times(run_dir / "tensorboard", "objective/kl"),
        tokens=_ours.per_step(lines, "num_tokens"),
        samples=_ours.per_step(lines, "samples"),
        figures=figures,
        versions=json.loads((run_dir / "manifest.json").read_text(encoding="utf-8"))["versions"],
    )


if __name__ == "__main__":
    sys.exit(main())
