"""What can be known to be wrong with a merge before any process starts. Standard library only."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf_cli.config.paths import check_model_path, looks_local, near
from rlhf_cli.errors import ModelError, Problem
from rlhf_cli.rundir import read_manifest, why_unfinished
from rlhf_cli.schema import MergeLoraConfig

ADAPTER, BASE = "merge.adapter", "merge.base"


def check_merge(config: MergeLoraConfig) -> Iterator[Problem]:
    """The adapter is finished and readable, and there is a base for it."""
    merge = config.merge
    if merge.base:
        yield from check_model_path(BASE, merge.base, ("policy", "reward"))
    if not merge.adapter:
        return
    local = Path(merge.adapter).expanduser()
    if not local.is_dir():
        what = "is a file; an adapter is a directory" if local.exists() else f"no such directory{near(local)}"
        yield Problem(ADAPTER, f"{merge.adapter}: {what}")
        return
    try:
        manifest = read_manifest(local)
    except ModelError as error:
        yield Problem(ADAPTER, str(error))
        return
    is_run = bool(manifest) or (local / "config.yaml").is_file()
    problem = _check_run(local, manifest) if is_run else None
    if problem is not None:
        yield problem
        return
    folder = local / manifest["output"]["path"] if manifest else local
    yield from _check_folder(folder, merge.allow_pickle)
    if not merge.base and (folder / "adapter_config.json").is_file():
        yield from _check_named_base(folder, manifest)


def _check_run(run_dir: Path, manifest: dict[str, Any]) -> Problem | None:
    unfinished = why_unfinished(run_dir, manifest)
    if unfinished:
        return Problem(ADAPTER, unfinished)
    kind = manifest["output"]["kind"]
    if kind != "adapter":
        return Problem(
            ADAPTER, f"{run_dir} holds a {kind} and no adapter: there is nothing to merge; adapters come from lora=r16"
        )
    return None


def _check_folder(folder: Path, allow_pickle: bool) -> Iterator[Problem]:
    if not (folder / "adapter_config.json").is_file():
        also = " (config.json is there: it is a whole model)" if (folder / "config.json").is_file() else ""
        yield Problem(
            ADAPTER, f"{folder} has no adapter_config.json{also}; allowed: a run of LoRA, or a folder in PEFT's layout"
        )
    elif not (folder / "adapter_model.safetensors").is_file():
        if not (folder / "adapter_model.bin").is_file():
            yield Problem(ADAPTER, f"{folder} has no weights (adapter_model.safetensors)")
        elif not allow_pickle:
            yield Problem(
                ADAPTER,
                f"{folder} has pickled weights only (adapter_model.bin), which can run code when they are read;"
                " if you trust their source, set merge.allow_pickle=true (tensors only are read)",
            )


def _check_named_base(folder: Path, manifest: dict[str, Any]) -> Iterator[Problem]:
    """The base that the adapter names must be there, or be a hub id."""
    try:
        stored = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        named = [manifest.get("base_model"), stored.get("base_model_name_or_path")]
    except (ValueError, AttributeError) as error:
        yield Problem(ADAPTER, f"{folder / 'adapter_config.json'} is damaged ({error})")
        return
    named = [name for name in named if name]
    if not named:
        yield Problem(BASE, f"is required: {folder} does not say which model it belongs to")
    elif not any(Path(name).expanduser().is_dir() or not looks_local(name) for name in named):
        yield Problem(BASE, f"is required: {named[-1]}, which the adapter belongs to, is not there; say where it is")
