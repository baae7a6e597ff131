"""Where the shipped configs are: stages, groups and recipes below conf/. Standard library only, so help stays fast."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from rlhf_cli.errors import ConfigError, Problem
from rlhf_cli.schema import StageInfo, known_keys


class Recipe(NamedTuple):
    """name: as in conf=NAME; path: the file; purpose: its first comment line."""

    name: str
    path: Path
    purpose: str


def conf_dir() -> Path:
    """The config tree: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    for candidate in (package / "conf", package.parent / "conf"):
        if (candidate / "sft.yaml").is_file():
            return candidate
    raise ConfigError(
        [Problem("", f"the config tree is missing (looked in {package}/conf and beside it); reinstall rlhf-cli")]
    )


def options(group: str, stage: StageInfo) -> list[str]:
    """The choices of a config group that set nothing but options of this stage, e.g. deepspeed -> zero0, zero1 ..."""
    known = {".".join(key.split(".")[:n]) for key in known_keys(stage.config) for n in (1, 2)}
    return sorted(p.stem for p in (conf_dir() / group).glob("*.yaml") if set(_top_keys(group, p)) <= known)


def recipes(stage: StageInfo) -> list[Recipe]:
    """The recipes shipped for a stage."""
    return [Recipe(p.stem, p, _purpose(p)) for p in sorted((conf_dir() / "recipe" / stage.key).glob("*.yaml"))]


def _top_keys(group: str, path: Path) -> list[str]:
    """The options or sections that a group's file sets at its first level, by full names; without importing YAML."""
    text = path.read_text(encoding="utf-8")
    prefix = "" if "@package _global_" in text else f"{group}."
    return [f"{prefix}{key}" for key in re.findall(r"^(\w+):", text, re.MULTILINE)]


def _purpose(path: Path) -> str:
    with path.open(encoding="utf-8") as file:
        return next((line.lstrip("# ").strip() for line in file if line.startswith("#")), "")
