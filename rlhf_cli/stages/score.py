"""`rlhf score`: rewards of the responses, pairs, rankings or texts of a file, by any reward sources.

run reads top to bottom: ranks, data, sources, scoring in parts, joining. The rows are cut into parts of a fixed size,
which the ranks share; a part that is written is not scored again by a run that goes on. How rows are put into batches
depends on the part alone, so the scores do not depend on the number of ranks.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_cli.data.readers import Source
from rlhf_cli.data.rows import ParsedRow, RowError
from rlhf_cli.data.stream import Tally, make_tallies, open_sources, parsed_rows
from rlhf_cli.errors import DataError
from rlhf_cli.files import check_space, digest_file, digest_tree, sync, write_text
from rlhf_cli.reward.combine import Rewards, describe_rewards, open_rewards
from rlhf_cli.reward.records import Summary, score_lines, texts_of
from rlhf_cli.reward.source import ScoredText
from rlhf_cli.run import Run, close_run, open_run
from rlhf_cli.rundir import read_manifest
from rlhf_cli.runtime.distributed import Ranks, any_rank, broadcast_object, gather_objects, init, local_first, shutdown
from rlhf_cli.runtime.process import RankProcess
from rlhf_cli.runtime.progress import Display
from rlhf_cli.schema import ScoreConfig, SourceConfig, to_dict

OUTPUT = "scores.jsonl"
PARTS = ".scores"
PART_BATCHES = 8  # batches in a part: enough texts to put like lengths together, few enough to lose with a kill

RowTexts = tuple[ParsedRow, list[ScoredText]]


class Survey(NamedTuple):
    """What a first look at the data found. rows: that can be scored; info: for the manifest."""

    rows: int
    texts: int
    info: list[dict[str, Any]]


class Asked(Exception):
    """The wish to stop, on its way out of a source that is scoring."""


def run(config: ScoreConfig, run_dir: Path, process: RankProcess) -> None:
    """One rank of the stage, from joining the others to leaving them."""
    ranks = init(config.launch.timeout)
    score_file(config, run_dir, process, ranks)
    shutdown()


def score_file(config: ScoreConfig, run_dir: Path, process: RankProcess, ranks: Ranks) -> dict[str, float]:
    """Score as the config says. Returns the figures, which are also in the manifest; {} when interrupted."""
    run = open_run(config, run_dir, process, ranks)
    with local_first(ranks):
        sources = open_sources(config.data, config.data.path)
    survey = broadcast_object(look_through(config.data, sources) if ranks.is_main else None)
    assert survey is not None
    run.update_manifest(data=survey.info)
    rewards = open_rewards(config.reward, ranks.device)
    for name, about in rewards.about.items():
        run.say(f"{name}: {about}")
    parts = broadcast_object(open_parts(run, survey) if ranks.is_main else None)
    assert parts is not None

    process.watch.loop_started()
    progress = Progress(run, survey, parts)
    stopped = any_rank(not score_parts(run, sources, rewards, parts, progress))
    seconds = time.monotonic() - progress.began
    cut = sum(gather_objects(rewards.cut))
    if cut:
        run.say(f"{cut} texts were longer than a model takes and lost their start (the source's max_length)")
    if stopped:
        run.say("interrupted; the same command goes on from there")
        close_run(run, status="interrupted")
        return {}
    progress.show(survey.rows)
    return finish(run, survey, parts, seconds)


def dry_run(config: ScoreConfig, world_size: int) -> None:
    """Look through the data and open the sources for a job of `world_size` ranks; print what it would do."""
    survey = look_through(config.data, open_sources(config.data, config.data.path))
    rows = [("rows", f"{survey.rows:,}"), ("texts to score", f"{survey.texts:,}"), ("ranks", str(world_size))]
    rows += [(f"dropped: {reason}", f"{n:,}") for info in survey.info for reason, n in info["dropped"].items()]
    rows += list(describe_rewards(config.reward).items())
    Display(sys.stdout, "none", "score").table("rlhf score --dry-run: nothing was started", rows)


# --- data


def look_through(data: SourceConfig, sources: list[Source]) -> Survey:
    """Count and check all rows before any model is loaded. Raises DataError when there is nothing to score."""
    tallies = make_tallies(sources)
    rows = texts = 0
    for _, found in scorable_rows(data, sources, tallies):
        rows += 1
        texts += len(found)
    if not rows:
        dropped = {reason: n for tally in tallies for reason, n in tally.dropped.items()}
        raise DataError(f"data.path: no row can be scored; dropped were {dropped or 'none'}")
    return Survey(rows, texts, [tally.as_info() for tally in tallies])


def scorable_rows(data: SourceConfig, sources: list[Source], tallies: list[Tally]) -> Iterator[RowTexts]:
    """Each row that is kept, in file order, with its texts."""
    for number, row in parsed_rows(data, sources, tallies):
        try:
            texts = texts_of(row)
        except RowError as error:
            tallies[number].bad_row(error, data.on_bad_row)
            continue
        tallies[number].kept += 1
        tallies[number].sequences += len(texts)
        yield row, texts


# --- parts


class Parts(NamedTuple):
    """directory: where parts are; size: rows in each but the last."""

    directory: Path
    size: int

    def path(self, number: int) -> Path:
        """The lines of one part."""
        return self.directory / f"part_{number:07d}.jsonl"


def open_parts(run: Run, survey: Survey) -> Parts:
    """The directory for the parts of exactly these data and sources; what was left from others is removed."""
    config: ScoreConfig = run.config
    made_from = {
        "data": [entry["digest"] for entry in survey.info],
        "options": [to_dict(config)["data"], to_dict(config)["reward"]],
        "sources": source_digests(config, read_manifest(run.run_dir)["parents"]),
    }
    digest = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:16]
    parts = Parts(run.run_dir / PARTS / digest, PART_BATCHES * config.reward.batch_size)
    for other in (run.run_dir / PARTS).glob("*"):
        if other != parts.directory:
            run.say("the data or a reward source has changed since this run was started: everything is scored again")
            shutil.rmtree(other)
    parts.directory.mkdir(parents=True, exist_ok=True)
    return parts


def source_digests(config: ScoreConfig, parents: Sequence[dict[str, str]]) -> list[str]:
    """Of the files behind each source; of run directories as in the manifest."""
    known = {entry["run_dir"]: entry["digest"] for entry in parents}
    digests = []
    for source in config.reward.sources:
        path = Path(source.path or "").expanduser()
        digest = known.get(str(path.resolve()), "") if source.path else ""
        if source.path and not digest and path.exists():
            digest = digest_file(path) if path.is_file() else digest_tree(path)
        digests.append(digest)
    return digests


def score_parts(run: Run, sources: list[Source], rewards: Rewards, parts: Parts, progress: Progress) -> bool:
    """Score this rank's parts that are not there yet. Returns False when asked to stop."""
    rows = scorable_rows(run.config.data, sources, [Tally(source.path, "") for source in sources])
    number = 0
    while part := list(islice(rows, parts.size)):
        if number % run.ranks.world_size == run.ranks.rank and not parts.path(number).is_file():
            texts = [text for _, found in part for text in found]
            progress.rows_per_text = len(part) / (len(texts) * len(rewards.sources))
            try:
                scores = rewards.score(texts, progress.advance)
            except Asked:
                return False
            write_text(parts.path(number), "".join(line + "\n" for line in score_lines(part, scores)))
        number += 1
    return True


class Progress:
    """Shows how far all ranks are, taking the others to be as far as this one, and passes the wish to stop on."""

    def __init__(self, run: Run, survey: Survey, parts: Parts):
        self.run, self.total = run, survey.rows
        found = sum(1 for _ in parts.directory.glob("part_*"))
        self.first = min(found * parts.size, survey.rows)
        self.scored_rows, self.rows_per_text = 0.0, 1.0  # the second: of the part at work, over all sources
        self.began = time.monotonic()
        if run.display is not None:
            if found:
                run.say(f"{self.first:,} of {self.total:,} rows are scored already")
            run.display.start(self.first, self.total, "row")

    def advance(self, texts: int) -> None:
        """One source has scored so many more texts on this rank. Raises Asked."""
        if self.run.process.watch.requested:
            raise Asked
        self.scored_rows += texts * self.rows_per_text
        # The last row is not done before every rank says so.
        self.show(min(self.total - 1, self.first + round(self.scored_rows * self.run.ranks.world_size)))

    def show(self, done: int) -> None:
        """`done` rows are scored."""
        if self.run.display is not None:
            rate = (done - self.first) / max(1e-9, time.monotonic() - self.began)
            self.run.display.step(done, {"rows/s": f"{rate:,.1f}"})


# --- the end


def finish(run: Run, survey: Survey, parts: Parts, seconds: float) -> dict[str, float]:
    """Join the parts, print the summary, close the manifest. Rank 0 does it."""
    figures: dict[str, float] = {}
    if run.ranks.is_main:
        if run.display is not None:
            run.display.stop()
        settings = run.config.score
        summary = join_parts(run.run_dir, parts, Summary(settings.pass_at_k, settings.passes_above))
        assert summary.rows == survey.rows, f"{summary.rows} lines for {survey.rows} rows"
        for k in settings.pass_at_k:
            if summary.short(k) or not summary.tasks:
                run.say(f"pass@{k}: {summary.short(k)} of {len(summary.tasks)} prompts have fewer than {k} responses")
        found = {name: value for name, value in summary.figures().items() if value == value}
        figures = found | {"seconds": round(seconds, 3)}
        rows = [(name, f"{value:,.4f}".rstrip("0").rstrip(".")) for name, value in figures.items()]
        assert run.display is not None
        run.display.table("rlhf score", [*rows, ("file", str(run.run_dir / OUTPUT))])
    figures = broadcast_object(figures)
    output = {"kind": "scores", "task": None, "path": OUTPUT, "format": "jsonl"}
    close_run(run, status="complete", output=output, metrics=figures)
    if run.ranks.is_main:
        shutil.rmtree(run.run_dir / PARTS)
    return figures


def join_parts(run_dir: Path, parts: Parts, summary: Summary) -> Summary:
    """All parts in order as one file, which appears when it is complete; the summary with all its lines."""
    files = sorted(parts.directory.glob("part_*.jsonl"))
    check_space(run_dir, sum(file.stat().st_size for file in files), OUTPUT)
    aside = run_dir / f".{OUTPUT}.tmp"
    with aside.open("wb") as joined:
        for file in files:
            for line in file.read_bytes().splitlines(keepends=True):
                joined.write(line)
                summary.add(json.loads(line))
    sync(aside)
    os.replace(aside, run_dir / OUTPUT)
    return summary
