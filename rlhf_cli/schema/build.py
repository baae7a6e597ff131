"""Plain container -> typed config, with every problem collected; and back."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Union

import yaml

from rlhf_cli.errors import ConfigError, Problem
from rlhf_cli.schema.fields import describe_limits


def build(cls: type, values: Mapping[str, Any]) -> Any:
    """Make a `cls` (a dataclass of this package) from nested plain values.

    Raises ConfigError with all problems: unknown keys (nearest known key named), wrong types, values out of range,
    and whatever the sections' own `check` finds.
    """
    problems: list[Problem] = []
    config = _build(cls, values, "", problems, cls)
    if not problems:
        problems += _check(config, "")
    if problems:
        raise ConfigError(problems)
    return config


def collect(cls: type, values: Mapping[str, Any]) -> tuple[Any, list[Problem], list[Problem]]:
    """Like build, but goes on: (config, what does not fit, what the sections' checks find in the rest).

    In the config an option that does not fit has its default.
    """
    problems: list[Problem] = []
    config = _build(cls, values, "", problems, cls)
    wrong = {problem.key for problem in problems}
    return config, problems, [p for p in _check(config, "") if p.key not in wrong]


def from_file(cls: type, path: Path) -> Any:
    """Read a frozen config.yaml."""
    return build(cls, yaml.safe_load(path.read_text(encoding="utf-8")))


def to_dict(config: Any) -> dict[str, Any]:
    """A config as nested plain values."""
    return dataclasses.asdict(config)


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """`{"a": {"b": 1}}` -> ("a.b", 1). An empty mapping is a value."""
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{name}.")
        else:
            yield name, value


def known_keys(cls: type, prefix: str = "") -> dict[str, dataclasses.Field[Any]]:
    """Every option below `cls` by its full key; sections themselves are not options."""
    keys: dict[str, dataclasses.Field[Any]] = {}
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]):
            keys |= known_keys(hints[field.name], f"{prefix}{field.name}.")
        else:
            keys[f"{prefix}{field.name}"] = field
    return keys


def item_class(hint: Any) -> type | None:
    """The section that each entry of a list is, or None for other types."""
    args = typing.get_args(hint)
    is_list = typing.get_origin(hint) is list and dataclasses.is_dataclass(args[0])
    return typing.cast(type, args[0]) if is_list else None


def suggest(key: str, cls: type) -> str:
    """ " Did you mean optim.lr?" for a misspelt key, or an empty string."""
    known = list(known_keys(cls))
    sections = sorted({k.rsplit(".", 1)[0] for k in known if "." in k})
    close = difflib.get_close_matches(key, known + sections, n=1, cutoff=0.6)
    if not close:
        leaf = key.rsplit(".", 1)[-1]
        by_leaf = {k.rsplit(".", 1)[-1]: k for k in reversed(known)}
        close = [by_leaf[m] for m in difflib.get_close_matches(leaf, list(by_leaf), n=1, cutoff=0.7)]
    return f"; did you mean {close[0]}?" if close else ""


def describe_type(hint: Any, limits: Mapping[str, float] | None = None) -> str:
    """A type, and its limits, as a user would say it: "integer >= 1 or null", "one of a, b"."""
    if typing.get_origin(hint) is Literal:
        words = [str(a) for a in typing.get_args(hint)]
        return words[0] if len(words) == 1 else "one of " + ", ".join(words)
    if _is_union(hint):
        return " or ".join(describe_type(a, limits) for a in typing.get_args(hint))
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    within = f" {describe_limits(dict(limits))}" if limits else ""
    if item_class(hint) is not None:
        return f"a list of mappings with {', '.join(f.name for f in dataclasses.fields(args[0]))}"
    if origin is list:
        names = {int: "integers", float: "numbers", str: "texts"}
        return f"a list of {names[args[0]]}{within}"
    if origin is dict:
        return "a mapping"
    names = {int: f"integer{within}", float: f"number{within}", str: "text", bool: "true or false", type(None): "null"}
    return names.get(hint, str(hint))


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (Union, types.UnionType)


def _build(cls: type, values: Any, prefix: str, problems: list[Problem], root: type) -> Any:
    if not isinstance(values, Mapping):
        problems.append(Problem(prefix.rstrip("."), f"is a section with options of its own, got {values!r}"))
        return None
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in values:
        if key not in fields:
            full = f"{prefix}{key}"
            problems.append(Problem(full, f"is not an option{suggest(full, root)}"))
    kwargs = {}
    for name, field in fields.items():
        if name not in values:
            continue
        hint, full = hints[name], f"{prefix}{name}"
        if dataclasses.is_dataclass(hint):
            built = _build(typing.cast(type, hint), values[name], f"{full}.", problems, root)
            if built is not None:
                kwargs[name] = built
            continue
        item = item_class(hint)
        if item is not None:
            kwargs[name] = _build_items(item, values[name], full, problems)
            continue
        found, value = _convert(values[name], hint)
        if not found:
            problems.append(Problem(full, f"got {values[name]!r}; allowed: {describe_type(hint)}"))
            continue
        limits = field.metadata["limits"]
        numbers = value if isinstance(value, list) else [value]
        bad = [n for n in numbers if isinstance(n, int | float) and not isinstance(n, bool) and not _within(n, limits)]
        if bad:
            problems.append(Problem(full, f"got {bad[0]!r}; allowed: {describe_limits(limits)}"))
            continue
        kwargs[name] = value
    return cls(**kwargs)


def _build_items(item: type, values: Any, full: str, problems: list[Problem]) -> list[Any]:
    """Each entry of a list of sections; what does not fit is left out."""
    if not isinstance(values, list | tuple):
        problems.append(Problem(full, f"got {values!r}; allowed: {describe_type(list[item])}"))  # type: ignore[valid-type]
        return []
    built = [_build(item, value, f"{full}[{i}].", problems, item) for i, value in enumerate(values)]
    return [entry for entry in built if entry is not None]


def _within(number: float, limits: Mapping[str, float]) -> bool:
    return (
        number == number
        and not (("ge" in limits and number < limits["ge"]) or ("gt" in limits and number <= limits["gt"]))
        and not (("le" in limits and number > limits["le"]) or ("lt" in limits and number >= limits["lt"]))
    )


def _convert(value: Any, hint: Any) -> tuple[bool, Any]:
    """(fits, value as the hinted type). Only loss-free changes: 1 -> 1.0, 1e3 -> 1000, "1e-5" -> 0.00001."""
    if _is_union(hint):
        for arg in sorted(typing.get_args(hint), key=lambda a: a is float):
            fits, converted = _convert(value, arg)
            if fits:
                return True, converted
        return False, None
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True, value
    if origin is Literal:
        # YAML reads a bare off/no/none-like word as a boolean or null; the allowed words are what counts.
        for allowed in args:
            if value == allowed and type(value) is type(allowed):
                return True, allowed
        if value is None and "none" in args:
            return True, "none"
        return False, None
    if origin is list:
        if not isinstance(value, list | tuple):
            return False, None
        items = [_convert(v, args[0]) for v in value]
        return all(ok for ok, _ in items), [v for _, v in items]
    if origin is dict:
        if not isinstance(value, Mapping):
            return False, None
        pairs = {k: _convert(v, args[1]) for k, v in value.items()}
        return all(ok for ok, _ in pairs.values()), {k: v for k, (_, v) in pairs.items()}
    if hint is type(None):
        return value is None, None
    if hint is bool:
        return isinstance(value, bool), value
    if hint is int:
        if isinstance(value, bool):
            return False, None
        if isinstance(value, float) and value.is_integer():
            return True, int(value)
        return isinstance(value, int), value
    if hint is float:
        if isinstance(value, str):
            try:
                return True, float(value)  # YAML 1.1 reads 1e-5 (no dot) as text
            except ValueError:
                return False, None
        return isinstance(value, int | float) and not isinstance(value, bool), float(value) if isinstance(
            value, int | float
        ) else None
    if hint is str:
        return isinstance(value, str), value
    raise AssertionError(f"no conversion for {hint}")


def _check(config: Any, prefix: str) -> Iterator[Problem]:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _check(value, f"{prefix}{field.name}.")
        if isinstance(value, list):
            for i, entry in enumerate(value):
                if dataclasses.is_dataclass(entry):
                    yield from _check(entry, f"{prefix}{field.name}[{i}].")
    if hasattr(config, "check"):
        for problem in config.check():
            yield Problem(f"{prefix}{problem.key}", problem.message)
