"""A run that is stopped or killed at an awkward moment ends as if it had not been."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from rlhf_cli import training
from rlhf_cli.errors import RunFailed
from rlhf_cli.rundir import read_manifest
from rlhf_cli.runtime import checkpoint
from rlhf_cli.runtime.distributed import Ranks
from rlhf_cli.runtime.metrics import read_metrics
from rlhf_cli.stages import sft
from tests.stage_cases import run_sft, words, write_dialogues

RUN, STOP, KILL = (f"tests.{name}" for name in (
    "stage_cases:run_sft", "stop_cases:run_sft_stopping", "stop_cases:run_sft_killed_at_the_end"
))  # fmt: skip
Runner = Callable[..., list[Any]]
EVALUATED = {
    "data__validation_split_percentage": 25,
    "train__eval_every": 2,
    "train__max_steps": 4,
    "optim__schedule": "constant",
    "optim__warmup_ratio": 0,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dialogues(tmp_path_factory.mktemp("data") / "dialogues.jsonl")


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "model" / "model.safetensors")


def figures(run_dir: Path) -> list[dict[str, float]]:
    """metrics.jsonl without what depends on the clock."""
    return [
        {k: v for k, v in line.items() if k != "seconds" and not k.startswith("perf/")}
        for line in read_metrics(run_dir)
    ]


@pytest.mark.parametrize(("step", "evaluating"), [(2, False), (3, False), (4, False), (2, True), (4, True)])
def test_a_stop_takes_no_evaluation_away(
    run_on_ranks: Runner, data: Path, tmp_path: Path, step: int, evaluating: bool
) -> None:
    """Asked to stop in a step after which an evaluation is due (2), none is (3), in the last one (4), and in the middle
    of an evaluation."""
    overrides = words(data, **EVALUATED)
    run_on_ranks(1, RUN, run_dir=str(tmp_path / "whole"), overrides=overrides)
    (stopped,) = run_on_ranks(
        1, STOP, run_dir=str(tmp_path / "parts"), overrides=overrides, step=step, evaluating=evaluating
    )
    assert stopped == {}
    assert read_manifest(tmp_path / "parts")["status"] == "interrupted"
    (ended,) = run_on_ranks(1, RUN, run_dir=str(tmp_path / "parts"), overrides=overrides)
    assert figures(tmp_path / "parts") == figures(tmp_path / "whole")
    assert ["eval_loss" in line for line in figures(tmp_path / "parts")] == [False, True, False, True]
    for line in read_metrics(tmp_path / "parts"):
        assert line["perf/train_s"] > 0
        assert (line["perf/score_s"] > 0) == ("eval_loss" in line)
    assert ended["eval_loss"] == read_manifest(tmp_path / "whole")["metrics"]["eval_loss"]
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(a[k], b[k]) for k in a)


# The loss rises from the start, so the best evaluation lies before the last checkpoint.
RISING = EVALUATED | {"optim__lr": 0.3, "train__eval_every": 1, "train__max_steps": 30, "train__save_every": 1}
RISING |= {"train__early_stopping__patience": 2, "train__keep_checkpoints": 1}


def test_the_best_weights_outlive_a_kill_at_the_very_end(run_on_ranks: Runner, data: Path, tmp_path: Path) -> None:
    overrides = words(data, **RISING)
    run_on_ranks(1, RUN, run_dir=str(tmp_path / "whole"), overrides=overrides)
    run_on_ranks(1, KILL, run_dir=str(tmp_path / "r"), overrides=overrides)
    assert read_manifest(tmp_path / "r")["status"] == "running"
    run_on_ranks(1, RUN, run_dir=str(tmp_path / "r"), overrides=overrides)
    metrics = read_manifest(tmp_path / "r")["metrics"]
    assert metrics["best_step"] < metrics["steps"] < 30, "for this to mean anything"
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "r")
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_finished_run_that_grows_still_has_its_best_weights(run_on_ranks: Runner, data: Path, tmp_path: Path) -> None:
    run_on_ranks(1, RUN, run_dir=str(tmp_path / "r"), overrides=words(data, **RISING))
    best = weights(tmp_path / "r")
    run_on_ranks(1, RUN, run_dir=str(tmp_path / "r"), overrides=words(data, **RISING | {"train__max_steps": 40}))
    again = weights(tmp_path / "r")
    assert all(torch.equal(best[k], again[k]) for k in best)
    (kept,) = (tmp_path / "r" / "checkpoints").glob("best_*")
    assert kept.name == f"best_{int(read_manifest(tmp_path / 'r')['metrics']['best_step']):08d}"


def test_missing_best_weights_are_told_at_the_start(run_on_ranks: Runner, data: Path, tmp_path: Path) -> None:
    overrides = words(data, **RISING)
    run_on_ranks(1, RUN, run_dir=str(tmp_path / "r"), overrides=overrides)
    (kept,) = (tmp_path / "r" / "checkpoints").glob("best_*")
    kept.rename(tmp_path / "elsewhere")
    with pytest.raises(AssertionError, match=r"best weights so far in .*best_0000000\d, which is missing"):
        run_on_ranks(1, RUN, run_dir=str(tmp_path / "r"), overrides=overrides)


ENDINGS = {
    "conclude": (sft.LanguageModelObjective, OSError(errno.ENOSPC, "No space left on device")),
    "write_model": (training, SafetensorError("I/O error: No space left on device")),
    "show": (training, ValueError("a curve that cannot be drawn")),
}


def run_sft_failing(ranks: Ranks, run_dir: str, overrides: list[str], what: str, full: bool = False) -> str:
    """What each rank is told when rank 0 cannot write something at the end. full: nor a checkpoint."""
    owner, error = ENDINGS[what]
    usual = getattr(owner, what)

    def fail(*args: Any, **kwargs: Any) -> Any:
        if ranks.is_main:
            raise error
        return usual(*args, **kwargs)

    def no_room(*_: Any) -> None:
        raise RunFailed("no room for a checkpoint")

    room = mock.patch.object(checkpoint, "check_space", no_room if full else checkpoint.check_space)
    with mock.patch.object(owner, what, fail), room:
        try:
            run_sft(ranks, run_dir, overrides)
        except RunFailed as failed:
            return str(failed)
    return "no error"


FAILING = "tests.test_sft_endings:run_sft_failing"


@pytest.mark.parametrize("what", [*ENDINGS])
def test_a_failure_at_the_end_keeps_the_training(run_on_ranks: Runner, data: Path, tmp_path: Path, what: str) -> None:
    """With save_every=0, the default, nothing of it would be on the disk."""
    case: dict[str, Any] = {"run_dir": str(tmp_path / "r"), "overrides": words(data, **EVALUATED)}
    assert (
        run_on_ranks(2, FAILING, what=what, **case)
        == [
            f"training is done, but not its end: {'ValueError: ' if what == 'show' else ''}{ENDINGS[what][1]}."
            " A checkpoint of step 4 is kept, and the same command goes on from it"
        ]
        * 2
    )
    assert read_manifest(tmp_path / "r")["status"] == "running"
    before = figures(tmp_path / "r")
    run_on_ranks(2, RUN, **case)
    assert read_manifest(tmp_path / "r")["status"] == "complete"
    assert figures(tmp_path / "r") == before, "nothing is trained again"
    run_on_ranks(2, RUN, run_dir=str(tmp_path / "whole"), overrides=case["overrides"])
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "r")
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_failure_at_the_end_keeps_the_best_weights(run_on_ranks: Runner, data: Path, tmp_path: Path) -> None:
    case: dict[str, Any] = {
        "run_dir": str(tmp_path / "r"),
        "overrides": words(data, **RISING | {"train__save_every": 0}),
    }
    run_on_ranks(1, FAILING, what="show", **case)
    run_on_ranks(1, RUN, **case)
    metrics = read_manifest(tmp_path / "r")["metrics"]
    assert metrics["best_step"] < metrics["steps"] < 30, "for this to mean anything"
    run_on_ranks(1, RUN, run_dir=str(tmp_path / "whole"), overrides=case["overrides"])
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "r")
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_disk_that_is_full_at_the_end(run_on_ranks: Runner, data: Path, tmp_path: Path) -> None:
    """Without room for a checkpoint, the first cause is told; one of the last step that is there stays."""
    case: dict[str, Any] = {"run_dir": str(tmp_path / "r"), "what": "write_model", "full": True}
    lost = run_on_ranks(2, FAILING, overrides=words(data, **EVALUATED), **case)
    assert (
        lost
        == [
            "training is done, but not its end: I/O error: No space left on device."
            " Nor could a checkpoint be saved: no room for a checkpoint"
        ]
        * 2
    )
    run_on_ranks(2, FAILING, overrides=words(data, **EVALUATED), **case | {"full": False})
    digests = tmp_path / "r" / "checkpoints" / "step_00000004" / "digests.json"
    saved = json.loads(digests.read_text())
    for told in run_on_ranks(2, FAILING, overrides=words(data, **EVALUATED), **case):
        assert told.endswith("A checkpoint of step 4 is kept, and the same command goes on from it")
    assert json.loads(digests.read_text()) == saved
