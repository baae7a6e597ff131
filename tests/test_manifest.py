"""manifest.json at the start of a run: what it was made from must still be that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.errors import CheckpointError
from rlhf_cli.runtime import manifest


def config(base: Path, lora: bool, trainable: str) -> dict[str, Any]:
    return {"model": {"path": str(base), "trainable": {"mode": trainable}}, "lora": {"enabled": lora}}


@pytest.mark.parametrize(
    ("lora", "trainable", "needed"), [(True, "all", True), (False, "last_layers", True), (False, "all", False)]
)
def test_a_run_does_not_go_on_over_another_base(tmp_path: Path, lora: bool, trainable: str, needed: bool) -> None:
    base, run_dir = tmp_path / "base", tmp_path / "run"
    base.mkdir()
    (base / "model.safetensors").write_bytes(b"one")
    begin = lambda: manifest.begin(run_dir, "rm", config(base, lora, trainable), 1)
    begun = begin()["base_digest"]
    assert (begun is not None) == needed
    (base / "model.safetensors").write_bytes(b"two")
    again = begin()["base_digest"]  # nothing was trained yet, so another base is as good
    assert (again != begun) == needed
    (run_dir / "checkpoints" / "step_00000001").mkdir(parents=True)
    assert begin()["base_digest"] == again
    (base / "model.safetensors").write_bytes(b"three")
    if not needed:  # a checkpoint has all weights that are trained, and these are all
        begin()
        return
    with pytest.raises(CheckpointError, match=f"the model in {base} has changed since .* was started from it"):
        begin()
