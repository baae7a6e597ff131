"""The words of a command line: `optim.lr=1e-5`, `deepspeed=zero3`, `+data.columns.prompt=question`."""

from __future__ import annotations

from typing import NamedTuple

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from rlhf_cli.config.recipe import check_choice, other_stages_with
from rlhf_cli.errors import Problem
from rlhf_cli.schema import StageInfo, known_keys, suggest

FREE_FORM = ("deepspeed.json.", "data.columns.")


class Overrides(NamedTuple):
    """values: overrides in Hydra's grammar; keys: the config keys they set; choices: {group: option}."""

    values: list[str]
    keys: list[str]
    choices: dict[str, str]


def parse_overrides(stage: StageInfo, words: list[str]) -> tuple[Overrides, list[Problem]]:
    """Check every word against the schema before anything is composed, so that all mistakes are reported together.

    A leading + or ++ is allowed and means nothing: options are checked the same way, however they are written.
    """
    parser = OverridesParser.create()
    known = known_keys(stage.config)
    parsed = Overrides([], [], {})
    problems: list[Problem] = []
    for word in words:
        if "=" not in word.lstrip("="):
            tip = " (~ deletes nothing here; set the option to null)" if word.startswith("~") else ""
            tip = " (no blanks around =)" if word.startswith("=") else tip
            problems.append(Problem("", f"{word!r} is not of the form key=value{tip}"))
            continue
        raw_key, raw_value = word.split("=", 1)
        key = raw_key.lstrip("+")
        hint = "str" if key.startswith("data.columns.") else str(known[key].type) if key in known else ""
        if not _fits_text_option(parser, hint, word):
            # A text option takes any text: {prompt}{label}, a=b, 50% ... need no quotes of Hydra's own.
            raw_value = '"' + raw_value.replace("\\", "\\\\").replace('"', '\\"') + '"'
            word = f"{raw_key}={raw_value}"
        try:
            override = parser.parse_override(word)
        except HydraException as error:
            reason = str(error).splitlines()[0].removeprefix("Error parsing override ").strip()
            problems.append(
                Problem(key, f"cannot be read: {reason}. Quote values that contain , = or brackets: '{key}=\"...\"'")
            )
            continue
        if override.is_delete():
            problems.append(Problem(key.lstrip("~"), "cannot be deleted; set it to null"))
        elif override.is_sweep_override():
            problems.append(
                Problem(key, f"has several values ({raw_value}); add -m for a sweep, or write a list: [{raw_value}]")
            )
        elif key in stage.groups:
            wrong = check_choice(stage, key, raw_value)
            if wrong:
                problems.append(Problem(key, wrong))
            parsed.choices[key] = raw_value
        elif hint.startswith("list[") and isinstance(override.value(), dict):
            problems.append(Problem(key, f"got one mapping; allowed: a list of them, in brackets: {key}=[{raw_value}]"))
        elif key in known or key.startswith(FREE_FORM):
            parsed.values.append(f"++{key}={raw_value}")
            parsed.keys.append(key)
        else:
            problems.append(Problem(key, f"{_unknown(stage, key)} (got {raw_value})"))
    return parsed, problems


def _fits_text_option(parser: OverridesParser, hint: str, word: str) -> bool:
    """Whether a word for an option of this type can go to Hydra's grammar as it is; False: a text that needs quotes."""
    if "str" not in hint or hint.startswith("dict"):
        return True
    try:
        override = parser.parse_override(word)
    except HydraException:
        return False
    return override.is_sweep_override() or "list" in hint or not isinstance(override.value(), dict | list)


def _unknown(stage: StageInfo, key: str) -> str:
    others = other_stages_with(key, stage)
    if others:
        used = " and ".join(f"`rlhf {name}`" for name in others)
        return f"is not an option of `rlhf {stage.name}`; {key.split('.')[0]} belongs to {used}"
    sections = {k.rsplit(".", 1)[0] for k in known_keys(stage.config) if "." in k}
    if key in sections:
        example = next(k for k in known_keys(stage.config) if k.startswith(key + "."))
        return f"is a section; set one of its options, e.g. {example}=..."
    return f"is not an option of `rlhf {stage.name}`{suggest(key, stage.config)}"
