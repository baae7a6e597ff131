"""Evaluation rows that this run or an earlier one has trained on."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from rlhf_cli.data.seen import FILE, find_seen, save_row_digests
from rlhf_cli.files import write_json


def run(folder: Path, trained: list[int] | None, *parents: Path) -> Path:
    """A run directory that trained on these digests; None: one that does not say."""
    folder.mkdir()
    entries = [{"role": "policy", "run_dir": str(parent), "digest": "d"} for parent in parents]
    write_json(folder / "manifest.json", {"parents": entries, "data": [{"path": "x"}]})
    if trained is not None:
        save_row_digests(folder, np.array(trained, np.uint64))
    return folder


def found(run_dir: Path, texts: list[int], owners: list[int]) -> dict[str, int | None]:
    seen = find_seen(run_dir, np.array(texts, np.uint64), np.array(owners))
    return {Path(s.run_dir).name: s.rows for s in seen}


def test_every_ancestor_is_asked_and_a_pair_counts_once(tmp_path: Path) -> None:
    grand = run(tmp_path / "grand", [1, 2, 3])
    parent = run(tmp_path / "parent", [5], grand)
    here = run(tmp_path / "here", [7, 8], parent)
    # three pairs: (1, 2) both known to grand, (9, 3) one of them, (4, 6) none
    assert found(here, [1, 2, 9, 3, 4, 6], [0, 0, 1, 1, 2, 2]) == {"grand": 2}
    assert found(here, [5, 8], [0, 1]) == {"here": 1, "parent": 1}
    assert found(here, [4], [0]) == {}


def test_a_run_that_cannot_tell_is_named(tmp_path: Path) -> None:
    silent = run(tmp_path / "silent", None)
    assert found(run(tmp_path / "here", [7], silent, tmp_path / "gone"), [4], [0]) == {"silent": None, "gone": None}


def test_a_run_without_data_of_its_own_passes_the_question_on(tmp_path: Path) -> None:
    """rlhf merge-lora trains on nothing; its adapter's run did."""
    adapter = run(tmp_path / "adapter", [1])
    merged = tmp_path / "merged"
    merged.mkdir()
    entries = [{"role": "adapter", "run_dir": str(adapter)}, {"role": "base", "path": "gpt2"}]
    write_json(merged / "manifest.json", {"parents": entries, "data": []})
    assert found(run(tmp_path / "here", [7], merged), [1], [0]) == {"adapter": 1}


def test_circles_end_and_damaged_relatives_are_passed_over(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    run(one, [1], two)
    run(two, [2], one)
    assert found(one, [1, 2], [0, 1]) == {"one": 1, "two": 1}
    (two / "manifest.json").write_text("{")
    (two / FILE).unlink()
    assert found(one, [2], [0]) == {}
