"""A run directory as data. What is damaged or missing is named in `problems`, and the rest is read all the same."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from rlhf_cli.errors import ModelError
from rlhf_cli.jobfiles import read_notes
from rlhf_cli.report.find import short_names
from rlhf_cli.report.metrics import Metrics, as_number, by_column
from rlhf_cli.rundir import read_manifest

Row = dict[str, Any]
MESSAGE_CHARS = 500  # of a failure


class Parent(NamedTuple):
    """role: what the run uses it as; path: of the run directory, as it was when the run started."""

    role: str
    path: str


class Answers(NamedTuple):
    """Texts of one file of samples/. step: of the policy that wrote them; rows: prompt, response, perhaps score."""

    step: int
    rows: list[Row]


@dataclass(frozen=True)
class Run:
    """One run: its short name, manifest.json ({} without one), config.yaml, metrics.jsonl, the first and
    last texts that it wrote, the newest evaluation of a reward model; problems: what could not be read; failure: what
    the rank that failed first said."""

    name: str
    path: Path
    manifest: Row
    config: Row
    metrics: Metrics
    answers: list[Answers]
    judgement: Row
    problems: list[str]
    failure: str

    @property
    def stage(self) -> str:
        return str(self.manifest.get("stage") or self.config.get("stage") or "unknown")

    @property
    def status(self) -> str:
        return str(self.manifest.get("status") or ("unknown" if self.problems else "not started"))

    @property
    def is_aligned(self) -> bool:
        """Whether a policy wrote and learnt (ppo, raft)."""
        return self.stage in ("ppo", "raft")

    @property
    def steps(self) -> int:
        """Of a supervised run; iterations of the others."""
        return self.metrics.steps[-1] if self.metrics.steps else 0


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """The runs in the order in which they were started; those that are not known to have been come last."""
    runs = [read_run(path, name) for path, name in zip(paths, short_names(paths), strict=True)]
    return sorted(runs, key=lambda run: str(run.manifest.get("started") or "~"))


def read_run(path: Path, name: str) -> Run:
    """Never raises for what lies in the directory."""
    problems: list[str] = []
    manifest = _read_manifest(path, problems)
    metrics = _read_metrics(path, problems)
    judgements = _numbered(path / "evaluation", "step_*.json")
    return Run(
        name=name,
        path=path,
        manifest=manifest,
        config=_read_config(path, problems),
        metrics=metrics,
        answers=_read_answers(path, problems),
        judgement=_read_object(judgements[-1][1], problems) if judgements else {},
        problems=problems,
        failure=_read_failure(path, manifest, problems),
    )


def read_ancestors(runs: Sequence[Run]) -> dict[str, Row]:
    """The manifests of runs that the given ones build on, by path, as far up as they are still there."""
    known = {str(run.path) for run in runs}
    found: dict[str, Row] = {}
    waiting = [parent.path for run in runs for parent in parents_of(run.manifest)]
    while waiting:
        path = waiting.pop()
        if path in known or path in found:
            continue
        # One that is damaged is drawn like one that is gone; the report is not about it.
        found[path] = _read_manifest(Path(path), [])
        waiting += [parent.path for parent in parents_of(found[path])]
    return found


def parents_of(manifest: Row) -> list[Parent]:
    """What a run was made from."""
    entries = manifest.get("parents")
    found = [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
    return [Parent(str(e.get("role", "?")), e["run_dir"]) for e in found if isinstance(e.get("run_dir"), str)]


def final_figures(manifest: Row) -> dict[str, float]:
    """The numbers that a finished run left in its manifest."""
    metrics = manifest.get("metrics")
    found = {k: as_number(v) for k, v in metrics.items()} if isinstance(metrics, dict) else {}
    return {k: v for k, v in found.items() if v is not None}


def _read_manifest(path: Path, problems: list[str]) -> Row:
    try:
        return read_manifest(path)
    except (ModelError, OSError) as error:
        problems.append(_short(error))
        return {}


def _read_config(run_dir: Path, problems: list[str]) -> Row:
    path = run_dir / "config.yaml"
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        problems.append(f"{path} cannot be read ({_short(error)}); no settings are shown")
        return {}
    if not isinstance(config, dict):
        problems.append(f"{path} is damaged (no mapping); no settings are shown")
        return {}
    return config


def _read_metrics(run_dir: Path, problems: list[str]) -> Metrics:
    """A run that has just begun has none."""
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        return Metrics()
    return by_column(_read_rows(path, problems, lambda row: type(row.get("step")) is int))


def _read_answers(run_dir: Path, problems: list[str]) -> list[Answers]:
    """First and last texts: of sft those at evaluations, of ppo and raft the answers to held-out prompts."""
    samples = run_dir / "samples"
    files = _numbered(samples, "eval_*.jsonl") or _numbered(samples, "step_*.jsonl")
    is_answer = lambda row: isinstance(row.get("prompt"), str) and isinstance(row.get("response"), str)
    chosen = dict.fromkeys([files[0], files[-1]]) if files else {}
    return [Answers(step, list(_read_rows(path, problems, is_answer))) for step, path in chosen]


def _numbered(folder: Path, pattern: str) -> list[tuple[int, Path]]:
    """(number at the end of its name, file), in that order."""
    found = [(path.stem.rpartition("_")[2], path) for path in folder.glob(pattern)]
    return sorted((int(number), path) for number, path in found if number.isdecimal())


def _read_rows(path: Path, problems: list[str], is_whole: Any) -> Iterator[Row]:
    """The lines of a JSONL file that are objects and `is_whole`; a last one that is still being written is left out."""
    damaged = []
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            for line_number, line in enumerate(file, start=1):
                row = _read_row(line)
                if isinstance(row, dict) and is_whole(row):
                    yield row
                elif line.endswith("\n"):
                    damaged.append(line_number)
    except OSError as error:
        problems.append(f"{path} cannot be read ({_short(error)})")
    if damaged:
        what = "line is" if len(damaged) == 1 else "lines are"
        problems.append(f"{path}:{damaged[0]} is damaged; {len(damaged)} {what} left out")


def _read_row(line: str) -> Any:
    if not line.endswith("\n"):
        return None
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _read_object(path: Path, problems: list[str]) -> Row:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        problems.append(f"{path} cannot be read ({_short(error)})")
        return {}
    return value if isinstance(value, dict) else {}


def _read_failure(run_dir: Path, manifest: Row, problems: list[str]) -> str:
    """The earliest note of a rank, for a run that did not come to its end."""
    if manifest.get("status") == "complete":
        return ""
    try:
        notes = read_notes(run_dir)
    except (OSError, ValueError, TypeError) as error:
        problems.append(f"{run_dir / 'logs'}: what the ranks said cannot be read ({_short(error)})")
        return ""
    return f"rank {notes[0].rank}: {str(notes[0].message)[:MESSAGE_CHARS]}" if notes else ""


def _short(error: Exception) -> str:
    """On one line."""
    words = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(words.split())
