"""Compose a stage's config: conf/STAGE.yaml and its groups, then the recipe, then the command line (Hydra)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rlhf_cli.config.idle import idle_options
from rlhf_cli.config.overrides import Overrides, parse_overrides
from rlhf_cli.config.recipe import LoadedRecipe, load_recipe
from rlhf_cli.config.tree import conf_dir
from rlhf_cli.errors import ConfigError, Problem
from rlhf_cli.schema import STAGES, StageInfo, flatten, to_dict
from rlhf_cli.schema.build import collect


class Composed(NamedTuple):
    """config: the typed config, or None when its types do not fit; values: the same as plain values;
    recipe: the name for the run directory; problems: words that cannot be right (typos, types, choices);
    unmet: what the sections' checks find, required values among it."""

    config: Any | None
    values: dict[str, Any]
    recipe: str | None
    problems: list[Problem]
    unmet: list[Problem]


def compose_stage(stage_name: str, words: list[str]) -> Composed:
    """Compose and check a config without stopping at the first problem.

    words: the command line after the stage, e.g. ["conf=hh_rlhf_llama_7b", "optim.lr=1e-5"].
    """
    stage = STAGES[stage_name]
    confs = [w.removeprefix("conf=") for w in words if w.startswith("conf=")]
    words = [w for w in words if not w.startswith("conf=")]
    overrides, problems = parse_overrides(stage, words)
    recipe = None
    if len(confs) > 1:
        problems.append(Problem("conf", f"is given {len(confs)} times; name one recipe"))
    elif confs:
        try:
            recipe = load_recipe(stage, confs[0])
        except ConfigError as error:
            raise ConfigError(problems + error.problems) from None
    values = _compose(stage, recipe, overrides, problems)
    config, unfit, unmet = collect(stage.config, values)
    problems += [_with_origin(p, recipe, overrides) for p in unfit]
    problems += idle_options(config, overrides.keys)
    wrong = {p.key for p in problems}
    unmet = [_with_origin(p, recipe, overrides) for p in unmet if p.key not in wrong]
    return Composed(config, to_dict(config), recipe.name if recipe else None, problems, unmet)


def _compose(
    stage: StageInfo, recipe: LoadedRecipe | None, overrides: Overrides, problems: list[Problem]
) -> dict[str, Any]:
    store = ConfigStore.instance()
    # Plain values, not the dataclass: types are checked once, by rlhf_cli.schema, which reports all problems together.
    store.store(name=f"{stage.key}_schema", node=to_dict(stage.config()))
    name, words = stage.key, [f"{group}={option}" for group, option in overrides.choices.items()]
    if any(p.key in overrides.choices for p in problems):
        words = []  # a choice that does not exist was reported already
    if recipe and recipe.frozen:
        # A frozen config is complete: nothing below it, and a newly chosen group replaces its section.
        kept = {k: v for k, v in recipe.values.items() if k not in overrides.choices}
        below = [f"{stage.key}_schema", "_self_", *({g: None} for g in stage.groups)]
        store.store(name="_frozen_", node={"defaults": below, **kept})
        name = "_frozen_"
    elif recipe:
        choices = [{f"override /{g}": o} for g, o in recipe.choices.items() if g not in overrides.choices]
        values = _without(recipe.values, _set_by(overrides.choices, problems))
        # A ConfigStore node, not a file on Hydra's search path: a user's sft.yaml can never hide the shipped one.
        store.store(
            group="recipe", name="chosen", package="_global_", node={"defaults": [*choices, "_self_"], **values}
        )
        words.append("+recipe=chosen")
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
            composed = hydra_compose(config_name=name, overrides=words + overrides.values)
        container = OmegaConf.to_container(composed, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        where = f" ({recipe.path})" if recipe else ""
        problems.append(Problem("", f"the config cannot be composed{where}: {str(error).splitlines()[0]}"))
        raise ConfigError(problems) from None
    assert isinstance(container, dict)
    return {str(k): v for k, v in container.items()}


def _set_by(choices: dict[str, str], problems: list[Problem]) -> set[str]:
    """The keys that these groups' files set: chosen on the command line, they win over the recipe's values."""
    known = {group: option for group, option in choices.items() if not any(p.key == group for p in problems)}
    if not known:
        return set()
    defaults = [*({group: option} for group, option in known.items()), "_self_"]
    ConfigStore.instance().store(name="_choices_", node={"defaults": defaults})
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        chosen = OmegaConf.to_container(hydra_compose(config_name="_choices_"))
    assert isinstance(chosen, dict)
    return {key for key, _ in flatten({str(section): values for section, values in chosen.items()})}


def _without(values: Mapping[str, Any], keys: set[str], prefix: str = "") -> dict[str, Any]:
    """Nested values but those of `keys`, which are full names."""
    return {
        name: _without(value, keys, f"{prefix}{name}.") if isinstance(value, Mapping) else value
        for name, value in values.items()
        if f"{prefix}{name}" not in keys
    }


def _with_origin(problem: Problem, recipe: LoadedRecipe | None, overrides: Overrides) -> Problem:
    if recipe is None or problem.key in overrides.keys:
        return problem
    in_recipe = {key for key, _ in flatten(recipe.values)}
    if any(key == problem.key or key.startswith(problem.key + ".") for key in in_recipe):
        return Problem(problem.key, f"{problem.message} (in {recipe.path})")
    return problem
