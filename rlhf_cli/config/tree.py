"""Where the shipped configs are: stages, groups and recipes below conf/. Standard library only, so help stays fast."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from rlhf_cli.errors import ConfigError, Problem


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


def options(group: str) -> list[str]:
    """The choices of a config group, e.g. deepspeed -> zero0, zero1 ..."""
    return sorted(p.stem for p in (conf_dir() / group).glob("*.yaml"))


def recipes(stage: str) -> list[Recipe]:
    """The recipes shipped for a stage."""
    return [Recipe(p.stem, p, _purpose(p)) for p in sorted((conf_dir() / "recipe" / stage).glob("*.yaml"))]


def _purpose(path: Path) -> str:
    with path.open(encoding="utf-8") as file:
        return next((line.lstrip("# ").strip() for line in file if line.startswith("#")), "")
