"""`rlhf raft` from its config to its run directory, in the ranks of a test pool."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.rundir import read_manifest
from rlhf_cli.runtime.metrics import read_metrics
from tests.raft_cases import Given, done_in, equal, lines, said, trail, weights
from tests.stage_cases import write_prompts

RAFT, CUT, REFUSED = (f"tests.raft_cases:run_raft{name}" for name in ("", "_cut", "_refused"))
Ranks = Callable[..., list[Any]]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Given:
    return Given(tmp_path_factory.mktemp("given"))


# --- cut short, and started again


@pytest.fixture(scope="module")
def whole(given: Given, run_on_ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupts."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    run_on_ranks(1, RAFT, run_dir=str(run_dir), overrides=given.words(raft__optimizer="continue"))
    return run_dir


def assert_same_run(whole: Path, cut: Path) -> None:
    """Bitwise, and nothing was written or scored twice on the way."""
    assert read_manifest(cut)["status"] == "complete"
    for model in ("model", "last_policy"):
        assert equal(weights(whole, model), weights(cut, model)), model
    timeless = lambda line: {k: v for k, v in line.items() if not k.startswith("perf/") and k != "seconds"}
    logged = [[timeless(line) for line in read_metrics(run)] for run in (whole, cut)]
    assert logged[0] == logged[1]
    assert timeless(read_manifest(whole)["metrics"]) == timeless(read_manifest(cut)["metrics"])
    for iteration in (1, 2, 3):
        assert trail(whole, iteration) == trail(cut, iteration)
    for kind in ("generated", "scored"):
        assert sorted(done_in(whole, kind)) == sorted(done_in(cut, kind)), kind
    assert len(set(done_in(cut, "generated"))) == 48, "each has noise of its own"
    names = sorted(path.name for path in (cut / "samples").iterdir() if "iteration" in path.name)
    assert names == ["iteration_01", "iteration_02", "iteration_03"]


STOPS = [("write", 1, 7), ("score", 1, 3), ("measure", 1, 1), ("publish", 1, 1), ("tune", 1, 2), ("evaluate", 1, 1)]
KILLS = [("write", 2, 7), ("score", 1, 3), ("measure", 1, 1), ("publish", 1, 1), ("tune", 1, 2), ("evaluate", 1, 1),
         ("save", 1, 1), ("end", 1, 1)]  # fmt: skip


@pytest.mark.parametrize(
    ("cuts", "kill", "save_every"),
    [(STOPS, False, 1), (KILLS, True, 1), ([("tune", 2, 2), ("write", 3, 5)], True, 0)],
    ids=["stopped", "killed", "killed without checkpoints"],
)
def test_cut_in_any_phase_it_ends_with_the_same_weights_and_does_nothing_twice(
    given: Given, run_on_ranks: Ranks, whole: Path, tmp_path: Path, cuts: Any, kill: bool, save_every: int
) -> None:
    """Each start is cut in another phase of the first, second or third iteration that it comes to."""
    run_dir, overrides = tmp_path / "run", given.words(raft__optimizer="continue", train__save_every=save_every)
    for phase, begun, count in cuts:
        how = {"phase": phase, "iterations": begun, "count": count, "kill": kill}
        (nothing,) = run_on_ranks(1, CUT, run_dir=str(run_dir), overrides=overrides, **how)
        assert nothing == {}
        assert read_manifest(run_dir)["status"] == ("running" if kill else "interrupted")
        if phase == "write":
            assert len(done_in(run_dir, "generated")) % 16, "in the middle"
        if phase == "publish" and not kill:
            steps = [path.name for path in (run_dir / "checkpoints").iterdir() if path.name.startswith("step")]
            assert steps == ["step_00000000"], "nothing is begun between a request to stop and the stop"
        if phase == "score":
            assert len(done_in(run_dir, "scored")) % 4, "in the middle"
    run_on_ranks(1, RAFT, run_dir=str(run_dir), overrides=overrides)
    assert_same_run(whole, run_dir)
    assert "responses were written before" in said(run_dir)


@pytest.mark.distributed
def test_responses_of_two_ranks_are_gone_on_with_by_one(
    given: Given, run_on_ranks: Ranks, whole: Path, tmp_path: Path
) -> None:
    run_dir, overrides = tmp_path / "run", given.words(raft__optimizer="continue")
    how = {"phase": "write", "iterations": 1, "count": 4, "kill": True}
    run_on_ranks(2, CUT, run_dir=str(run_dir), overrides=overrides, **how)
    parts = tmp_path / "run" / "samples" / ".iteration_01"
    written = [len((parts / f"written_{rank}.jsonl").read_text().splitlines()) for rank in (0, 1)]
    assert written == [3, 3]
    with (parts / "written_1.jsonl").open("a") as file:
        file.write('{"sample": 12, "respo')
    run_on_ranks(1, RAFT, run_dir=str(run_dir), overrides=overrides)
    assert "6 of 16 responses were written before" in said(run_dir)
    assert_same_run(whole, run_dir)
    for name in ("perf/mfu", "perf/samples_per_s", "perf/rollout_tokens_per_s"):
        assert [name in line for line in lines(run_dir)] == [False, True, True], "how long the six took is not known"


def test_other_data_and_a_lost_trail_are_told(given: Given, run_on_ranks: Ranks, tmp_path: Path) -> None:
    prompts = shutil.copy(given.prompts, tmp_path / "prompts.jsonl")
    run_dir, overrides = tmp_path / "run", given.words(data__path=prompts, raft__num_iterations=2)
    go_on = {"run_dir": str(run_dir), "overrides": overrides}
    at = lambda phase, count: {"phase": phase, "iterations": 1, "count": count}
    refused = lambda: run_on_ranks(1, REFUSED, **go_on)[0]
    run_on_ranks(1, CUT, **go_on, **at("write", 5), kill=True)
    write_prompts(Path(prompts), seed=1)
    assert "holds responses of another run (data differ); put the data back" in refused()
    shutil.copy(given.prompts, prompts)
    run_on_ranks(1, CUT, **go_on, **at("tune", 2), kill=False)
    write_prompts(Path(prompts), seed=1)
    assert "the data has changed since" in refused()
    shutil.copy(given.prompts, prompts)
    (run_dir / "samples" / "iteration_01").rename(tmp_path / "elsewhere")
    assert "iteration_01 is missing, from which iteration 1 had begun to learn; put it back" in refused()


# --- ranks


@pytest.mark.distributed
@pytest.mark.parametrize("strategy", ["local", "top"])
def test_any_number_of_ranks_draws_and_chooses_the_same(
    given: Given, run_on_ranks: Ranks, whole: Path, tmp_path: Path, strategy: str
) -> None:
    overrides = given.words(raft__optimizer="continue", raft__strategy=strategy)
    runs = [whole] if strategy == "local" else [tmp_path / "1"]
    if strategy == "top":
        run_on_ranks(1, RAFT, run_dir=str(runs[0]), overrides=[*overrides, "raft.num_iterations=2"])
    for world, more in ((2, ["deepspeed=zero3"]), (4, ["train.global_batch_size=4"])):
        run_on_ranks(world, RAFT, run_dir=str(tmp_path / str(world)), overrides=[*overrides, *more,
                     "raft.num_iterations=1" if world == 4 else "raft.num_iterations=2"])  # fmt: skip
        runs.append(tmp_path / str(world))
    for number, run_dir in enumerate(runs[1:], start=1):
        for iteration in (1,) if number == 2 else (1, 2):
            one, other = trail(runs[0], iteration), trail(run_dir, iteration)
            for key in ("prompt", "token_ids", "ending", "reward", "rank", "kept", "why_not"):
                assert [row[key] for row in one] == [row[key] for row in other], (run_dir.name, iteration, key)
            assert [row["sample"] for row in other if row["kept"]] == [
                row["sample"] for row in trail(run_dir, iteration, "selected")
            ]
        assert len(set(done_in(run_dir, "generated"))) == len(done_in(run_dir, "generated"))
    prompts = [row["prompt"] for row in trail(runs[0], 1)]
    assert len(set(prompts)) == (4 if strategy == "local" else 16), "no prompt is answered twice"


@pytest.mark.distributed
def test_two_ranks_cut_short(given: Given, run_on_ranks: Ranks, tmp_path: Path) -> None:
    overrides = given.words(raft__soft_temperature=0.1, raft__num_iterations=2)
    go_on = {"run_dir": str(tmp_path / "cut"), "overrides": overrides}
    run_on_ranks(2, CUT, **go_on, phase="score", iterations=2, count=2, kill=True)
    run_on_ranks(2, CUT, **go_on, phase="tune", iterations=1, count=5, kill=False)
    run_on_ranks(2, RAFT, **go_on)
    run_on_ranks(2, RAFT, run_dir=str(tmp_path / "whole"), overrides=overrides)
    assert equal(weights(tmp_path / "whole", "last_policy"), weights(tmp_path / "cut", "last_policy"))
    for kind in ("generated", "scored"):
        assert sorted(done_in(tmp_path / "whole", kind)) == sorted(done_in(tmp_path / "cut", kind)), kind
