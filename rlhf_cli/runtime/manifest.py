"""manifest.json: what a run is, what it was made from, and what it made. The hand-over between stages."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
from hashlib import sha256
from pathlib import Path
from typing import Any

from rlhf_cli import __version__
from rlhf_cli.errors import CheckpointError
from rlhf_cli.files import digest_file, digest_tree, write_json
from rlhf_cli.rundir import has_iterations, output_dir, read_manifest, utc_now

SCHEMA_VERSION = 1
CRITIC_WORDS = ("auto", "reward", "policy")  # of ppo.critic; everything else is a path
PACKAGES = ("torch", "transformers", "datasets", "peft", "deepspeed", "hydra-core")


def begin(run_dir: Path, stage: str, config: dict[str, Any], world_size: int) -> dict[str, Any]:
    """Start (or continue) a manifest with status `running`; the first start's time is kept.

    Raises CheckpointError when something that the run builds on is no longer what it was started from.
    """
    old = read_manifest(run_dir)
    found = parents(config)
    path = config.get("model", {}).get("path")
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "stage": stage,
        "status": "running",
        "output": None,
        "base_model": path,
        "base_digest": _base_digest(config, found),
        "template": None,
        "parents": found,
        "inputs": inputs(config, found),
        "reward": None,
        "data": old.get("data", []),
        "metrics": {},
        "world_size": world_size,
        "seed": config.get("train", {}).get("seed"),
        "versions": {"rlhf-cli": __version__, **{p: importlib.metadata.version(p) for p in PACKAGES}},
        "git_commit": git_commit(),
        "started": old.get("started") or utc_now(),
        "finished": None,
        "config_digest": sha256(json.dumps(config, sort_keys=True).encode()).hexdigest(),
    }
    _check_unchanged(run_dir, old, manifest)
    write_json(run_dir / "manifest.json", manifest)
    return manifest


def parents(config: dict[str, Any]) -> list[dict[str, str]]:
    """The runs that a config builds on, each with its role and the digest of its model."""
    named = [("model", config.get("model", {}).get("path")), *_named_beside(config)]
    found = (parent(role, path) for role, path in named if path)
    return [entry for entry in found if entry is not None]


def inputs(config: dict[str, Any], found: list[dict[str, str]]) -> dict[str, str]:
    """path: digest of the models and files that a run reads beside its own model and that no run made (found: its
    parents). Only of stages that train and go on from checkpoints; `rlhf score` looks after its sources itself."""
    if "train" not in config:
        return {}
    of_runs = {entry["run_dir"] for entry in found}
    paths = {Path(path).expanduser().resolve() for _, path in _named_beside(config) if path}
    return {
        str(path): digest_tree(path) if path.is_dir() else digest_file(path)
        for path in sorted(paths)
        if path.exists() and str(path) not in of_runs  # what does not exist is a hub id
    }


def _named_beside(config: dict[str, Any]) -> list[tuple[str, str | None]]:
    """(role, path) of what is read beside the model that is trained."""
    named = [("reward", source["path"]) for source in config.get("reward", {}).get("sources", [])]
    named += [("reference", config.get(stage, {}).get("ref")) for stage in ("ppo", "raft")]
    critic = config.get("ppo", {}).get("critic", "auto")
    return named if critic in CRITIC_WORDS else [*named, ("critic", critic)]


def parent(role: str, path: str) -> dict[str, str] | None:
    """The manifest's entry for a run directory this run builds on; None when `path` is none. role: what it is used as;
    "model" stands for what the run holds (policy, reward)."""
    run_dir = Path(path).expanduser()
    output = (read_manifest(run_dir).get("output") or {}) if run_dir.is_dir() else {}
    if not output:
        return None
    role = output["kind"] if role == "model" else role
    return {"role": role, "run_dir": str(run_dir.resolve()), "digest": digest_tree(run_dir / output["path"])}


def model_dir(path: str, kinds: tuple[str, ...] = ("policy",)) -> tuple[str, dict[str, Any]]:
    """Where the weights behind `model.path` are, and the manifest when it is a run directory.

    path: run directory, model directory or hub id. kinds: what the run may hold.
    Raises ModelError when the run holds nothing finished of that kind.
    """
    run_dir = Path(path).expanduser()
    manifest = read_manifest(run_dir) if run_dir.is_dir() else {}
    if not manifest:
        return str(run_dir) if run_dir.is_dir() else path, {}
    return str(output_dir(run_dir, kinds, path)), manifest


def _base_digest(config: dict[str, Any], found: list[dict[str, str]]) -> str | None:
    """Of the model whose frozen weights a run needs again when it goes on, or when its adapter is merged, or that
    is the reference of a policy; None where all weights are trained and nothing is compared with them."""
    settings = config.get("model", {})
    path = settings.get("path")
    frozen = config.get("lora", {}).get("enabled") or settings.get("trainable", {}).get("mode", "all") != "all"
    is_reference = "ppo" in config or "raft" in config
    if not path or not (frozen or is_reference):
        return None
    directory = Path(path).expanduser()
    of_run = [entry["digest"] for entry in found if entry["run_dir"] == str(directory.resolve())]
    if of_run:  # of a run's model; the other entries are rewards
        return of_run[0]
    return digest_tree(directory) if directory.is_dir() else None


def _check_unchanged(run_dir: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    """old: the manifest of the start before, {} without one; entries that an older version did not write are let be."""
    if not any((run_dir / "checkpoints").glob("step_*")) and not has_iterations(run_dir):
        return
    digests = {entry.get("run_dir"): entry["digest"] for entry in old.get("parents") or []}
    parents_now = new["parents"]
    changed = [e["run_dir"] for e in parents_now if digests.get(e["run_dir"], e["digest"]) != e["digest"]]
    base_digest = new["base_digest"]
    if old.get("base_digest") and base_digest and old["base_digest"] != base_digest:  # of a model that no run made
        changed.append(str(old["base_model"]))
    changed = [f"the model in {path}" for path in changed]
    before = old.get("inputs") or {}
    changed += [path for path, digest in new["inputs"].items() if before.get(path, digest) != digest]
    if changed:
        raise CheckpointError(
            f"{changed[0]} has changed since {run_dir} was started from it; put it back, or start in another run_dir"
        )


def git_commit() -> str | None:
    """The commit of the checkout this package runs from, or None for an installed package, even inside another one's
    checkout."""
    package = Path(__file__).resolve().parent.parent
    command = ["git", "-C", str(package), "rev-parse", "--show-toplevel", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    if done.returncode:
        return None
    root, commit = done.stdout.splitlines()
    return commit if Path(root).resolve() == package.parent else None
