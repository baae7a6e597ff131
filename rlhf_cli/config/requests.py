"""Checks of a typed config against the machine and its files, before any process starts. Standard library only."""

from __future__ import annotations

import difflib
import glob
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from rlhf_cli.errors import ModelError, Problem
from rlhf_cli.rundir import read_manifest
from rlhf_cli.schema import ModelConfig, SftConfig
from rlhf_cli.schema.stages import grad_accum_steps

HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(:[\w.-]+)?$")
DATA_SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".txt", ".gz")


def check_request(config: SftConfig, world_size: int, has_gpu: bool, weights_needed: bool) -> Iterator[Problem]:
    """Everything that can be known to be wrong without torch: files, batch arithmetic, what a CPU cannot do.

    weights_needed: False for a dry run, which needs a model's config only.
    """
    steps = grad_accum_steps(config.train.global_batch_size, config.train.micro_batch_size, world_size)
    if isinstance(steps, Problem):
        yield steps
    yield from check_data_paths("data.path", config.data.path)
    yield from check_data_paths("data.eval_path", config.data.eval_path)
    if config.model.path:
        yield from check_model_path("model.path", config.model.path, weights_needed)
    if config.model.tokenizer.path:
        yield from check_tokenizer_path(config.model.tokenizer.path)
    if config.logging.wandb and find_spec("wandb") is None:
        yield Problem("logging.wandb", "needs a package that is not installed: pip install 'rlhf-cli[wandb]'")
    if not has_gpu and weights_needed:
        yield from check_cpu(config.model)


def check_cpu(model: ModelConfig) -> Iterator[Problem]:
    """What needs a GPU."""
    if model.quantization == "nf4":
        yield Problem("model.quantization", "nf4 needs a GPU and none is visible; use lora=r16 without quantisation")
    if model.dtype == "fp16":
        yield Problem("model.dtype", "fp16 needs a GPU and none is visible; use fp32 or bf16")
    if model.attn_implementation.startswith("flash"):
        yield Problem(
            "model.attn_implementation", f"{model.attn_implementation} needs a GPU and none is visible; use sdpa"
        )


def check_data_paths(key: str, paths: str | list[str] | None) -> Iterator[Problem]:
    """Local files that are missing or empty; what looks like a hub id is left to the run."""
    for path in [paths] if isinstance(paths, str) else paths or []:
        local = Path(path).expanduser()
        if any(c in path for c in "*?["):
            if not glob.glob(str(local), recursive=True):
                yield Problem(key, f"no file matches {path}")
        elif local.is_dir():
            if not any(f.name.endswith(DATA_SUFFIXES) for f in local.glob("*")):
                yield Problem(key, f"{path} has no data file; read are: {' '.join(DATA_SUFFIXES)}")
        elif local.is_file():
            if local.stat().st_size == 0:
                yield Problem(key, f"{path} is empty")
        elif not HUB_ID.match(path) or path.endswith(DATA_SUFFIXES):
            yield Problem(key, f"no such file or directory: {path}{_near(local)}")


def check_tokenizer_path(path: str) -> Iterator[Problem]:
    """A local tokenizer must be there; a hub id is left to the run."""
    local = Path(path).expanduser()
    if local.is_dir():
        folder = local / "model" if (local / "manifest.json").is_file() else local
        if not any(
            (folder / f).is_file() for f in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
        ):
            yield Problem("model.tokenizer.path", f"{path} has no tokenizer (tokenizer.json)")
    elif not HUB_ID.match(path) or _looks_local(path):
        yield Problem("model.tokenizer.path", f"no such directory: {path}{_near(local)}")


def check_model_path(key: str, path: str, weights_needed: bool = True) -> Iterator[Problem]:
    """A run directory must hold a finished policy, a model directory its config and weights."""
    local = Path(path).expanduser()
    if local.is_dir():
        if (local / "manifest.json").is_file() or (local / "config.yaml").is_file():
            yield from _check_run(key, local)
            return
        if not (local / "config.json").is_file():
            if (local / "adapter_config.json").is_file():
                yield Problem(
                    key, f"{path} is a LoRA adapter, not a model; merge it into its base first: rlhf merge-lora"
                )
            else:
                yield Problem(key, f"{path} is neither a run directory (manifest.json) nor a model (config.json)")
            return
        if weights_needed and not any(local.glob("*.safetensors")):
            if any(local.glob("*.bin")):
                yield Problem(
                    key,
                    f"{path} has pickled weights (*.bin) only, which can run code when they are read;"
                    " convert them to safetensors first",
                )
            else:
                yield Problem(key, f"{path} has no weights (*.safetensors)")
    elif local.exists():
        yield Problem(key, f"{path} is a file; a model is a directory")
    elif not HUB_ID.match(path) or _looks_local(path):
        yield Problem(key, f"no such directory: {path}{_near(local)}")


def _check_run(key: str, run_dir: Path) -> Iterator[Problem]:
    try:
        manifest = read_manifest(run_dir)
    except ModelError as error:
        yield Problem(key, str(error))
        return
    stage, status = manifest.get("stage", "?"), manifest.get("status", "not started")
    if status != "complete":
        yield Problem(
            key,
            f"{run_dir} is a run of `rlhf {stage}` that is not finished (status: {status});"
            " finish it first: the same command again continues it",
        )
        return
    kind = manifest["output"]["kind"]
    if kind == "reward":
        yield Problem(key, f"{run_dir} holds a reward model, here a policy is needed: a run of `rlhf sft`")
    elif kind == "adapter":
        yield Problem(key, f"{run_dir} holds a LoRA adapter; merge it into its base first: rlhf merge-lora")


def _looks_local(path: str) -> bool:
    return path.startswith((".", "/", "~", "runs/")) or path.count("/") > 1


def _near(path: Path) -> str:
    """A hint with the nearest name beside a path that does not exist."""
    if not path.parent.is_dir():
        return f" ({path.parent} does not exist either)"
    close = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()], n=1)
    return f"; did you mean {path.parent / close[0]}?" if close else ""
