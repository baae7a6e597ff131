#!/usr/bin/env python3
"""Memory and time of `rlhf merge-lora`, side by side with PEFT's merge_and_unload.

    python scripts/benchmarks/merge.py                                a random Llama of 1.4 GB in bf16, in five files
    python scripts/benchmarks/merge.py --dtype fp32 --runs 5
    python scripts/benchmarks/merge.py --layers 4 --hidden 512        smaller, to try it

Both merge the same adapter of all linear layers into the same files, one after the other, several times in turn, each
in a process of its own, and write files of the same size. Prints a Markdown table, writes all figures as JSON. Memory
is the most that the process held, less what its imports take; seconds are those from the first file that is opened to
the last one that is written (ours: digests of base and adapter included), without imports. The last column compares
the merged weights of both with W + scale·B·A in fp32, rounded once.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE))

from _process import directory, run_quietly  # noqa: E402

# What the worker imports and no work; the model's module would be imported by the work itself.
IMPORTS = """
import rlhf_cli.worker, rlhf_cli.stages.merge_lora
from transformers.models.llama import modeling_llama
from _probe import high_water_mib
print(high_water_mib())
"""


class Merged(NamedTuple):
    """One run of one program. memory_mib: peak above imports."""

    seconds: float
    memory_mib: float


def main() -> int:
    options = parse()
    with directory(options.work) as work:
        env = environment(options, work)
        make_material(options, env, work)
        size = sum(f.stat().st_size for f in (work / "base").glob("*.safetensors"))
        files = len(list((work / "base").glob("*.safetensors")))
        print(
            f"Llama hidden {options.hidden}, {options.layers} layers, vocabulary {options.vocab}: {size / 1e9:.2f} GB"
            f" in {options.dtype}, {files} files; rank {options.rank}; {options.threads} threads,"
            f" {os.cpu_count()} cores\n"
        )
        imports = imports_mib(env)
        found: dict[str, list[Merged]] = {"rlhf merge-lora": [], "merge_and_unload": []}
        for run in range(options.runs):
            print(f"run {run + 1}", file=sys.stderr, flush=True)
            found["rlhf merge-lora"].append(run_ours(options, env, work, imports))
            found["merge_and_unload"].append(run_peft(options, env, work))
        wrong = {"rlhf merge-lora": share_off(work, "ours/model"), "merge_and_unload": share_off(work, "peft")}
        print(table(found, wrong, size))
        print(f"\nload average at the end: {os.getloadavg()[0]:.1f}")
        if options.json:
            figures = {name: [run._asdict() for run in runs] for name, runs in found.items()}
            text = json.dumps({"options": {k: str(v) for k, v in vars(options).items()}, "runs": figures}, indent=1)
            options.json.write_text(text, encoding="utf-8")
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("hidden", 1536), ("layers", 20), ("vocab", 32000), ("rank", 16), ("seed", 0),
                          ("threads", 2), ("runs", 3)):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="of base and result; default bf16")
    parser.add_argument("--shard", default="300MB", help="size of the files of base and result; default 300MB")
    parser.add_argument("--work", type=Path, help="keep models here")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    options = parser.parse_args()
    if options.runs < 1:
        parser.error(f"--runs: {options.runs}; allowed: 1 or more")
    return options


def environment(options: argparse.Namespace, work: Path) -> dict[str, str]:
    """The same variables for every process."""
    return os.environ | {
        "OMP_NUM_THREADS": str(options.threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(work / "hf"),
        "PYTHONPATH": f"{ROOT}{os.pathsep}{HERE}",
        "CUDA_VISIBLE_DEVICES": "",
    }


def make_material(options: argparse.Namespace, env: dict[str, str], work: Path) -> None:
    """Base and adapter, in a process of their own."""
    names = ("hidden", "layers", "vocab", "rank", "seed", "dtype", "shard")
    job = {name: getattr(options, name) for name in names} | {"out": str(work)}
    for part in ("base", "adapter"):
        shutil.rmtree(work / part, ignore_errors=True)
    run_quietly([sys.executable, HERE / "_merge_material.py", json.dumps(job)], env, work)


def imports_mib(env: dict[str, str]) -> float:
    """Memory of our worker when it has imported everything and done nothing."""
    done = subprocess.run([sys.executable, "-c", IMPORTS], env=env, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def run_ours(options: argparse.Namespace, env: dict[str, str], work: Path, imports: float) -> Merged:
    """Through the command line, into an empty run directory."""
    run_dir = work / "ours"
    shutil.rmtree(run_dir, ignore_errors=True)
    settings = {
        "run_dir": run_dir,
        "merge.adapter": work / "adapter",
        "merge.max_shard_size": options.shard,
        "merge.verify": "never",
        "logging.progress": "none",
    }
    words = [f"{key}={value}" for key, value in settings.items()]
    run_quietly([sys.executable, "-m", "rlhf_cli", "merge-lora", *words], env, work)
    figures = json.loads((run_dir / "manifest.json").read_text(encoding="utf-8"))["metrics"]
    return Merged(figures["seconds"], figures["perf/peak_memory_gb"] * 1024 - imports)


def run_peft(options: argparse.Namespace, env: dict[str, str], work: Path) -> Merged:
    """PEFT's way."""
    shutil.rmtree(work / "peft", ignore_errors=True)
    job = {name: str(work / name) for name in ("base", "adapter")}
    job |= {"out": str(work / "peft"), "shard": options.shard, "result": str(work / "peft.json")}
    run_quietly([sys.executable, HERE / "_merge_peft.py", json.dumps(job)], env, work)
    figures: dict[str, Any] = json.loads((work / "peft.json").read_text(encoding="utf-8"))
    return Merged(figures["seconds"], figures["peak_mib"] - figures["imports_mib"])


def share_off(work: Path, merged: str) -> float:
    """Share of the weights of three layers that are not W + scale·B·A in fp32, rounded once."""
    import torch
    from safetensors import safe_open

    def read(folder: Path, name: str) -> torch.Tensor:
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, framework="pt") as opened:
                if name in opened.keys():  # noqa: SIM118  not a mapping
                    return opened.get_tensor(name)
        raise SystemExit(f"{folder} has no {name}")

    settings = json.loads((work / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    off = total = 0
    for module in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj"):
        name = f"model.layers.0.{module}"
        a, b = (read(work / "adapter", f"base_model.model.{name}.lora_{side}.weight").float() for side in "AB")
        base = read(work / "base", f"{name}.weight")
        wanted = (base.float() + settings["lora_alpha"] / settings["r"] * (b @ a)).to(base.dtype).float()
        # What fp32 itself leaves open is not counted.
        close = torch.isclose(read(work / merged, f"{name}.weight").float(), wanted, rtol=1e-5, atol=1e-7)
        off, total = off + int((~close).sum()), total + wanted.numel()
    return off / total


def table(found: dict[str, list[Merged]], wrong: dict[str, float], size: int) -> str:
    """A Markdown table of medians; ratios are against PEFT."""
    theirs = found["merge_and_unload"]
    lines = [
        "| program | seconds | ÷ PEFT | peak MiB above imports | ÷ PEFT | ÷ model | weights off fp32's |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, runs in found.items():
        seconds, memory = median(r.seconds for r in runs), median(r.memory_mib for r in runs)
        cells = (
            name,
            f"{seconds:.2f}",
            f"{seconds / median(r.seconds for r in theirs):.2f}",
            f"{memory:,.0f}",
            f"{memory / median(r.memory_mib for r in theirs):.3f}",
            f"{memory * 2**20 / size:.3f}",
            f"{wrong[name]:.2%}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
