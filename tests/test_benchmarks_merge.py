"""The arithmetic of the merge benchmark's table. The programs themselves are not run here."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "scripts" / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    spec = importlib.util.spec_from_file_location("merge_benchmark", BENCHMARKS / "merge.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_table_shows_medians_and_ratios(script: Any) -> None:
    runs = {
        "rlhf merge-lora": [script.Merged(2.0, 90.0), script.Merged(9.0, 100.0), script.Merged(3.0, 110.0)],
        "merge_and_unload": [script.Merged(4.0, 1000.0), script.Merged(6.0, 1000.0), script.Merged(7.0, 1200.0)],
    }
    # Medians 3 s and 100 MiB against 6 s and 1000 MiB; a model of 800 MiB: 100 / 800 and 1000 / 800.
    lines = script.table(runs, {"rlhf merge-lora": 0.0, "merge_and_unload": 0.25}, 800 * 2**20).splitlines()
    assert lines[2] == "| rlhf merge-lora | 3.00 | 0.50 | 100 | 0.100 | 0.125 | 0.00% |"
    assert lines[3] == "| merge_and_unload | 6.00 | 1.00 | 1,000 | 1.000 | 1.250 | 25.00% |"
