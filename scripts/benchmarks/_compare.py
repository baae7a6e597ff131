"""What the benchmarks of all stages share: options, surroundings, programs that take turns."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import _mfu
import _ours
import _table
from _probe import Probe
from _process import run_quietly

HERE = Path(__file__).resolve().parent
TORCH = "2.13.0"  # the same in both environments, so that kernels do not differ
Job = dict[str, Any]


class Variant(NamedTuple):
    """program: ours | trl | plain; settings: what differs from the common job."""

    program: str
    settings: dict[str, Any]


# --- options


def shape_options(parser: argparse.ArgumentParser, lengths: Mapping[str, int]) -> None:
    """Model and data. lengths: the options that say how long texts are, with their defaults."""
    shape = parser.add_argument_group("model and data")
    common = {"hidden": 512, "layers": 8, "heads": 8, "vocab": 16384, "max-length": 512}
    for name, default in (common | dict(lengths) | {"seed": 0}).items():
        shape.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")


def work_options(parser: argparse.ArgumentParser, variants: Mapping[str, Variant]) -> None:
    """Training, what is compared, and where things are kept."""
    work = parser.add_argument_group("training")
    for name, default in (("steps", 8), ("skip", 2), ("global-batch", 32), ("micro-batch", 8), ("threads", 2)):
        work.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    work.add_argument("--lr", type=float, default=1e-4, help="default 1e-4")
    work.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--variants", default=",".join(variants), help=f"from {', '.join(variants)}; empty for none")
    parser.add_argument("--runs", type=int, default=3, help="runs of each variant, in turn; default 3")
    parser.add_argument("--no-scaling", dest="scaling", action="store_false", help="leave 1 -> 2 ranks out")
    parser.add_argument(
        "--gpu", nargs="*", metavar="SHAPE", choices=list(_mfu.SHAPES), help="1b 7b, or tiny (any machine)"
    )
    parser.add_argument("--trl-env", type=Path, help="virtual environment with TRL; made when it is not there")
    parser.add_argument("--trl", default="trl", help="what pip installs there, e.g. trl==1.16.0; default the newest")
    parser.add_argument("--work", type=Path, help="keep model, data and run directories here")
    parser.add_argument("--json", type=Path, help="write all figures to this file")


def parse(parser: argparse.ArgumentParser, variants: Mapping[str, Variant]) -> argparse.Namespace:
    """The options, checked; `variants` among them as a list."""
    options = parser.parse_args()
    options.variants = [name for name in options.variants.split(",") if name]
    if unknown := [name for name in options.variants if name not in variants]:
        parser.error(f"--variants: no {', '.join(unknown)}; allowed: {', '.join(variants)}")
    if not 0 < options.skip < options.steps:
        parser.error(f"--skip: {options.skip} of {options.steps} steps; allowed: 1 to {options.steps - 1}")
    return options


# --- surroundings


def environment(options: argparse.Namespace, work: Path) -> dict[str, str]:
    """The same variables for every process: threads, no network, caches of their own."""
    env = os.environ | {
        "OMP_NUM_THREADS": str(options.threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(work / "hf"),
        "RLHF_CACHE": str(work / "cache"),
        "PYTHONPATH": str(_ours.ROOT),
    }
    if options.gpu is None:
        env["CUDA_VISIBLE_DEVICES"] = ""
    return env


def make_material(options: argparse.Namespace, job: Job, env: dict[str, str], out: Path, work: Path) -> None:
    """Model and rows under `out`, made in a process of their own: this one stays small."""
    shared = {
        "out": str(out), "seed": options.seed, "vocab": options.vocab, "hidden": options.hidden,
        "layers": options.layers, "heads": options.heads, "max_length": options.max_length, "weights": True,
    }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    run_quietly([sys.executable, HERE / "_material.py", json.dumps(shared | job)], env, work)


def training_job(options: argparse.Namespace, stage: str, rows: Path, work: Path) -> Job:
    """What every program trains. rows: in file order, for ours."""
    return {
        "stage": stage, "model": str(work / "model"), "rows": str(rows), "data": str(work / "in_order.jsonl"),
        "max_length": options.max_length, "global_batch": options.global_batch, "micro_batch": options.micro_batch,
        "steps": options.steps, "skip": options.skip, "lr": options.lr, "seed": options.seed, "dtype": options.dtype,
        "packing": False, "checkpointing": False, "defaults": False,
    }  # fmt: skip


def describe(options: argparse.Namespace, parameters: int, rows: str) -> str:
    """The heading of the tables: what ran, on what. rows: in words."""
    return (
        f"Llama hidden {options.hidden}, {options.layers} layers, vocabulary {options.vocab},"
        f" {parameters / 1e6:.0f} M parameters; {options.dtype}; {rows};"
        f" global batch {options.global_batch}, micro-batch {options.micro_batch};"
        f" {options.steps} steps, the first {options.skip} left out; {options.runs} runs, in turn;"
        f" {options.threads} threads on {os.cpu_count()} cores; load average at the start {os.getloadavg()[0]:.1f}"
    )


def backbone_parameters(options: argparse.Namespace) -> int:
    """Weights of the matrices of the compared model, without its head."""
    width = -(-8 * options.hidden // 3 // 32) * 32  # as rlhf_cli.models.scratch.gated_width
    return options.layers * (4 * options.hidden**2 + 3 * options.hidden * width) + options.vocab * options.hidden


# --- programs


def run_all(
    options: argparse.Namespace,
    jobs: Mapping[str, tuple[str, Job]],
    job: Job,
    env: dict[str, str],
    work: Path,
    parameters: int,
    samples: str | None = None,
) -> None:
    """What the options ask for: all variants side by side (see compare), one rank against two on `job`."""
    figures: dict[str, Any] = {}
    if jobs:
        figures["comparison"] = compare(options, jobs, env, work, parameters, samples)
    if options.scaling:
        figures["scaling"] = scale(options, job, env, work)
    finish(options, figures)


def compare(
    options: argparse.Namespace,
    jobs: Mapping[str, tuple[str, Job]],
    env: dict[str, str],
    work: Path,
    parameters: int,
    samples: str | None = None,
) -> dict[str, Any]:
    """All variants in turn, `runs` times. Prints the table, returns every probe.

    jobs: (program, its job) of each variant by name. samples: as in _table.comparison.
    """
    python = trl_python(options, work) if any(p == "trl" for p, _ in jobs.values()) else Path(sys.executable)
    imports = {
        job["stage"]: _ours.imports_mib(job["stage"], env) for program, job in jobs.values() if program == "ours"
    }
    probes: dict[str, list[Probe]] = {name: [] for name in jobs}
    for run in range(options.runs):
        for name, (program, job) in jobs.items():
            print(f"run {run + 1}: {name}", file=sys.stderr, flush=True)
            probe = run_program(program, job, env, work, python)
            if program == "ours":
                probe.imports_mib = imports[job["stage"]]
            probes[name].append(probe)
    rows = [_table.summarise(name, found, options.skip) for name, found in probes.items()]
    versions = {name: found[0].versions.get(name) for found in probes.values() for name in found[0].versions}
    print(f"\n{', '.join(f'{k} {v}' for k, v in sorted(versions.items()))}\n")
    print(_table.comparison(rows, "trl", parameters, samples))
    return {name: [asdict(probe) for probe in found] for name, found in probes.items()}


def run_program(program: str, job: Job, env: dict[str, str], work: Path, trl: Path) -> Probe:
    """One run of one program in processes of its own."""
    if program == "ours":
        return _ours.run_ours(job, env, work / "run")
    job = job | {"result": str(work / "result.json")}
    python = trl if program == "trl" else Path(sys.executable)
    run_quietly([python, HERE / f"_{program}.py", json.dumps(job)], env, work)
    return Probe(**json.loads(Path(job["result"]).read_text(encoding="utf-8")))


def scale(options: argparse.Namespace, job: Job, env: dict[str, str], work: Path) -> dict[str, Any]:
    """One rank against two, one thread each."""
    env = env | {"OMP_NUM_THREADS": "1"}
    imports = _ours.imports_mib(job["stage"], env)
    probes: dict[int, list[Probe]] = {1: [], 2: []}
    for run in range(options.runs):
        for ranks, found in probes.items():
            print(f"run {run + 1}: {ranks} rank(s)", file=sys.stderr, flush=True)
            found.append(_ours.run_ours(job, env, work / "run", ranks))
            found[-1].imports_mib = imports
    one, two = (_table.summarise(f"{ranks} ranks", found, options.skip) for ranks, found in probes.items())
    print(f"\nrlhf {job['stage']}, one thread per rank\n")
    print(_table.scaling(one, two))
    return {str(ranks): [asdict(probe) for probe in found] for ranks, found in probes.items()}


def gpu_shapes(options: argparse.Namespace) -> dict[str, _mfu.Shape]:
    """The shapes to measure MFU at; none without CUDA, which is said."""
    from rlhf_cli.launch.devices import visible_gpus

    names = options.gpu or ["1b", "7b"]
    if not visible_gpus() and names != ["tiny"]:
        print("no CUDA device is visible: MFU is not measured")
        return {}
    return {name: _mfu.SHAPES[name] for name in names}


def finish(options: argparse.Namespace, figures: dict[str, Any]) -> None:
    """The machine's load, and all figures as JSON."""
    print(f"\nload average at the end: {os.getloadavg()[0]:.1f}")
    figures["options"] = {k: str(v) for k, v in vars(options).items()}
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1), encoding="utf-8")


def trl_python(options: argparse.Namespace, work: Path) -> Path:
    """The interpreter of an environment with TRL and our torch; makes the environment when it is not there."""
    home = options.trl_env or work / "trl-env"
    python = home.expanduser().absolute() / "bin" / "python"
    if not python.is_file():
        print(f"installing {options.trl} into {home}", file=sys.stderr, flush=True)
        run_quietly([sys.executable, "-m", "venv", home], os.environ, work)
        run_quietly([python, "-m", "pip", "install", options.trl, f"torch=={TORCH}"], os.environ, work)
    return python
