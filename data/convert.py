"""Originals -> the files that the stages read. Standard library only; each converter writes below one directory.

Training files lie in a directory of their own with the held-out ones below it (rm/train.jsonl, rm/eval/eval.jsonl), so
that `data.path=data/hh_rlhf/rm` reads no held-out row and `data.eval_path=data/hh_rlhf/rm/eval` reads nothing else.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import shutil
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

from transfer import DownloadError

VERSION = 1  # goes up when a converter writes something else: data sets of an older one are made again
TURN = re.compile(r"\n\n(Human|Assistant):")
REVIEW = re.compile(r"aclImdb/(train|test)/(pos|neg)/(\d+)_\d+\.txt")
SPLITS = ("train", "eval")

T = TypeVar("T")
Row = dict[str, Any]
Turns = list[tuple[str, str]]
Sources = Mapping[str, list[Path]]


class Written(NamedTuple):
    """What became of one file. left_out: rows that are not in it, by reason."""

    name: str
    rows: int
    left_out: dict[str, int]


def copy(sources: Sources, target: Path) -> list[Written]:
    """The originals as they are, under the names that the catalogue gives them."""
    written = []
    for name, (path,) in sources.items():
        shutil.copyfile(path, target / name)
        with path.open("rb") as handle:
            written.append(Written(name, sum(1 for _ in handle), {}))
    return written


def hh(sources: Sources, target: Path) -> list[Written]:
    """Anthropic's pairs (arXiv 2204.05862) -> sft: the chosen dialogues; rm: the pairs; rlhf: the prompts, each once,
    none for training that is held out. Tranches are mixed evenly, so the first rows of a file are like all of it."""
    seen: set[bytes] = set()
    return [written for split in ("eval", "train") for written in _hh_split(sources[split], target, split, seen)]


def _hh_split(paths: list[Path], target: Path, split: str, seen: set[bytes]) -> list[Written]:
    """seen: digests of the prompts so far, to which those of this split are added."""
    names = {stage: _place(stage, split) for stage in ("sft", "rm", "rlhf")}
    rows, repeated, unusable = 0, 0, 0
    with (
        _create(target / names["sft"]) as sft,
        _create(target / names["rm"]) as rm,
        _create(target / names["rlhf"]) as rlhf,
    ):
        for where, row in mixed([(_count_lines(path), _rows(path)) for path in paths]):
            chosen, rejected = _text(row, "chosen", where), _text(row, "rejected", where)
            prompt = shared_prompt(_turns(chosen), _turns(rejected))
            if not prompt:
                unusable += 1
                continue
            rows += 1
            _put(sft, {"text": chosen})
            _put(rm, {"chosen": chosen, "rejected": rejected})
            digest = hashlib.blake2b(prompt.encode("utf-8", "replace"), digest_size=16).digest()
            if digest in seen:
                repeated += 1
                continue
            seen.add(digest)
            _put(rlhf, {"prompt": prompt})
    left_out = {"no common prompt": unusable} if unusable else {}
    known = {"prompt known already": repeated} if repeated else {}
    return [
        Written(names["sft"], rows, left_out),
        Written(names["rm"], rows, left_out),
        Written(names["rlhf"], rows - repeated, left_out | known),
    ]


def shared_prompt(chosen: Turns, rejected: Turns) -> str:
    """What both sides answer: the dialogue up to the assistant's turn in which they part (the last if they never do),
    with an open "\\n\\nAssistant:". Empty if there is no such turn, or nothing before it."""
    end = 0
    for i, (ours, theirs) in enumerate(zip(chosen, rejected, strict=False)):
        if ours[0] == theirs[0] == "Assistant":
            end = i
        if ours != theirs:
            break
    return "".join(f"\n\n{role}: {content}" for role, content in chosen[:end]) + "\n\nAssistant:" if end else ""


def _turns(text: str) -> Turns:
    pieces = TURN.split(text)
    return [] if pieces[0].strip() else [(r, c.strip()) for r, c in zip(pieces[1::2], pieces[2::2], strict=True)]


def alpaca(sources: Sources, target: Path) -> list[Written]:
    """One list of {"instruction", "input", "output"} -> one object per line."""
    (path,) = sources["train"]
    try:
        instances = json.loads(path.read_bytes())
    except ValueError as error:
        raise DownloadError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(instances, list):
        raise DownloadError(f"{path}: expected a list of objects, got {type(instances).__name__}")
    with _create(target / "train.jsonl") as out:
        for number, row in enumerate(instances, start=1):
            where = f"{path} instance {number}"
            _put(out, {column: _text(row, column, where) for column in ("instruction", "input", "output")})
    return [Written("train.jsonl", len(instances), {})]


def imdb(sources: Sources, target: Path) -> list[Written]:
    """The archive of one review per file (Maas et al. 2011) -> rm: {"text", "label"}, positive and negative in turn;
    rlhf: plain text, a review on each line, of which `rlhf ppo` and `raft` take the first words."""
    (path,) = sources["archive"]
    reviews: dict[str, dict[str, list[tuple[int, str]]]] = {s: {"pos": [], "neg": []} for s in ("train", "test")}
    try:
        with tarfile.open(path, "r|gz") as archive:
            for member in archive:
                match = REVIEW.fullmatch(member.name)
                content = archive.extractfile(member) if match and member.isfile() else None
                if match and content:
                    reviews[match[1]][match[2]].append((int(match[3]), content.read().decode("utf-8")))
    except (tarfile.TarError, OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DownloadError(f"{path}: cannot be read: {error}") from error
    written = []
    for split, found in zip(SPLITS, reviews.values(), strict=True):
        if not all(found.values()):
            raise DownloadError(f"{path}: no aclImdb/{'test' if split == 'eval' else split}/pos/*.txt, neg/*.txt in it")
        labelled = [
            (len(texts), [(label, text) for _, text in sorted(texts)])
            for label, texts in (("positive", found["pos"]), ("negative", found["neg"]))
        ]
        rows = list(mixed(labelled))
        with _create(target / _place("rm", split)) as rm, _create(target / _place("rlhf", split, ".txt")) as rlhf:
            for label, text in rows:
                _put(rm, {"text": text, "label": label})
                rlhf.write((" ".join(text.split()) + "\n").encode("utf-8"))
        written += [Written(_place(s, split, e), len(rows), {}) for s, e in (("rm", ".jsonl"), ("rlhf", ".txt"))]
    return written


def tldr(sources: Sources, target: Path) -> list[Written]:
    """Posts and their summaries -> {"prompt", "response"} in the words of OpenAI's models (arXiv 2009.01325,
    openai/summarize-from-feedback, utils/experiment_helpers.py). The response brings its blank along: the template
    `none` joins the two as they are."""
    written = []
    for split in SPLITS:
        name = "train.jsonl" if split == "train" else "eval/eval.jsonl"
        rows = 0
        with _create(target / name) as out:
            for path in sources[split]:
                for where, row in _rows(path):
                    subreddit, title, post = (_text(row, column, where) for column in ("subreddit", "title", "post"))
                    prompt = f"SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"
                    _put(out, {"prompt": prompt, "response": " " + _text(row, "summary", where).strip()})
                    rows += 1
        written.append(Written(name, rows, {}))
    return written


# name in the catalogue: (converter, what its `files` must name; none: any names)
CONVERTERS: dict[str, tuple[Callable[[Sources, Path], list[Written]], set[str]]] = {
    "copy": (copy, set()),
    "hh": (hh, set(SPLITS)),
    "alpaca": (alpaca, {"train"}),
    "imdb": (imdb, {"archive"}),
    "tldr": (tldr, set(SPLITS)),
}


def mixed(sources: Iterable[tuple[int, Iterable[T]]]) -> Iterator[T]:
    """All items of all (number, items), spread evenly: of each source, its share of the numbers so far."""
    waiting = [(number, iter(items)) for number, items in sources if number]
    taken = [0] * len(waiting)
    for _ in range(sum(number for number, _ in waiting)):
        open_ones = [i for i, (number, _) in enumerate(waiting) if taken[i] < number]
        chosen = min(open_ones, key=lambda i: (taken[i] + 0.5) / waiting[i][0])
        taken[chosen] += 1
        yield next(waiting[chosen][1])


def _place(stage: str, split: str, ending: str = ".jsonl") -> str:
    return f"{stage}/train{ending}" if split == "train" else f"{stage}/eval/eval{ending}"


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line) of all lines that are not blank."""
    try:
        with _open(path) as handle:
            for number, line in enumerate(handle, start=1):
                if line.strip():
                    yield number, line
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DownloadError(f"{path}: cannot be read: {error}") from error


def _count_lines(path: Path) -> int:
    return sum(1 for _ in _lines(path))


def _rows(path: Path) -> Iterator[tuple[str, Row]]:
    for number, line in _lines(path):
        try:
            yield f"{path}:{number}", json.loads(line)
        except ValueError as error:
            raise DownloadError(f"{path}:{number}: not valid JSON: {error}") from error


def _text(row: Any, column: str, where: str) -> str:
    value = row.get(column) if isinstance(row, dict) else None
    if not isinstance(value, str):
        raise DownloadError(f"{where}: expected an object with the text {column!r}, got {json.dumps(row)[:80]}")
    return value


def _create(path: Path) -> IO[bytes]:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("wb")


def _put(out: IO[bytes], row: Row) -> None:
    # "replace": half of a surrogate pair is no text that could be encoded
    out.write(json.dumps(row, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
