"""Checkpoints on disk: complete or not there, checked before use, pruned, and safe from kill -9."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from rlhf_cli.errors import CheckpointError, RunFailed
from rlhf_cli.runtime import checkpoint
from rlhf_cli.runtime.distributed import Ranks, gather_objects
from rlhf_cli.runtime.seed import rng_state, seed_everything, set_rng_state

pytestmark = pytest.mark.distributed
ROOT = Path(__file__).resolve().parent.parent


def save_steps(ranks: Ranks, run_dir: str, steps: list[int], keep: int = 3) -> list[str]:
    """Save small checkpoints; the names in the directory afterwards."""

    def write(directory: Path) -> None:
        (directory / f"part-{ranks.rank}").write_bytes(bytes([ranks.rank]) * 1000)

    for step in steps:
        checkpoint.save(Path(run_dir), step, ranks, {"engine": write}, {"at": step}, keep, 2000)
    return sorted(path.name for path in (Path(run_dir) / "checkpoints").iterdir())


def load_newest(ranks: Ranks, run_dir: str) -> tuple[int, dict[str, Any], bool, list[int], float]:
    path = checkpoint.newest_valid(Path(run_dir), print)
    assert path is not None
    sizes: list[int] = []
    loaded = checkpoint.load(path, {"engine": lambda d: sizes.append(len(list(d.iterdir())))}, ranks, seed=3)
    return (*loaded, sizes, float(torch.rand(())))


def names(*steps: int) -> list[str]:
    return [f"step_{step:08d}" for step in steps]


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_save_and_load(run_on_ranks: Any, tmp_path: Path) -> None:
    assert run_on_ranks(2, "tests.test_checkpoint:save_steps", run_dir=str(tmp_path), steps=[500]) == [names(500)] * 2
    path = tmp_path / "checkpoints" / "step_00000500"
    files = ["engine/part-0", "engine/part-1", "loop_state.json", "rng-00000.json", "rng-00001.json"]
    assert sorted(json.loads((path / "digests.json").read_text())) == files
    assert checkpoint.find_damage(path) is None
    for step, loop_state, restored, sizes, _ in run_on_ranks(
        2, "tests.test_checkpoint:load_newest", run_dir=str(tmp_path)
    ):
        assert (step, loop_state, restored, sizes) == (500, {"at": 500}, True, [2])


def test_other_world_size_seeds_from_seed_rank_step(run_on_ranks: Any, tmp_path: Path) -> None:
    run_on_ranks(2, "tests.test_checkpoint:save_steps", run_dir=str(tmp_path), steps=[40])
    _, _, restored, _, drawn = run_on_ranks(1, "tests.test_checkpoint:load_newest", run_dir=str(tmp_path))[0]
    assert not restored
    before = torch.get_rng_state()
    seed_everything(3, 0, 40)
    assert drawn == float(torch.rand(()))
    torch.set_rng_state(before)


def test_old_ones_are_pruned(run_on_ranks: Any, tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    case = {"case": "tests.test_checkpoint:save_steps", "run_dir": str(tmp_path)}
    assert run_on_ranks(1, steps=[1, 2, 3, 4], keep=2, **case)[0] == names(3, 4)
    (root / "notes").mkdir()  # not ours
    (root / "step_5").mkdir()
    assert run_on_ranks(1, steps=[5], keep=2, **case)[0] == ["notes", *names(4, 5), "step_5"]
    # A run that went back to step 4 (because 5 was damaged) leaves nothing of the abandoned future behind.
    assert run_on_ranks(1, steps=[4], keep=1, **case)[0] == ["notes", *names(4), "step_5"]


def test_same_step_again_replaces(run_on_ranks: Any, tmp_path: Path) -> None:
    case = {"case": "tests.test_checkpoint:save_steps", "run_dir": str(tmp_path), "keep": 1}
    run_on_ranks(1, steps=[7], **case)
    damage(tmp_path / "checkpoints" / "step_00000007" / "engine" / "part-0")
    assert run_on_ranks(1, steps=[7], **case)[0] == names(7)
    assert checkpoint.find_damage(tmp_path / "checkpoints" / "step_00000007") is None


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("flip", "file engine/part-0: digest differs"),
        ("missing", "file engine/part-0: missing"),
        ("digests", "file digests.json: missing"),
        ("cut", "file digests.json: not readable"),
        ("empty", "file digests.json: incomplete"),
    ],
)
def test_damaged_falls_back(run_on_ranks: Any, tmp_path: Path, what: str, said: str) -> None:
    run_on_ranks(1, "tests.test_checkpoint:save_steps", run_dir=str(tmp_path), steps=[1, 2])
    newest = tmp_path / "checkpoints" / "step_00000002"
    if what == "flip":
        damage(newest / "engine" / "part-0")
    elif what == "missing":
        (newest / "engine" / "part-0").unlink()
    elif what == "digests":
        (newest / "digests.json").unlink()
    elif what == "cut":
        (newest / "digests.json").write_text('{"loop_state.json": "12')
    else:
        (newest / "digests.json").write_text("{}")
    reports: list[str] = []
    assert checkpoint.newest_valid(tmp_path, reports.append) == newest.with_name("step_00000001")
    assert reports == [f"checkpoint step_00000002 is damaged ({said}); going back to step_00000001"]
    shutil.rmtree(newest.with_name("step_00000001"))
    assert checkpoint.newest_valid(tmp_path, reports.append) is None
    assert reports[1].endswith("no older one is left")


def test_nothing_there(tmp_path: Path) -> None:
    assert checkpoint.newest_valid(tmp_path, pytest.fail) is None


def test_leftovers_of_a_killed_save(run_on_ranks: Any, tmp_path: Path) -> None:
    run_on_ranks(1, "tests.test_checkpoint:save_steps", run_dir=str(tmp_path), steps=[1, 2])
    root = tmp_path / "checkpoints"
    shutil.copytree(root / "step_00000002", root / ".tmp-step_00000003")
    shutil.copytree(root / "step_00000001", root / ".old-step_00000001")
    (root / "step_00000002").rename(root / ".old-step_00000002")  # killed between the two renames
    assert checkpoint.newest_valid(tmp_path, pytest.fail) == root / "step_00000002"
    assert sorted(path.name for path in root.iterdir()) == names(1, 2)


def test_full_disk_is_noticed_before_writing(run_on_ranks: Any, tmp_path: Path) -> None:
    for message, left in run_on_ranks(2, "tests.test_checkpoint:save_without_room", run_dir=str(tmp_path)):
        assert message == (
            f"no room for a checkpoint in {tmp_path}/checkpoints: needs 3.07 GB, free are 1.00 GB;"
            " make room and start the same command again"
        )
        assert left == []


def save_without_room(ranks: Ranks, run_dir: str) -> tuple[str, list[str]]:
    usual = checkpoint.shutil.disk_usage
    usage = namedtuple("usage", "total used free")
    checkpoint.shutil.disk_usage = lambda path: usage(2 * 10**9, 10**9, 10**9)
    try:
        with pytest.raises(RunFailed) as caught:
            # 3e9 bytes + 64 MiB of headroom = 3.067e9
            checkpoint.save(Path(run_dir), 1, ranks, {"engine": pytest.fail}, {}, 1, bytes_needed=3 * 10**9)
    finally:
        checkpoint.shutil.disk_usage = usual
    return str(caught.value), sorted(path.name for path in (Path(run_dir) / "checkpoints").iterdir())


def test_one_rank_that_cannot_write_fails_all(run_on_ranks: Any, tmp_path: Path) -> None:
    for message in run_on_ranks(2, "tests.dist_cases:unwritable_shard", run_dir=str(tmp_path)):
        assert message.startswith("could not write a checkpoint: ")
        assert ".tmp-step_00000007/engine" in message
    assert list((tmp_path / "checkpoints").iterdir()) == []


def save_with_two_writers(ranks: Ranks, run_dir: str, failing: list[str]) -> str:
    """What each rank is told when some of two writers, such as PPO's, cannot write on the last rank."""

    def writer(name: str) -> Any:
        def write(directory: Path) -> None:
            gather_objects(name)
            if name in failing and ranks.rank == ranks.world_size - 1:
                raise SafetensorError(f"no room for {name}") if name == "critic" else OSError(f"no room for {name}")
            (directory / f"part-{ranks.rank}").write_text(name)

        return write

    writers = {name: writer(name) for name in ("policy", "critic")}
    try:
        checkpoint.save(Path(run_dir), 1, ranks, writers, {}, 1, 0)
    except RunFailed as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("failing", [["policy"], ["critic"], ["policy", "critic"]])
def test_a_writer_that_fails_on_one_rank_leaves_nobody_waiting(
    run_on_ranks: Any, tmp_path: Path, failing: list[str]
) -> None:
    told = run_on_ranks(
        2, "tests.test_checkpoint:save_with_two_writers", timeout=20.0, run_dir=str(tmp_path), failing=failing
    )
    assert told == [f"could not write a checkpoint: no room for {failing[0]}"] * 2
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_other_format_is_refused(run_on_ranks: Any, tmp_path: Path) -> None:
    run_on_ranks(1, "tests.test_checkpoint:save_steps", run_dir=str(tmp_path), steps=[1])
    path = tmp_path / "checkpoints" / "step_00000001"
    state = json.loads((path / "loop_state.json").read_text())
    (path / "loop_state.json").write_text(json.dumps({**state, "schema_version": 99}))
    alone = Ranks(0, 1, 0, torch.device("cpu"))
    with pytest.raises(CheckpointError, match="has format 99, this version of rlhf reads format 1"):
        checkpoint.load(path, {}, alone, seed=0)


# Three renames of a save: (a) an old one of the same step aside, where there is one, (b) the new one into place; the
# first save of each trial has both, because it starts at the step that exists. fsync comes before and between them.
KILLS = [
    0.0,
    "rename 1 before",
    "rename 1 after",
    "rename 2 before",
    "rename 2 after",
    "fsync 1 before",
    "fsync 8 after",
    "rename 4 after",
    *["random"] * 10,
]


def test_kill_minus_nine_during_saves(tmp_path: Path) -> None:
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kill_saves", str(tmp_path / "run"), json.dumps(KILLS)],
        cwd=ROOT,
        env={**env, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "damaged" not in done.stderr  # nothing incomplete ever has its final name
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) == len(KILLS)
    newest = 0
    for result in results:
        assert result["found"] == result["content"]
        newest = max(newest, result["done"] or 0)
        # With keep=1 there is only one other to fall back to, and it was never given up.
        assert newest <= result["found"] <= newest + 1
        newest = result["found"]
    assert any(result["leftovers"] for result in results)  # some were killed in the middle


def test_rng_state_is_exact() -> None:
    before = rng_state()
    seed_everything(1, 2)
    np.random.standard_normal()  # leaves a cached second normal behind
    state = json.loads(json.dumps(rng_state()))
    first = [np.random.standard_normal(), np.random.rand(), float(torch.randn(())), random.gauss(0, 1)]
    set_rng_state(state)
    assert first == [
        np.random.standard_normal(),
        np.random.rand(),
        float(torch.randn(())),
        random.gauss(0, 1),
    ]
    seed_everything(1, 3)
    assert float(torch.randn(())) != first[2]
    set_rng_state(before)
