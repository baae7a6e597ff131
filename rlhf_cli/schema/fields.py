"""How an option is declared: a dataclass field with its default, its meaning and its limits, all in one place."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any


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


LIMIT_WORDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


def describe_limits(limits: dict[str, float]) -> str:
    """`{"gt": 0, "le": 1}` -> "> 0 and <= 1"."""
    return " and ".join(f"{LIMIT_WORDS[k]} {v:g}" for k, v in limits.items())
