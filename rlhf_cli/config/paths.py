"""Checks of the files and directories that a config names, from outside: nothing is opened but manifests and names."""

from __future__ import annotations

import difflib
import glob
import re
from collections.abc import Iterator
from pathlib import Path

from rlhf_cli.errors import ModelError, Problem
from rlhf_cli.rundir import read_manifest, why_unfinished

HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(:[\w.-]+)?$")
DATA_SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".txt", ".gz")


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
            yield Problem(key, f"no such file or directory: {path}{near(local)}")


def check_tokenizer_path(path: str) -> Iterator[Problem]:
    """A local tokenizer must be there; a hub id is left to the run."""
    local = Path(path).expanduser()
    if local.is_dir():
        folder = local / "model" if (local / "manifest.json").is_file() else local
        if not any(
            (folder / f).is_file() for f in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
        ):
            yield Problem("model.tokenizer.path", f"{path} has no tokenizer (tokenizer.json)")
    elif not HUB_ID.match(path) or looks_local(path):
        yield Problem("model.tokenizer.path", f"no such directory: {path}{near(local)}")


def check_model_path(
    key: str, path: str, kinds: tuple[str, ...] = ("policy",), weights_needed: bool = True
) -> Iterator[Problem]:
    """A run directory must hold a finished model of one of these kinds, a model directory its config and weights."""
    local = Path(path).expanduser()
    if local.is_dir():
        if (local / "manifest.json").is_file() or (local / "config.yaml").is_file():
            yield from check_run(key, local, kinds)
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
    elif not HUB_ID.match(path) or looks_local(path):
        yield Problem(key, f"no such directory: {path}{near(local)}")


def check_run(key: str, run_dir: Path, kinds: tuple[str, ...]) -> Iterator[Problem]:
    try:
        manifest = read_manifest(run_dir)
    except ModelError as error:
        yield Problem(key, str(error))
        return
    unfinished = why_unfinished(run_dir, manifest)
    if unfinished:
        yield Problem(key, unfinished)
        return
    kind = manifest["output"]["kind"]
    if kind == "adapter":
        yield Problem(
            key,
            f"{run_dir} holds a LoRA adapter; merge it into its base first: rlhf merge-lora merge.adapter={run_dir}",
        )
    elif kind not in kinds:
        names = {"policy": "a policy", "reward": "a reward model", "scores": "scores"}
        wanted = " or ".join(names[k] for k in kinds)
        maker = "rlhf sft" if "policy" in kinds else "rlhf rm"
        yield Problem(key, f"{run_dir} holds {names.get(kind, kind)}, here {wanted} is needed: a run of `{maker}`")


def looks_local(path: str) -> bool:
    return path.startswith((".", "/", "~", "runs/")) or path.count("/") > 1


def near(path: Path) -> str:
    """A hint with the nearest name beside a path that does not exist."""
    if not path.parent.is_dir():
        return f" ({path.parent} does not exist either)"
    close = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()], n=1)
    return f"; did you mean {path.parent / close[0]}?" if close else ""
