"""How an option is declared: a dataclass field with its default, its meaning and its limits, all in one place."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from typing import Any

from rlhf_cli.errors import Problem


def opt(
    default: Any,
    help: str,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
) -> Any:
    """A config option. `default` may be a value, or a list/dict (copied for each config).

    ge, gt, le, lt: limits for numbers (each number of a list), checked when the config is built.
    """
    limits = {k: v for k, v in {"ge": ge, "gt": gt, "le": le, "lt": lt}.items() if v is not None}
    metadata = {"help": help, "limits": limits}
    if isinstance(default, list | dict):
        factory: Callable[[], Any] = lambda: type(default)(default)
        return dataclasses.field(default_factory=factory, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def section(cls: type, help: str) -> Any:
    """A nested section, always present (its options carry the defaults)."""
    return dataclasses.field(default_factory=cls, metadata={"help": help, "limits": {}})


def unread(config: Any, names: tuple[str, ...], reader: str, prefix: str = "") -> Iterator[Problem]:
    """Problems with options that were set although nothing would read them. reader: the setting with which it would."""
    default = type(config)()
    for name in names:
        unset = getattr(default, name)
        if getattr(config, name) == unset:
            continue
        if dataclasses.is_dataclass(unset):
            leave = "drop it"
        else:  # as it is typed: null, false
            leave = f"leave it at {unset if isinstance(unset, str) else json.dumps(unset)}"
        yield Problem(f"{prefix}{name}", f"is read with {reader} only; set that, or {leave}")


LIMIT_WORDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


def describe_limits(limits: dict[str, float]) -> str:
    """`{"gt": 0, "le": 1}` -> "> 0 and <= 1"."""
    return " and ".join(f"{LIMIT_WORDS[k]} {v:g}" for k, v in limits.items())
