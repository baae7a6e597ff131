"""What reward.sources[].path means: a run directory, a local model or adapter, or a hub id; and what is known of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from rlhf_cli.errors import ModelError
from rlhf_cli.models.source import check_source
from rlhf_cli.rundir import read_manifest, run_of, why_unfinished


class Located(NamedTuple):
    """path: directory or hub id of the weights; base: what they are an adapter of, or None; base_digest: of the base
    as it was when the adapter was trained, if that is known; template: name of the run's template, or None; info: the
    manifest's (or config.json's) `reward`: mean, std, labels, by_label."""

    path: str
    base: str | None = None
    base_digest: str | None = None
    template: str | None = None
    info: Mapping[str, Any] = MappingProxyType({})


def locate(path: str, key: str) -> Located:
    """Raises ModelError for what is missing, unfinished, a policy, or an adapter whose base is gone."""
    check_source(path, key)
    local = Path(path).expanduser()
    if not local.is_dir():
        return Located(path)
    run_dir = run_of(local)  # also of the model directory in it: template and moments are the run's
    manifest = read_manifest(run_dir) if run_dir is not None else {}
    template = manifest.get("template")
    folder = _run_output(run_dir, manifest, key) if run_dir is not None else local
    adapter = folder / "adapter_config.json"
    if adapter.is_file() and not (folder / "config.json").is_file():
        base, digest = _base(adapter, key), manifest.get("base_digest")
        return Located(str(folder), base, digest, template, manifest.get("reward") or {})
    info = manifest.get("reward") or _json(folder / "config.json").get("reward")
    return Located(str(folder), template=template, info=info or {})


def _run_output(run_dir: Path, manifest: dict[str, Any], key: str) -> Path:
    """The model directory of a finished run that holds a reward model, merged or not."""
    output = manifest.get("output") or {}
    unfinished = why_unfinished(run_dir, manifest)
    if unfinished:
        raise ModelError(f"{key}: {unfinished}")
    if output.get("kind") != "reward" and output.get("task") != "sequence_classification":
        kind = {"policy": "a policy", "adapter": "the adapter of a policy"}.get(output.get("kind", ""), "no model")
        raise ModelError(
            f"{key}: {run_dir} (a run of `rlhf {manifest['stage']}`) holds {kind}; a reward model is needed here,"
            " a run of `rlhf rm`"
        )
    return run_dir / str(output["path"])


def _base(adapter_config: Path, key: str) -> str:
    settings = _json(adapter_config)
    folder = adapter_config.parent
    if settings.get("task_type") != "SEQ_CLS":
        raise ModelError(
            f"{key}: {folder} is an adapter of task type {settings.get('task_type')}; a reward model's is SEQ_CLS"
            " (a run of `rlhf rm`)"
        )
    if not (folder / "adapter_model.safetensors").is_file():
        raise ModelError(f"{key}: {folder} has no adapter_model.safetensors (pickled adapters are not read)")
    base = str(settings.get("base_model_name_or_path"))
    try:
        check_source(base, key)
    except ModelError as error:
        raise ModelError(
            f"{key}: {folder} is an adapter whose base is gone ({base}); merge it into a copy of its base first:"
            f" rlhf merge-lora merge.adapter={folder} merge.base=..."
        ) from error
    return base


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is damaged: {error}") from error
    return value if isinstance(value, dict) else {}
