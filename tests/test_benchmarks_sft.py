"""The arithmetic of the benchmark's tables, and its documents. The programs themselves are not run here."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "scripts" / "benchmarks"


@pytest.fixture
def scripts() -> Iterator[Any]:
    """The scripts as modules; they find each other the way they do when they are started."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import _material
        import _mfu
        import _probe
        import _table

        yield SimpleNamespace(material=_material, mfu=_mfu, probe=_probe, table=_table)
    finally:
        sys.path.remove(str(BENCHMARKS))


def test_speed_leaves_out_the_first_steps(scripts: Any) -> None:
    # Step ends at 10, 30, 31, 33 s. Without two steps: 40 + 60 tokens between 30 and 33 s.
    probe = scripts.probe.Probe(times=[10.0, 30.0, 31.0, 33.0], tokens=[1000, 1000, 40, 60])
    assert scripts.table.speed(probe, 2) == pytest.approx(100 / 3)


def test_table_shows_medians_and_ratios(scripts: Any) -> None:
    def probes(speeds: list[float], peak: float) -> list[Any]:
        return [
            scripts.probe.Probe(100.0, peak, times=[0.0, 1.0], tokens=[1, int(s)], losses=[2.0, 1.5]) for s in speeds
        ]

    rows = [
        scripts.table.summarise("ours", probes([400, 500, 900], 150.0), 1),
        scripts.table.summarise("trl", probes([200, 260, 250], 350.0), 1),
    ]
    assert rows[0].speed == 500
    assert rows[0].spread == pytest.approx((900 - 400) / 500)
    # 16 bytes for each of 1.25 Mi parameters are 20 MiB; ours takes 150 - 100 = 50 MiB, TRL 350 - 100 = 250.
    table = scripts.table.comparison(rows, "trl", 1_310_720)
    assert "| ours | 500 | 100% | 2.00 | 50 | 0.20 | 2.50 | 2.00000, 1.50000 |" in table
    assert "| trl | 250 | 24% | 1.00 | 250 | 1.00 | 12.50 | 2.00000, 1.50000 |" in table


def test_work_and_layers_of_a_shape(scripts: Any) -> None:
    shape = scripts.mfu.Shape(8, 2, 16, full_layers=4, vocab=100, length=10, micro_batch=1)
    block = 4 * 8 * 8 + 3 * 8 * 16  # 640: q, k, v, o and gate, up, down
    # 6 for each multiplied weight (the head is, the input embedding is not), 6 · 10 · 8 for attention in each layer
    assert scripts.mfu.flops_per_token(shape, 2) == 6 * (2 * block + 800) + 2 * 480
    # two embeddings of 800 and two layers fill (1600 + 1280) · 20 bytes exactly
    assert scripts.mfu.layers_that_fit(shape, 57_600) == 2
    assert scripts.mfu.layers_that_fit(shape, 57_599) == 1


def test_documents_are_ragged_and_in_the_order_of_our_run(scripts: Any, tmp_path: Path) -> None:
    from rlhf_cli.data import plan
    from rlhf_cli.models.tokenizer import load_tokenizer

    job = {"out": str(tmp_path), "seed": 3, "vocab": 600, "median_length": 24, "min_length": 6, "max_length": 64,
           "documents": 40, "weights": False}  # fmt: skip
    scripts.material.main(job)
    documents, in_order = (
        [json.loads(line)["text"] for line in (tmp_path / name).read_text().splitlines()]
        for name in ("documents.jsonl", "in_order.jsonl")
    )
    course = plan.Course(40, None, 8, seed=3)
    assert in_order == [documents[row] for step in range(5) for row in course.rows(step)]
    tokenizer = load_tokenizer(tmp_path / "model")
    lengths = np.array([len(tokenizer(text).input_ids) + 1 for text in documents])
    assert json.loads((tmp_path / "tokens.json").read_text()) == lengths.sum()
    assert lengths.max() <= 64
    assert len(set(lengths.tolist())) > 10
    assert 16 < np.median(lengths) <= 24


def test_words_differ(scripts: Any) -> None:
    words = scripts.material.pseudo_words(random.Random(0), 500)
    assert len(set(words)) == 500


def test_a_process_knows_its_memory() -> None:
    # 200 MiB written and given back: the high-water mark remembers them.
    code = "import _probe as p; a = p.high_water_mib(); b = b'x' * (200 << 20); del b; print(p.high_water_mib() - a)"
    done = subprocess.run([sys.executable, "-c", code], cwd=BENCHMARKS, capture_output=True, text=True, check=True)
    assert 198 < float(done.stdout) < 210
