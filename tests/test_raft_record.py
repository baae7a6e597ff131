"""The responses of an iteration on disk: what a kill may leave of them, what other data or hands may have done."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from rlhf_cli.errors import CheckpointError
from rlhf_cli.raft.record import Record, Scored, record_of
from rlhf_cli.rollout.sampler import Response
from rlhf_cli.rundir import has_iterations

REQUEST = {"num_samples": 2, "cursor": 4, "data": "abc"}
ROWS: list[dict[str, Any]] = [{"sample": 0, "response": "a\u2028b\x85c\nd"}, {"sample": 1, "response": "é"}]


def response(text: str = "ab") -> Response:
    return Response(np.array([5, 6, 1], np.int32), text, 2, "eos")


def begun(run_dir: Path) -> Record:
    """One response is there and one part is scored."""
    record = record_of(run_dir, 3)
    record.begin(REQUEST)
    with record.writer(0) as file:
        file.write(record.line(0, response("é\u2028\n")))
    record.add_scored(Scored(0, [0.1, float("inf")], {"own": [1 / 3, 2.0]}))
    return record


def test_what_was_written_and_scored_comes_back(tmp_path: Path) -> None:
    record = begun(tmp_path)
    with record.writer(7) as file:
        file.write(record.line(1, Response(np.array([5], np.int32), "", None, "stop")))
    found = record.written()
    assert {i: (r.token_ids.tolist(), *r[1:]) for i, r in found.items()} == {
        0: ([5, 6, 1], "é\u2028\n", 2, "eos"), 1: ([5], "", None, "stop")
    }  # fmt: skip
    assert found[0].token_ids.dtype == np.int32
    assert record.scored() == {0: Scored(0, [0.1, float("inf")], {"own": [1 / 3, 2.0]})}
    assert sorted(path.name for path in record.open.iterdir()) == [
        "request.json", "scored.jsonl", "written_0.jsonl", "written_7.jsonl"
    ]  # fmt: skip


def test_a_last_line_that_a_kill_cut_off_counts_as_never_written(tmp_path: Path) -> None:
    record = begun(tmp_path)
    whole = (record.open / "written_0.jsonl").read_bytes()
    torn = record.line(1, response("aé")).encode()
    within_a_character = torn.index("é".encode()) + 1
    for cut in (1, within_a_character, len(torn) - 1):
        (record.open / "written_0.jsonl").write_bytes(whole + torn[:cut])
        assert list(record.written()) == [0]
        with record.writer(0) as file:
            file.write(record.line(1, response("new")))
        assert {i: r.text for i, r in record.written().items()} == {0: "é\u2028\n", 1: "new"}
    (record.open / "scored.jsonl").write_bytes((record.open / "scored.jsonl").read_bytes() + b'{"first": 1')
    record.add_scored(Scored(1, [3.0], {}))
    assert list(record.scored()) == [0, 1]


def test_a_damaged_line_is_told(tmp_path: Path) -> None:
    record = begun(tmp_path)
    path = record.open / "written_0.jsonl"
    path.write_bytes(b"\0\0\0\n" + path.read_bytes())
    with pytest.raises(CheckpointError, match=r"\.iteration_03/written_0\.jsonl:1 is damaged .* remove that line"):
        record.written()


def test_the_trail_takes_the_place_of_the_parts(tmp_path: Path) -> None:
    record = begun(tmp_path)
    assert not record.is_done()
    record.finish(ROWS, ROWS[1:])
    assert record.is_done()
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == [
        "samples", "samples/iteration_03", "samples/iteration_03/generated.jsonl", "samples/iteration_03/request.json",
        "samples/iteration_03/selected.jsonl",
    ]  # fmt: skip
    assert record.generated(REQUEST) == ROWS
    assert json.loads((record.done / "selected.jsonl").read_text()) == ROWS[1]


class Killed(Exception):
    """Stands for SIGKILL."""


def killed_at(count: int) -> Callable[[Any, str], Any]:
    """Dies instead of the `count`-th change of the file system."""
    calls = 0

    def replaced(owner: Any, name: str) -> Any:
        original = getattr(owner, name)

        def change(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == count:
                raise Killed
            return original(*args, **kwargs)

        return mock.patch.object(owner, name, change)

    return replaced


@pytest.mark.parametrize("count", range(1, 9))
def test_killed_while_the_trail_is_published(tmp_path: Path, count: int) -> None:
    """What was written and scored is still there, or the trail is; the next start ends with nothing but the trail."""
    record, at = begun(tmp_path), killed_at(count)
    with at(Path, "rename"), at(Path, "mkdir"), at(shutil, "copyfile"), at(shutil, "rmtree"), pytest.raises(Killed):
        record.finish(ROWS, ROWS[1:])
    assert record.done.is_dir() == (count == 8), "then only the parts were left to remove"
    if not record.is_done():
        record.begin(REQUEST)
        assert list(record.written()) == [0]
        assert list(record.scored()) == [0]
        record.finish(ROWS, ROWS[1:])
    assert record.generated(REQUEST) == ROWS
    assert [path.name for path in (tmp_path / "samples").iterdir()] == ["iteration_03"]


def test_responses_to_something_else_are_not_mixed_in(tmp_path: Path) -> None:
    record = begun(tmp_path)
    record.begin(REQUEST)
    assert list(record.written()) == [0], "the same request goes on"
    for name, other in (("num_samples", 8), ("cursor", 5), ("data", "xyz")):
        with pytest.raises(CheckpointError, match=rf"\.iteration_03 holds responses of another run \({name} differ\)"):
            record.begin(REQUEST | {name: other})
    record.finish(ROWS, [])
    with pytest.raises(CheckpointError, match=r"iteration_03 holds responses of another run \(data differ\)"):
        record.generated(REQUEST | {"data": "xyz"})


def test_a_start_that_wrote_nothing_binds_nobody(tmp_path: Path) -> None:
    record = record_of(tmp_path, 1)
    record.begin(REQUEST)
    record.writer(0).close()
    assert not has_iterations(tmp_path)
    record.begin(REQUEST | {"num_samples": 64})
    with record.writer(0) as file:
        file.write(record.line(0, response()))
    assert has_iterations(tmp_path)
    with pytest.raises(CheckpointError, match="num_samples differ"):
        record.begin(REQUEST)
    record.finish([{"sample": i} for i in range(64)], [])
    assert has_iterations(tmp_path)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda text: text[:-9], "generated.jsonl is damaged (Unterminated string"),
        (lambda text: text.splitlines(keepends=True)[1], "generated.jsonl is damaged (some responses are missing)"),
        (lambda text: text + '{"sample": 2}\n', "is damaged (some responses are missing)"),
        (lambda text: '{"response": "a"}\n' * 2, "generated.jsonl is damaged ('sample')"),
        (lambda text: "[]\n[]\n", "generated.jsonl is damaged ("),
        (None, "generated.jsonl is damaged ([Errno 2]"),
    ],
)
def test_a_damaged_trail_is_told(tmp_path: Path, damage: Callable[[str], str] | None, told: str) -> None:
    record = begun(tmp_path)
    record.finish([{"sample": 0, "response": "ab"}, {"sample": 1, "response": "cd"}], [])
    path = record.done / "generated.jsonl"
    if damage is None:
        path.unlink()
    else:
        path.write_text(damage(path.read_text()))
    with pytest.raises(CheckpointError) as error:
        record.generated(REQUEST)
    assert told in str(error.value)
    assert f"put it back, or remove {record.done} to have this iteration written anew" in str(error.value)
