"""What the files of a model tell without loading it: what it is, what it was made from, its vocabulary.

Standard library only. Whatever the files do not tell is None, and left to the run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rlhf_cli.errors import ModelError
from rlhf_cli.rundir import read_manifest, run_of

ADAPTER, WHOLE = "adapter_config.json", "config.json"


def model_folder(path: str) -> Path | None:
    """The directory of the weights behind a run directory or a model directory; None for a hub id."""
    local = Path(path).expanduser()
    if not local.is_dir():
        return None
    output = manifest_of(local).get("output") or {}
    return local / str(output["path"]) if output.get("path") and run_of(local) == local else local


def manifest_of(place: Path) -> dict[str, Any]:
    """The manifest of a run directory, or of the run whose model directory this is; {} without a readable one."""
    try:
        run_dir = run_of(place)
        return read_manifest(run_dir) if run_dir is not None else {}
    except ModelError:
        return {}  # said by the check of the path


def is_adapter(folder: Path) -> bool:
    """Whether a directory holds an adapter in PEFT's layout and no whole model."""
    return (folder / ADAPTER).is_file() and not (folder / WHOLE).is_file()


def is_reward_model(folder: Path) -> bool:
    """Whether a directory holds a sequence classifier, or the adapter of one."""
    if is_adapter(folder):
        return read_json(folder / ADAPTER).get("task_type") == "SEQ_CLS"
    names = read_json(folder / WHOLE).get("architectures") or []
    return any(str(name).endswith("ForSequenceClassification") for name in names)


def num_positions(folder: Path) -> int | None:
    """Tokens that a model has positions for."""
    settings = read_json(folder / WHOLE)
    settings = settings.get("text_config") or settings
    found = settings.get("max_position_embeddings", settings.get("n_positions"))  # the second is GPT-2's
    return found if isinstance(found, int) else None


def tokenizer_difference(ours: Path, theirs: Path) -> str | None:
    """How the ids of two models' tokens differ, in words; None when they do not."""
    left, right = _vocabulary(ours), _vocabulary(theirs)
    if left is None or right is None or left == right:
        return None
    token = min((t for t in left.keys() | right.keys() if left.get(t) != right.get(t)), key=lambda t: (len(t), t))
    ids = [str(v[token]) if token in v else "none" for v in (left, right)]
    return f"{len(left)} and {len(right)} tokens; {token!r} is {ids[0]} in one and {ids[1]} in the other"


def _vocabulary(folder: Path) -> dict[str, int] | None:
    """token -> id, added ones included, from tokenizer.json; an adapter may leave that to its base."""
    if not (folder / "tokenizer.json").is_file() and is_adapter(folder):
        folder = Path(str(read_json(folder / ADAPTER).get("base_model_name_or_path"))).expanduser()
    file = read_json(folder / "tokenizer.json")
    found = (file.get("model") or {}).get("vocab")
    if isinstance(found, list):  # Unigram: [token, score] in the order of their ids
        found = {entry[0]: number for number, entry in enumerate(found)}
    if not isinstance(found, dict):
        return None
    return found | {entry["content"]: entry["id"] for entry in file.get("added_tokens") or []}


def read_json(path: Path) -> dict[str, Any]:
    """What a JSON file holds; {} when there is none, or none that can be read (the run will say so)."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
