"""manifest.json: what a run is, what it was made from, and what it made. The hand-over between stages."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
from hashlib import sha256
from pathlib import Path
from typing import Any

from rlhf_cli import __version__
from rlhf_cli.errors import ModelError
from rlhf_cli.files import digest_tree, write_json
from rlhf_cli.rundir import read_manifest, utc_now

SCHEMA_VERSION = 1
PACKAGES = ("torch", "transformers", "datasets", "peft", "deepspeed", "hydra-core")


def begin(run_dir: Path, stage: str, config: dict[str, Any], world_size: int) -> dict[str, Any]:
    """Start (or continue) a manifest with status `running`; the first start's time is kept."""
    old = read_manifest(run_dir)
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "stage": stage,
        "status": "running",
        "output": None,
        "base_model": config["model"]["path"],
        "template": None,
        "parents": parents(config),
        "reward": None,
        "data": old.get("data", []),
        "metrics": {},
        "world_size": world_size,
        "seed": config["train"]["seed"],
        "versions": {"rlhf-cli": __version__, **{p: importlib.metadata.version(p) for p in PACKAGES}},
        "git_commit": git_commit(),
        "started": old.get("started") or utc_now(),
        "finished": None,
        "config_digest": sha256(json.dumps(config, sort_keys=True).encode()).hexdigest(),
    }
    write_json(run_dir / "manifest.json", manifest)
    return manifest


def parents(config: dict[str, Any]) -> list[dict[str, str]]:
    """The runs that a config builds on, each with the digest of its model."""
    path = config["model"]["path"]
    if not path or not (Path(path).expanduser() / "manifest.json").is_file():
        return []
    run_dir = Path(path).expanduser()
    return [{"role": "policy", "run_dir": str(run_dir.resolve()), "digest": digest_tree(run_dir / "model")}]


def model_dir(path: str) -> tuple[str, dict[str, Any]]:
    """Where the weights behind `model.path` are, and the manifest when it is a run directory.

    path: run directory, model directory or hub id. Raises ModelError when the run has no finished policy.
    """
    run_dir = Path(path).expanduser()
    manifest = read_manifest(run_dir) if run_dir.is_dir() else {}
    if not manifest:
        return str(run_dir) if run_dir.is_dir() else path, {}
    output = manifest.get("output") or {}
    if manifest["status"] != "complete" or output.get("kind") != "policy":
        raise ModelError(
            f"{path} holds no finished policy (status {manifest['status']}, kind {output.get('kind')});"
            " give it a finished run of `rlhf sft`"
        )
    return str(run_dir / output["path"]), manifest


def git_commit() -> str | None:
    """The commit of the checkout this package runs from, or None for an installed package."""
    here = Path(__file__).resolve().parent
    try:
        done = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
