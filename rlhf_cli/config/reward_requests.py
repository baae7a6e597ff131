"""Checks of reward sources against the files they name, before any process starts. Standard library only."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf_cli.config.model_files import manifest_of, read_json
from rlhf_cli.config.paths import HUB_ID, check_model_path, check_run, looks_local, near
from rlhf_cli.errors import ModelError, Problem
from rlhf_cli.rundir import read_manifest, run_of
from rlhf_cli.schema import PolicyRewardConfig, RewardConfig, RewardSourceConfig


def check_rewards(reward: RewardConfig) -> Iterator[Problem]:
    """What can be known to be wrong with the sources without loading them."""
    for number, source in enumerate(reward.sources):
        key = f"reward.sources[{number}]"
        if source.type in ("model", "classifier") and source.path:
            yield from _check_model(key, source, reward.normalize and not _has_running_moments(reward))
        elif source.type == "function" and source.path:
            yield from _check_function_file(f"{key}.path", source.path)
        elif source.type == "http" and source.url and not source.url.startswith(("http://", "https://")):
            yield Problem(f"{key}.url", f"got {source.url!r}; allowed: http://... or https://...")


def _has_running_moments(reward: RewardConfig) -> bool:
    return isinstance(reward, PolicyRewardConfig) and reward.moments == "running"


def _check_model(key: str, source: RewardSourceConfig, normalize: bool) -> Iterator[Problem]:
    assert source.path is not None
    local = Path(source.path).expanduser()
    found = list(_check_model_files(f"{key}.path", source.path))
    yield from found
    if found or not local.is_dir():
        return
    run_dir = run_of(local)
    manifest = read_manifest(run_dir) if run_dir is not None else {}
    folder = run_dir / manifest["output"]["path"] if run_dir is not None else local
    info = manifest.get("reward") or read_json(folder / "config.json").get("reward") or {}
    labels = _labels(info, folder)
    if labels is not None:
        yield from _check_label(key, source, labels)
    if normalize and not labels and info.get("mean") is None:
        yield Problem(
            "reward.normalize",
            f"{source.path} has no mean and std of its scores; `rlhf rm` stores them",
        )


def _check_model_files(key: str, path: str) -> Iterator[Problem]:
    local = Path(path).expanduser()
    if not local.is_dir():
        yield from check_model_path(key, path, ("reward",))
    elif (local / "manifest.json").is_file() or (local / "config.yaml").is_file():
        yield from _check_reward_run(key, local)
    elif (local / "adapter_config.json").is_file() and not (local / "config.json").is_file():
        yield from _check_adapter(key, local)
    else:
        yield from check_model_path(key, path, ("reward",))
        names = read_json(local / "config.json").get("architectures") or []
        if names and not any(name.endswith("ForSequenceClassification") for name in names):
            yield Problem(
                key, f"{path} is a {names[0]}, no reward model or classifier (...ForSequenceClassification): rlhf rm"
            )


def _check_reward_run(key: str, run_dir: Path) -> Iterator[Problem]:
    """As for other stages, but an adapter is good where its base can be found."""
    try:
        output = read_manifest(run_dir).get("output") or {}
    except ModelError as error:
        yield Problem(key, str(error))
        return
    if output.get("kind") != "adapter":
        yield from check_run(key, run_dir, ("reward",))
    elif output.get("task") != "sequence_classification":
        yield Problem(
            key, f"{run_dir} holds the adapter of a policy, here a reward model is needed: a run of `rlhf rm`"
        )
    else:
        yield from _check_adapter(key, run_dir / output["path"])


def _check_adapter(key: str, folder: Path) -> Iterator[Problem]:
    settings = read_json(folder / "adapter_config.json")
    if settings.get("task_type") != "SEQ_CLS":
        yield Problem(
            key,
            f"{folder} is an adapter of task type {settings.get('task_type')}; a reward model's is SEQ_CLS: rlhf rm",
        )
    elif not (folder / "adapter_model.safetensors").is_file():
        yield Problem(key, f"{folder} has no adapter_model.safetensors (pickled adapters are not read)")
    else:
        base = str(settings.get("base_model_name_or_path"))
        if not Path(base).is_dir() and (not HUB_ID.match(base) or looks_local(base)):
            yield Problem(
                key,
                f"{folder} is an adapter whose base is gone ({base}); merge it into a copy of its base first:"
                f" rlhf merge-lora merge.adapter={folder} merge.base=...",
            )


def _check_label(key: str, source: RewardSourceConfig, labels: list[str]) -> Iterator[Problem]:
    """labels: of the model; empty when it has one score."""
    if not labels:
        if source.label is not None:
            yield Problem(f"{key}.label", f"{source.path} gives one score and has no labels; drop label (type: model)")
        return
    if source.label is None:
        yield Problem(f"{key}.label", f"is required: {source.path} has the labels {', '.join(labels)}; choose one")
        return
    lowered, wanted = [label.lower() for label in labels], str(source.label)
    is_number = wanted.isdecimal() and int(wanted) < len(labels)
    if wanted.lower() not in lowered and not is_number:
        close = difflib.get_close_matches(wanted.lower(), lowered, n=1)
        hint = f"; did you mean {labels[lowered.index(close[0])]}?" if close else ""
        yield Problem(
            f"{key}.label", f"{source.path} has no label {wanted!r}; its labels are {', '.join(labels)}{hint}"
        )


def model_labels(folder: Path) -> list[str] | None:
    """The labels of the reward model in a directory, in order, [] for one score; None when the files do not tell."""
    info = manifest_of(folder).get("reward") or read_json(folder / "config.json").get("reward") or {}
    return _labels(info, folder)


def _labels(info: dict[str, Any], folder: Path) -> list[str] | None:
    """The model's labels in order, [] for one score, None when the files do not tell."""
    if info.get("labels"):
        return [str(label) for label in info["labels"]]
    config = read_json(folder / "config.json")
    names = config.get("id2label")
    if isinstance(names, dict) and len(names) > 1:
        return [str(name) for _, name in sorted(names.items(), key=lambda item: int(item[0]))]
    return [] if isinstance(names, dict) else None


def _check_function_file(key: str, path: str) -> Iterator[Problem]:
    local = Path(path).expanduser()
    if not local.is_file():
        yield Problem(key, f"no such file: {path}{near(local)}")
    elif local.suffix != ".py":
        yield Problem(key, f"{path} is no Python file (.py)")
