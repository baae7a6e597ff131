"""What lies where in a run directory, and its manifest. Shared by the front and the ranks; standard library only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rlhf_cli.errors import ModelError


def read_manifest(run_dir: Path) -> dict[str, Any]:
    """The manifest of a run directory, or {} when there is none (yet).

    Raises ModelError when it is damaged.
    """
    path = run_dir / "manifest.json"
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is damaged ({error}); run that stage again in a new run_dir") from None
