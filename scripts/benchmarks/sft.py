#!/usr/bin/env python3
"""Speed and memory of `rlhf sft`, side by side with TRL's SFTTrainer and a plain transformers loop.

    python scripts/benchmarks/sft.py                              the comparison and 1 -> 2 ranks, on CPU
    python scripts/benchmarks/sft.py --variants ours,trl --runs 5
    python scripts/benchmarks/sft.py --trl-env ~/trl-env          keep TRL's environment for the next time
    python scripts/benchmarks/sft.py --gpu                        MFU at 1B and 7B shapes; does nothing without CUDA

All programs train the same random Llama on the same ragged documents in the same order, with the same batches, learning
rate and number of threads, one after the other, several times in turn. Prints Markdown tables, writes all figures as
JSON. Speed is the real tokens (no padding) per second of wall clock between the ends of steps, the first left out;
memory is the most that the training process held by the end of its last step, less what its imports take.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import _mfu  # noqa: E402
import _ours  # noqa: E402
import _table  # noqa: E402
from _probe import Probe  # noqa: E402
from _process import run_quietly  # noqa: E402

TORCH = "2.13.0"  # the same in both environments, so that kernels do not differ


class Variant(NamedTuple):
    """program: ours | trl | plain; settings: what differs from the common job."""

    program: str
    settings: dict[str, Any]


VARIANTS = {
    "ours": Variant("ours", {}),
    "ours+packing": Variant("ours", {"packing": True}),
    "ours+checkpointing": Variant("ours", {"checkpointing": True}),
    "trl": Variant("trl", {}),
    "trl+packing": Variant("trl", {"packing": True}),
    "trl-defaults": Variant("trl", {"defaults": True}),  # gradient checkpointing, bf16 autocast
    "plain": Variant("plain", {}),
}


def main() -> int:
    options = parse()
    with directory(options.work) as work:
        env = environment(options, work)
        if options.gpu is not None:
            return gpu(options, env, work)
        make_material(options, env, work, work)
        print(describe(options), flush=True)
        figures: dict[str, Any] = {"options": {k: str(v) for k, v in vars(options).items()}}
        if options.variants:
            figures["comparison"] = compare(options, env, work)
        if options.scaling:
            figures["scaling"] = scale(options, env, work)
        print(f"\nload average at the end: {os.getloadavg()[0]:.1f}")
        if options.json:
            options.json.write_text(json.dumps(figures, indent=1), encoding="utf-8")
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shape = parser.add_argument_group("model and data")
    for name, default in (("hidden", 512), ("layers", 8), ("heads", 8), ("vocab", 16384), ("max-length", 512),
                          ("min-length", 16), ("median-length", 120), ("seed", 0)):  # fmt: skip
        shape.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    work = parser.add_argument_group("training")
    for name, default in (("steps", 8), ("skip", 2), ("global-batch", 32), ("micro-batch", 8), ("threads", 2)):
        work.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    work.add_argument("--lr", type=float, default=1e-4, help="default 1e-4")
    work.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--variants", default=",".join(VARIANTS), help=f"from {', '.join(VARIANTS)}; empty for none")
    parser.add_argument("--runs", type=int, default=3, help="runs of each variant, in turn; default 3")
    parser.add_argument("--no-scaling", dest="scaling", action="store_false", help="leave 1 -> 2 ranks out")
    parser.add_argument(
        "--gpu", nargs="*", metavar="SHAPE", choices=list(_mfu.SHAPES), help="1b 7b, or tiny (any machine)"
    )
    parser.add_argument("--trl-env", type=Path, help="virtual environment with TRL; made when it is not there")
    parser.add_argument("--trl", default="trl", help="what pip installs there, e.g. trl==1.16.0; default the newest")
    parser.add_argument("--work", type=Path, help="keep model, data and run directories here")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    options = parser.parse_args()
    options.variants = [name for name in options.variants.split(",") if name]
    if unknown := [name for name in options.variants if name not in VARIANTS]:
        parser.error(f"--variants: no {', '.join(unknown)}; allowed: {', '.join(VARIANTS)}")
    if not 0 < options.skip < options.steps:
        parser.error(f"--skip: {options.skip} of {options.steps} steps; allowed: 1 to {options.steps - 1}")
    return options


@contextmanager
def directory(kept: Path | None) -> Iterator[Path]:
    """The place for model, data, runs: what was asked for, or one that is gone afterwards."""
    if kept is not None:
        kept.mkdir(parents=True, exist_ok=True)
        yield kept.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="rlhf-benchmark-") as path:
        yield Path(path)


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


def make_material(options: argparse.Namespace, env: dict[str, str], out: Path, work: Path, **changes: Any) -> None:
    """Model and documents under `out`, made in a process of their own: this one stays small."""
    job = {
        "out": str(out), "seed": options.seed, "vocab": options.vocab, "hidden": options.hidden,
        "layers": options.layers, "heads": options.heads, "min_length": options.min_length,
        "median_length": options.median_length, "max_length": options.max_length, "weights": True,
        "documents": options.steps * options.global_batch,
    } | changes  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    run_quietly([sys.executable, HERE / "_material.py", json.dumps(job)], env, work)


def describe(options: argparse.Namespace) -> str:
    """The heading of the tables: what ran, on what."""
    return (
        f"Llama hidden {options.hidden}, {options.layers} layers, vocabulary {options.vocab},"
        f" {parameter_count(options) / 1e6:.0f} M parameters; {options.dtype}; documents of {options.min_length} to"
        f" {options.max_length} tokens; global batch {options.global_batch}, micro-batch {options.micro_batch};"
        f" {options.steps} steps, the first {options.skip} left out; {options.runs} runs, in turn;"
        f" {options.threads} threads on {os.cpu_count()} cores; load average at the start {os.getloadavg()[0]:.1f}"
    )


def parameter_count(options: argparse.Namespace) -> int:
    """Weights of the matrices of the compared model."""
    width = -(-8 * options.hidden // 3 // 32) * 32  # as rlhf_cli.models.scratch.gated_width
    return options.layers * (4 * options.hidden**2 + 3 * options.hidden * width) + 2 * options.vocab * options.hidden


# --- the parts


def compare(options: argparse.Namespace, env: dict[str, str], work: Path) -> dict[str, Any]:
    """All variants in turn, `runs` times. Prints the table, returns every probe."""
    programs = {VARIANTS[name].program for name in options.variants}
    python = trl_python(options, work) if "trl" in programs else Path(sys.executable)
    imports = _ours.imports_mib(env) if "ours" in programs else 0.0
    probes: dict[str, list[Probe]] = {name: [] for name in options.variants}
    for run in range(options.runs):
        for name in options.variants:
            print(f"run {run + 1}: {name}", file=sys.stderr, flush=True)
            probe = run_variant(VARIANTS[name], common_job(options, work), env, work, python)
            if VARIANTS[name].program == "ours":
                probe.imports_mib = imports
            probes[name].append(probe)
    rows = [_table.summarise(name, found, options.skip) for name, found in probes.items()]
    versions = {name: found[0].versions.get(name) for found in probes.values() for name in found[0].versions}
    print(f"\n{', '.join(f'{k} {v}' for k, v in sorted(versions.items()))}\n")
    print(_table.comparison(rows, "trl", parameter_count(options)))
    return {name: [asdict(probe) for probe in found] for name, found in probes.items()}


def common_job(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """What every program trains."""
    return {
        "model": str(work / "model"), "documents": str(work / "documents.jsonl"), "data": str(work / "in_order.jsonl"),
        "max_length": options.max_length, "global_batch": options.global_batch, "micro_batch": options.micro_batch,
        "steps": options.steps, "skip": options.skip, "lr": options.lr, "seed": options.seed, "dtype": options.dtype,
        "packing": False, "checkpointing": False, "defaults": False,
    }  # fmt: skip


def run_variant(variant: Variant, job: dict[str, Any], env: dict[str, str], work: Path, trl: Path) -> Probe:
    """One run of one program in processes of its own."""
    job = job | variant.settings
    if variant.program == "ours":
        return _ours.run_ours(job, env, work / "run")
    if variant.program == "trl" and job["packing"]:
        job |= packed_batch(job)
    job["result"] = str(work / "result.json")
    python = trl if variant.program == "trl" else Path(sys.executable)
    run_quietly([python, HERE / f"_{variant.program}.py", json.dumps(job)], env, work)
    return Probe(**json.loads(Path(job["result"]).read_text(encoding="utf-8")))


def packed_batch(job: dict[str, Any]) -> dict[str, int]:
    """TRL's batch counts packed rows: as many as hold about the tokens of a global batch of documents."""
    tokens = json.loads(Path(job["documents"]).with_name("tokens.json").read_text(encoding="utf-8"))
    rows = max(1, round(tokens / job["steps"] / job["max_length"]))
    forwards = -(-rows // job["micro_batch"])
    micro = -(-rows // forwards)
    return {"micro_batch": micro, "global_batch": micro * forwards}


def scale(options: argparse.Namespace, env: dict[str, str], work: Path) -> dict[str, Any]:
    """One rank against two, one thread each."""
    env = env | {"OMP_NUM_THREADS": "1"}
    imports = _ours.imports_mib(env)
    probes: dict[int, list[Probe]] = {1: [], 2: []}
    for run in range(options.runs):
        for ranks, found in probes.items():
            print(f"run {run + 1}: {ranks} rank(s)", file=sys.stderr, flush=True)
            found.append(_ours.run_ours(common_job(options, work), env, work / "run", ranks))
            found[-1].imports_mib = imports
    one, two = (_table.summarise(f"{ranks} ranks", found, options.skip) for ranks, found in probes.items())
    print("\nrlhf sft, one thread per rank\n")
    print(_table.scaling(one, two))
    return {str(ranks): [asdict(probe) for probe in found] for ranks, found in probes.items()}


def gpu(options: argparse.Namespace, env: dict[str, str], work: Path) -> int:
    """MFU at the asked shapes."""
    from rlhf_cli.launch.devices import visible_gpus

    names = options.gpu or ["1b", "7b"]
    if not visible_gpus() and names != ["tiny"]:
        print("no CUDA device is visible: MFU is not measured")
        return 0
    for name in names:
        shape = _mfu.SHAPES[name]
        make_material(
            options, env, work / name, work, weights=False, vocab=shape.vocab, max_length=shape.length,
            min_length=shape.length, median_length=shape.length, documents=2 * shape.micro_batch * options.steps,
        )  # fmt: skip
    job = common_job(options, work)
    del job["model"]
    print(_mfu.measure(names, job, env, work))
    return 0


def trl_python(options: argparse.Namespace, work: Path) -> Path:
    """The interpreter of an environment with TRL and our torch; makes the environment when it is not there."""
    home = options.trl_env or work / "trl-env"
    python = home.expanduser().absolute() / "bin" / "python"
    if not python.is_file():
        print(f"installing {options.trl} into {home}", file=sys.stderr, flush=True)
        run_quietly([sys.executable, "-m", "venv", home], os.environ, work)
        run_quietly([python, "-m", "pip", "install", options.trl, f"torch=={TORCH}"], os.environ, work)
    return python


if __name__ == "__main__":
    sys.exit(main())
