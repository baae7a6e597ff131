"""Options that were typed although nothing would read them: their switch is off.

Only words of the command line are looked at: a recipe may keep the rank of an adapter that `lora=none` switches off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from rlhf_cli.errors import Problem


class Switch(NamedTuple):
    """options: full names, or a section with a dot at its end; setting: what has to be set; is_on: whether it is."""

    options: tuple[str, ...]
    setting: str
    is_on: Callable[[Any], bool]


SWITCHES = (
    Switch(
        ("lora.r", "lora.alpha", "lora.dropout", "lora.target_modules"),
        "lora.enabled=true (or lora=r16)",
        lambda c: c.lora.enabled,
    ),
    Switch(("model.arch.",), "model.init=scratch", lambda c: c.model.init == "scratch"),
    Switch(
        ("model.tokenizer.vocab_size",),
        "model.tokenizer.train=bpe, word or char",
        lambda c: c.model.tokenizer.train != "none",
    ),
    Switch(
        ("model.trainable.last_layers",),
        "model.trainable.mode=last_layers",
        lambda c: c.model.trainable.mode == "last_layers",
    ),
    Switch(
        ("model.trainable.patterns",), "model.trainable.mode=patterns", lambda c: c.model.trainable.mode == "patterns"
    ),
    Switch(
        ("model.trainable.lisa_layers", "model.trainable.lisa_interval"),
        "model.trainable.mode=lisa",
        lambda c: c.model.trainable.mode == "lisa",
    ),
    Switch(
        ("optim.min_lr_ratio",),
        "optim.schedule=linear or cosine",
        lambda c: c.optim.schedule in ("linear", "cosine"),
    ),
    Switch(
        ("optim.min_warmup_steps",),
        "optim.warmup_ratio > 0",
        lambda c: c.optim.warmup_ratio > 0 or c.optim.min_warmup_steps == 0,  # none at all may be said of both
    ),
    Switch(
        ("train.early_stopping.min_delta",),
        "train.early_stopping.patience > 0",
        lambda c: c.train.early_stopping.patience > 0,
    ),
    Switch(("generation.num_prompts",), "generation.prompts=[]", lambda c: not c.generation.prompts),
    Switch(("logging.wandb_project",), "logging.wandb=true", lambda c: c.logging.wandb),
)


def idle_options(config: Any, typed: Sequence[str]) -> Iterator[Problem]:
    """typed: keys that the command line sets, all of them options of this config's stage."""
    for switch in SWITCHES:
        for key in typed:
            if key.startswith(switch.options) and not switch.is_on(config):
                yield Problem(key, f"is read with {switch.setting} only; set that, or drop it")
