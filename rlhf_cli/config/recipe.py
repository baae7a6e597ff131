"""Read the file behind conf=: a shipped recipe, a user's YAML from anywhere, or the config.yaml of a run."""

from __future__ import annotations

import dataclasses
import difflib
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from rlhf_cli.config.tree import options, recipes
from rlhf_cli.errors import ConfigError, Problem
from rlhf_cli.schema import STAGES, StageInfo


class LoadedRecipe(NamedTuple):
    """name: for run directories; path: the file; choices: {group: option} from `defaults:`; values: the rest;
    frozen: the file is the complete config.yaml of a run."""

    name: str
    path: Path
    choices: dict[str, str]
    values: dict[str, Any]
    frozen: bool


def load_recipe(stage: StageInfo, conf: str) -> LoadedRecipe:
    """conf: a shipped name, or a path that ends in .yaml or .yml.

    Raises ConfigError when there is no such recipe, or when the file is no config.
    """
    path = _find(stage, conf)
    values = _parse(path)
    frozen = path.name == "config.yaml" and "stage" in values and "defaults" not in values
    if values.get("stage", stage.name) != stage.name:
        raise ConfigError(
            [Problem("conf", f"{path} is a config of `rlhf {values['stage']}`, not of `rlhf {stage.name}`")]
        )
    if frozen:
        # The same run again, elsewhere: its place is the one thing that is not repeated.
        values.pop("run_dir", None)
    choices = _choices(stage, path, values.pop("defaults", []))
    return LoadedRecipe(path.parent.name if frozen else path.stem, path, choices, values, frozen)


def _find(stage: StageInfo, conf: str) -> Path:
    if conf.endswith((".yaml", ".yml")):
        path = Path(conf).expanduser()
        if not path.is_file():
            raise ConfigError([Problem("conf", f"no such file: {path}")])
        return path
    shipped = {r.name: r.path for r in recipes(stage)}
    if conf in shipped:
        return shipped[conf]
    if (Path(conf) / "config.yaml").is_file():
        return Path(conf) / "config.yaml"
    close = difflib.get_close_matches(conf, shipped, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    known = ", ".join(shipped) or "none yet"
    raise ConfigError(
        [
            Problem(
                "conf",
                f"no recipe {conf!r} for `rlhf {stage.name}`; {hint}shipped: {known}."
                " A file of your own is given by its path: conf=my/own.yaml",
            )
        ]
    )


def _parse(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([Problem("conf", f"{path} cannot be read: {error}")]) from None
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f":{where.line + 1}" if where else ""
        what = getattr(error, "problem", None) or str(error)
        raise ConfigError([Problem("conf", f"{path}{line} is not valid YAML: {what}")]) from None
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(k, str) for k in values):
        raise ConfigError([Problem("conf", f"{path} must be a mapping of sections, such as 'optim: {{lr: 1e-5}}'")])
    return values


def _choices(stage: StageInfo, path: Path, defaults: Any) -> dict[str, str]:
    """`defaults: [{deepspeed: zero3}]` or Hydra's own `override /deepspeed: zero3` -> {"deepspeed": "zero3"}."""
    problems: list[Problem] = []
    choices: dict[str, str] = {}
    for entry in defaults if isinstance(defaults, list) else [defaults]:
        if entry == "_self_":
            continue
        if not isinstance(entry, dict) or len(entry) != 1:
            problems.append(Problem("defaults", f"{entry!r} in {path} is not of the form 'group: option'"))
            continue
        ((key, option),) = entry.items()
        group = str(key).removeprefix("override ").strip().lstrip("/")
        problem = check_choice(stage, group, str(option))
        if problem:
            problems.append(Problem(f"defaults.{group}", f"{problem} (in {path})"))
        choices[group] = str(option)
    if problems:
        raise ConfigError(problems)
    return choices


def check_choice(stage: StageInfo, group: str, option: str) -> str | None:
    """What is wrong with choosing `option` of `group`, or None."""
    if group not in stage.groups:
        return f"is not a config group of `rlhf {stage.name}`; groups: {', '.join(stage.groups) or 'none'}"
    allowed = options(group, stage)
    if option not in allowed:
        close = difflib.get_close_matches(option, allowed, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        return f"has no option {option!r}; {hint}allowed: {', '.join(allowed)}"
    return None


def other_stages_with(key: str, stage: StageInfo) -> list[str]:
    """The stages that know a section which this stage does not."""
    top = key.split(".")[0]
    knowing = [s.name for s in STAGES.values() if top in {f.name for f in dataclasses.fields(s.config)}]
    return [] if stage.name in knowing else knowing
