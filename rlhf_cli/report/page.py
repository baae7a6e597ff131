"""The page: sections in the order in which one asks."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from typing import Any

from rlhf_cli import __version__
from rlhf_cli.report.chain import make_chain
from rlhf_cli.report.chain_picture import picture
from rlhf_cli.report.comparison import comparison, held_out, with_error
from rlhf_cli.report.cost import cost
from rlhf_cli.report.curves import assign_slots, charts
from rlhf_cli.report.markup import NOTHING, Markup, joined, number, table, tag
from rlhf_cli.report.responses import responses
from rlhf_cli.report.runs import Run
from rlhf_cli.report.series import last
from rlhf_cli.report.settings import settings_tables

# No part of the page can load or run anything, whatever a response holds.
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
COMMIT_CHARS = 10


def page(runs: Sequence[Run], ancestors: dict[str, dict[str, Any]], now: str) -> str:
    """A whole HTML document. now: the time that it gives as its own."""
    style = resources.files("rlhf_cli.report").joinpath("style.css").read_text(encoding="utf-8")
    title = f"rlhf report: {runs[0].name}" if len(runs) == 1 else f"rlhf report: {len(runs)} runs"
    chain = make_chain(runs, ancestors)
    sections = {
        "problems": ("Problems", problems(runs)),
        "chain": ("The chain", picture(chain, {str(run.path): fact(run) for run in runs})),
        "results": ("What came out", comparison(runs)),
        "curves": ("Curves", charts(runs, assign_slots(runs))),
        "responses": ("Responses", responses(runs)),
        "time": ("Time and memory", cost(runs)),
        "settings": ("Settings that differ from the defaults", settings_tables(runs)),
        "origins": ("Where it comes from", origins(runs)),
    }
    shown = {key: section for key, section in sections.items() if section[1]}
    links = (tag("a", heading, href=f"#{key}") for key, (heading, _) in shown.items())
    head = joined(
        [
            Markup('<meta charset="utf-8"/>'),
            Markup(f'<meta http-equiv="Content-Security-Policy" content="{POLICY}"/>'),
            Markup('<meta name="viewport" content="width=device-width, initial-scale=1"/>'),
            Markup('<meta name="color-scheme" content="light dark"/>'),
            tag("title", title),
            tag("style", Markup(style)),
        ]
    )
    top = tag(
        "header",
        tag("h1", title),
        tag("p", f"rlhf {__version__}, {utc_words(now)} UTC", class_="note"),
        tag("nav", *links),
    )
    main = tag("main", *(tag("section", tag("h2", h), body, id=key) for key, (h, body) in shown.items()))
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>{top}\n{main}\n</body></html>\n'


def fact(run: Run) -> str:
    """The one figure that a run is known by."""
    if run.is_aligned:
        shown = held_out(run)
        return "" if shown == NOTHING else "reward " + " → ".join(v.split(" ")[0] for v in shown.split(" → "))
    accuracy = last(run, ("eval_accuracy", "accuracy"))
    if accuracy is not None and run.stage in ("rm", "score"):
        return f"accuracy {with_error(accuracy, last(run, ('eval_accuracy_stderr', 'accuracy_stderr')))}"
    loss = last(run, ("eval_loss", "loss"))
    return "" if loss is None else f"loss {number(loss, '.3f')}"


def problems(runs: Sequence[Run]) -> Markup:
    """What could not be read, and why runs failed."""
    entries = []
    for run in runs:
        said = [*run.problems, *([f"it ended with: {run.failure}"] if run.failure else [])]
        entries += [tag("li", tag("strong", run.name), ": ", words) for words in said]
    return tag("ul", *entries, class_="notes") if entries else Markup("")


def origins(runs: Sequence[Run]) -> Markup:
    """Directories, data, versions."""
    rows = []
    for run in runs:
        manifest = run.manifest
        versions = manifest.get("versions")
        named = ", ".join(f"{k} {v}" for k, v in versions.items()) if isinstance(versions, dict) else NOTHING
        commit = str(manifest.get("git_commit") or NOTHING)[:COMMIT_CHARS]
        times = " to ".join(utc_words(manifest.get(key)) for key in ("started", "finished"))
        seed = NOTHING if manifest.get("seed") is None else manifest["seed"]
        rows.append([run.name, run.status, run.path, times, data_words(run), seed, commit, named])
    head = ["run", "status", "directory", "from, to (UTC)", "data", "seed", "commit", "versions"]
    return table(head, rows, "Runs", words=len(head))


def utc_words(time: object) -> str:
    return str(time or NOTHING).removesuffix("+00:00").replace("T", " ")


def data_words(run: Run) -> Markup | str:
    """Files, and how many of their rows were used."""
    entries = run.manifest.get("data")
    files = []
    for entry in entries if isinstance(entries, list) else []:
        if isinstance(entry, dict) and "path" in entry:
            files.append(f"{entry['path']} ({entry.get('kept', '?')} of {entry.get('rows', '?')} rows)")
    return joined([tag("div", file) for file in files]) if files else NOTHING
