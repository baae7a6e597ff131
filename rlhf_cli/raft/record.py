"""The responses of an iteration on disk: while they are written and scored, so that nothing is done twice, and then as
the trail that people read.

    samples/.iteration_03/   request.json      what is written there, to tell it from another request
                             written_0.jsonl   responses of rank 0, line by line as they end
                             scored.jsonl      rewards, a line for each part that was scored
    samples/iteration_03/    generated.jsonl   all responses with rewards and ranks; replaces the above
                             selected.jsonl    those that are learnt from

All ranks must see the same directory.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np

from rlhf_cli.errors import CheckpointError
from rlhf_cli.files import write_json, write_text
from rlhf_cli.rollout.sampler import Response

GENERATED, SELECTED = "generated.jsonl", "selected.jsonl"
Row = dict[str, Any]


class Scored(NamedTuple):
    """Rewards of the samples first .. first + len(reward) - 1."""

    first: int
    reward: list[float]
    by_source: dict[str, list[float]]


@dataclass
class Record:
    """Of one iteration. open: its directory while responses are written; done: afterwards."""

    open: Path
    done: Path

    def is_done(self) -> bool:
        """Whether all responses are written, scored and ranked; a kill may have left their parts, which go. Rank 0
        only."""
        if not self.done.is_dir():
            return False
        shutil.rmtree(self.open, ignore_errors=True)
        return True

    def begin(self, request: dict[str, Any]) -> None:
        """Make room for an iteration, or go on with what an earlier start has left of it. Rank 0 only.

        Raises CheckpointError when that was another request: other prompts, or another number of responses.
        """
        path = self.open / "request.json"
        if path.is_file() and any(file.stat().st_size for file in self.open.glob("*.jsonl")):
            check_request(path, json.loads(path.read_text(encoding="utf-8")), request)
            return
        if self.open.is_dir():
            shutil.rmtree(self.open)
        self.open.mkdir(parents=True)
        write_json(path, request)

    def writer(self, rank: int) -> TextIO:
        """Where a rank adds what it has written."""
        return _open_to_add(self.open / f"written_{rank}.jsonl")

    @staticmethod
    def line(sample: int, response: Response) -> str:
        """What a rank adds for a response."""
        return json.dumps({"sample": sample, **response_row(response)}, ensure_ascii=False) + "\n"

    def written(self) -> dict[int, Response]:
        """sample -> response, by whatever ranks."""
        found: dict[int, Response] = {}
        for path in sorted(self.open.glob("written_*.jsonl")):
            found |= {row["sample"]: response_of(row) for row in _complete_rows(path)}
        return found

    def add_scored(self, scored: Scored) -> None:
        """Rank 0 only."""
        with _open_to_add(self.open / "scored.jsonl") as file:
            file.write(json.dumps(scored._asdict()) + "\n")

    def scored(self) -> dict[int, Scored]:
        """first -> scores."""
        return {row["first"]: Scored(**row) for row in _complete_rows(self.open / "scored.jsonl")}

    def finish(self, generated: Sequence[Row], selected: Sequence[Row]) -> None:
        """Replace the parts by the trail. Rank 0 only."""
        for name, rows in ((GENERATED, generated), (SELECTED, selected)):
            write_text(self.open / name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        aside = self.done.with_name(f".done_{self.done.name}")
        if aside.is_dir():
            shutil.rmtree(aside)
        aside.mkdir()
        shutil.copyfile(self.open / "request.json", aside / "request.json")  # without it `begin` would begin anew
        for name in (GENERATED, SELECTED):
            (self.open / name).rename(aside / name)
        aside.rename(self.done)
        shutil.rmtree(self.open)

    def generated(self, request: dict[str, Any]) -> list[Row]:
        """All rows in the order of their samples. Raises CheckpointError for a damaged trail, or another request."""
        path = self.done / GENERATED
        try:
            check_request(path, json.loads((self.done / "request.json").read_text(encoding="utf-8")), request)
            rows = [json.loads(line) for line in path.read_bytes().splitlines()]
            if [row["sample"] for row in rows] != list(range(request["num_samples"])):
                raise ValueError("some responses are missing")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path} is damaged ({error}); put it back, or remove {self.done} to have this iteration written anew"
            ) from None
        return rows


def record_of(run_dir: Path, iteration: int) -> Record:
    """iteration: 1 is the first, as in metrics.jsonl."""
    name = f"iteration_{iteration:02d}"
    return Record(run_dir / "samples" / f".{name}", run_dir / "samples" / name)


def check_request(path: Path, found: dict[str, Any], request: dict[str, Any]) -> None:
    """Raise CheckpointError when what is on disk belongs to another request."""
    differing = [name for name in request if found.get(name) != request[name]]
    if differing:
        raise CheckpointError(
            f"{path.parent} holds responses of another run ({', '.join(differing)} differ); put the data back, remove"
            " that directory, or start in another run_dir"
        )


def response_row(response: Response) -> Row:
    """What response_of needs."""
    return {
        "response": response.text,
        "ending": response.ending,
        "tokens": len(response.token_ids),
        "num_text_tokens": response.num_text_tokens,
        "token_ids": response.token_ids.tolist(),
    }


def response_of(row: Row) -> Response:
    """The other way round."""
    return Response(np.array(row["token_ids"], np.int32), row["response"], row["num_text_tokens"], row["ending"])


def _open_to_add(path: Path) -> TextIO:
    """At its end, behind the last whole line: a kill may have cut the one after it."""
    if path.is_file():
        with path.open("r+b") as file:
            file.truncate(file.read().rfind(b"\n") + 1)
    return path.open("a", encoding="utf-8", buffering=1)  # a line is on its way to the disk when it is whole


def _complete_rows(path: Path) -> Iterator[Row]:
    """Without a last line that a kill cut off, be it within a character."""
    if not path.is_file():
        return
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            yield json.loads(line)
        except ValueError as error:
            raise CheckpointError(f"{path}:{number} is damaged ({error}); remove that line, it is done anew") from None
