"""Where weights and tokenizers come from: a local directory or a hub id; and what to say when they do not."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import is_offline_mode

from rlhf_cli.errors import ModelError

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def check_source(path: Path | str, key: str) -> None:
    """Raise ModelError unless `path` is an existing directory or could be a hub id."""
    local = Path(path).expanduser()
    if local.is_dir():
        return
    if local.exists():
        raise ModelError(f"{key}: {path} is a file; name the directory that holds config.json and the weights")
    if isinstance(path, Path) or str(path).startswith(("/", ".", "~")) or not HUB_ID.fullmatch(str(path)):
        raise ModelError(f"{key}: {path} does not exist; allowed: a run directory, a local HF directory, or a hub id")


def explain_load_error(error: Exception, path: Path | str, what: str) -> ModelError:
    """The message for a `from_pretrained` that failed."""
    first = str(error).strip().split("\n")[0] or type(error).__name__
    if "trust_remote_code" in str(error):
        return ModelError(
            f"{path}: the {what} needs Python code that comes with it, which is not run unless you trust the source;"
            " then set model.trust_remote_code=true"
        )
    if Path(path).expanduser().is_dir():
        return ModelError(f"{path}: the {what} cannot be loaded: {first}")
    if is_offline_mode():
        return ModelError(
            f"{path} is no local directory, and the {what} is not in the local cache (HF_HUB_OFFLINE is set);"
            " download it first (hf download), name a local directory, or unset HF_HUB_OFFLINE"
        )
    return ModelError(
        f"{path} is no local directory, and the {what} could not be had from the hub: {first};"
        " check the name, the network and your access rights, or name a local directory"
    )
