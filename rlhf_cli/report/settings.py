"""What a config says that its stage would not have done anyway."""

from __future__ import annotations

import json
import typing
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rlhf_cli.report.markup import Markup, shortened, table, tag
from rlhf_cli.report.runs import Run
from rlhf_cli.schema import STAGES, flatten, known_keys, to_dict
from rlhf_cli.schema.build import item_class

SAID_ELSEWHERE = ("stage", "run_dir", "resume")
VALUE_CHARS = 300


class Setting(NamedTuple):
    """key: of the option; default: of the stage, None as text for an option that this version does not have; values:
    of each run, None where a run has the default."""

    key: str
    default: str | None
    values: list[str | None]

    @property
    def differs(self) -> bool:
        """Whether the runs are not alike."""
        return len(set(self.values)) > 1


def changed(stage: str, runs: Sequence[Run]) -> list[Setting]:
    """The options of a stage that at least one of its runs has changed, in the order of the schema."""
    config = STAGES[stage].config
    options = list(known_keys(config))
    defaults = {key: _value(to_dict(config()), key)[1] for key in options}
    of_runs = [dict(_options(run.config, options)) for run in runs]
    found = []
    for key in dict.fromkeys([*options, *(key for values in of_runs for key in values)]):
        default = defaults.get(key)
        values = [_changed_value(config, key, default, given) for given in of_runs]
        if any(value is not None for value in values) and key not in SAID_ELSEWHERE:
            found.append(Setting(key, as_typed(default) if key in defaults else None, values))
    return found


def settings_tables(runs: Sequence[Run]) -> Markup:
    """A table for each stage, a column for each of its runs."""
    parts = []
    for stage in STAGES:
        mine = [run for run in runs if run.stage == stage and run.config]
        if not mine:
            continue
        rows: list[list[object]] = []
        for setting in changed(stage, mine):
            default = "not an option of this version" if setting.default is None else setting.default
            values = [default if value is None else value for value in setting.values]
            cells = [
                tag("span", value, class_="same") if given is None
                else tag("strong", value) if setting.differs else value
                for value, given in zip(values, setting.values, strict=True)
            ]  # fmt: skip
            rows.append([setting.key, default, *cells])
        head = ["option", "default", *(run.name for run in mine)]
        parts.append(table(head, rows, f"rlhf {stage}", words=len(head)))
    return Markup("".join(parts))


def _options(values: Mapping[str, Any], options: Sequence[str]) -> list[tuple[str, Any]]:
    """What a config gives to each option; what is no option of this version under its full key."""
    found = [(key, value) for key in options for given, value in [_value(values, key)] if given]
    known = tuple(f"{key}." for key in options)
    return found + [(k, v) for k, v in flatten(values) if k not in options and not k.startswith(known) and v != {}]


def _value(values: Any, key: str) -> tuple[bool, Any]:
    """(given, value) of a full key in nested values."""
    for part in key.split("."):
        if not isinstance(values, Mapping) or part not in values:
            return False, None
        values = values[part]
    return True, values


def _changed_value(config: type, key: str, default: Any, given: Mapping[str, Any]) -> str | None:
    if key not in given or given[key] == default:
        return None
    value, item = given[key], _item_of(config, key)
    if item is not None and isinstance(value, list):
        value = [_without_defaults(item, entry) for entry in value]
    return shortened(as_typed(value), VALUE_CHARS)


def _without_defaults(item: type, entry: Any) -> Any:
    defaults = to_dict(item())
    return (
        {k: v for k, v in entry.items() if k not in defaults or v != defaults[k]} if isinstance(entry, dict) else entry
    )


def _item_of(config: type, key: str) -> type | None:
    """The section that each entry of a list is, for such an option."""
    hint: Any = config
    for part in key.split("."):
        hints = typing.get_type_hints(hint) if isinstance(hint, type) else {}
        hint = hints.get(part)
    return item_class(hint)


def as_typed(value: Any) -> str:
    """As it would be typed, nearly."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, str):
        return value or '""'
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {as_typed(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(as_typed(entry) for entry in value) + "]"
    return str(value)
