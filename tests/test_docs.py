"""What the documents show is what the program does: commands compose, links lead somewhere, data is read as said."""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from rlhf_cli.cli import _split_flags
from rlhf_cli.config.compose import compose_stage
from rlhf_cli.data.formats import to_training
from rlhf_cli.data.stream import make_tallies, open_sources, parsed_rows, training_rows
from rlhf_cli.data.templates import TEMPLATES
from rlhf_cli.data.tokenize import row_segments
from rlhf_cli.errors import DataError
from rlhf_cli.schema import STAGES, DataConfig, build
from rlhf_cli.sweep import split

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
RECIPES = sorted((ROOT / "conf" / "recipe").rglob("*.yaml"))
END = "<|endoftext|>"
# Perhaps behind a prompt, the words of a recipe's head, or NAME=VALUE for the environment.
COMMAND = re.compile(rf"(?:\$ |# (?:Run|Override):)?\s*(?:[A-Z_]+=\S+ )*(rlhf (?:{'|'.join(STAGES)})(?: .*)?)$")


# --- the generated reference


def test_the_config_reference_is_what_the_schema_gives() -> None:
    spec = importlib.util.spec_from_file_location("config_reference", ROOT / "scripts" / "config_reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.main(["--check"]) == 0, "run python scripts/config_reference.py"


# --- commands


class Command(NamedTuple):
    """where: page and line; text: from `rlhf STAGE` to the end of the command."""

    where: str
    text: str


def commands() -> Iterator[Command]:
    """Every `rlhf STAGE ...` in a code block of a page, in the head of a recipe, and on the help pages."""
    for page in [*PAGES, *RECIPES]:
        lines = code_lines(page) if page.suffix == ".md" else enumerate(page.read_text().splitlines(), start=1)
        for number, line in lines:
            found = COMMAND.match(line)
            if found:
                # two blanks part a command from a remark beside it
                yield Command(f"{page.name}:{number}", re.split(r"\s{2,}", found[1])[0])
    for stage in STAGES.values():
        yield from (Command(f"help of {stage.name}", example) for example in stage.examples)


def code_lines(page: Path) -> Iterator[tuple[int, str]]:
    """(number, line) inside indented blocks and fences, but those of ```text, which show output; a line that ends in a
    backslash is joined with the next."""
    fence, held, start = "", "", 0
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        if line.startswith("```"):
            fence = "" if fence else line
        elif (fence and not fence.startswith("```text")) or (not fence and line.startswith("    ")):
            start = start if held else number
            held += line.strip() if held else line
            if held.endswith("\\"):
                held = held[:-1]
            else:
                yield start, held
                held = ""


@pytest.mark.parametrize("command", list(commands()), ids=lambda c: f"{c.where} {c.text}")
def test_every_command_shown_composes(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _, stage, *words = [word for word in shlex.split(command.text) if word != "..."]
    flags, words = _split_flags(words)
    for word in words:
        key, _, value = word.partition("=")
        if key == "conf" and value.endswith(".yaml"):  # the user's own file, or that of an earlier run
            (tmp_path / value).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / value).touch()
    for run in split(words) if "--multirun" in flags else [words]:
        composed = compose_stage(stage, run)
        assert composed.problems == [], command.where
        missing = {"model.path", "data.path", "model.tokenizer"}  # values that a page may leave to the reader
        assert [p for p in composed.unmet if p.key not in missing] == [], command.where


def test_the_pages_show_commands() -> None:
    shown = {command.where.split(":")[0] for command in commands()}
    assert {"README.md", "sft.md", "data.md", "help of sft", *(p.name for p in RECIPES)} <= shown


# --- batch scripts


def batch_jobs() -> Iterator[tuple[str, str]]:
    """(page, text) of every batch script and sbatch line on a page or in the head of a script."""
    for page in [*PAGES, *sorted((ROOT / "scripts").glob("*.sh"))]:
        text = page.read_text(encoding="utf-8")
        yield from (
            (page.name, found[0])
            for found in re.finditer(r"^```bash\n(?:(?!```).*\n)*?.*SBATCH(?:(?!```).*\n)*", text, re.M)
        )
        yield from ((page.name, found[0]) for found in re.finditer(r"^.*sbatch --(?:.*\\\n)*.*$", text, re.M))


@pytest.mark.parametrize("job", list(batch_jobs()), ids=lambda job: job[0])
def test_a_batch_job_has_cores_for_its_ranks_and_comes_back_after_its_limit(job: tuple[str, str]) -> None:
    page, text = job
    (gpus,) = re.findall(r"--gpus-per-node=(\d+)", text)
    assert f"--ntasks-per-node={gpus} --cpus-per-task=12" in text, page
    assert "--signal=TERM@300" in text, "to the ranks; with B: it would end at the shell"
    # Slurm's own --requeue is for preemption and lost machines.
    assert ("--requeue" in text) == ("scontrol requeue" in text), page


def test_the_pages_show_batch_jobs() -> None:
    assert sorted(page for page, _ in batch_jobs()) == [
        "hh_rlhf_llama_7b.sh", "instructgpt.sh", "multi-gpu.md", "sft.md"
    ]  # fmt: skip


# --- links


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path) if path else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in anchors(file), f"{page.name} links to {target}"


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


# --- data examples


class Example(NamedTuple):
    """kind: file ending; settings: of the data section; format: as claimed; rendered: (settings, text as shown)."""

    line: int
    kind: str
    format: str
    settings: dict[str, object]
    content: str
    rendered: list[tuple[dict[str, str], str]]


def examples() -> list[Example]:
    """The fenced blocks of docs/data.md: data with the format it claims, and the texts it becomes below it.

    "```csv text2text columns.prompt=Frage" opens data, "```text template=hh" a rendering of its first row.
    """
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    found: list[Example] = []
    for block in re.finditer(r"^```(.+)\n((?:.*\n)*?)```$", text, re.MULTILINE):
        kind, *words = shlex.split(block[1])
        line = text.count("\n", 0, block.start()) + 1
        settings = dict(word.split("=", 1) for word in words if "=" in word)
        if kind == "text":
            found[-1].rendered.append((settings, block[2].removesuffix("\n")))
        else:
            columns = {k.removeprefix("columns."): v for k, v in settings.items() if k.startswith("columns.")}
            others: dict[str, object] = {k: v for k, v in settings.items() if not k.startswith("columns.")}
            found.append(Example(line, kind, words[0], others | {"columns": columns}, block[2], []))
    return found


@pytest.mark.parametrize("example", examples(), ids=lambda e: f"line {e.line}: {e.kind} {e.format}")
def test_every_data_example_is_read_as_the_format_it_claims(example: Example, tmp_path: Path) -> None:
    path = tmp_path / f"example.{example.kind}"
    path.write_text(example.content, encoding="utf-8")
    data = build(DataConfig, {"path": str(path), **example.settings})
    sources = open_sources(data, data.path)
    tallies = make_tallies(sources)
    rows = [row for _, row in parsed_rows(data, sources, tallies, data.row_format)]
    assert tallies[0].formats == [example.format]
    assert rows
    if example.format in ("labelled", "prompts"):
        with pytest.raises(DataError, match="row_format"):
            list(training_rows(data, sources, tallies))
    for settings, shown in example.rendered:
        parts = row_segments(
            to_training(rows[0]), TEMPLATES[settings["template"]], {"eos_token": END}, settings.get("loss_on", "auto")
        )
        text = "".join(f"⟦{part.text}⟧" if part.trained else part.text for part in parts)
        text += f"⟦{END}⟧" if parts[-1].trained else END
        assert text.replace("⟧⟦", "") == shown


def test_the_data_page_has_every_format_and_template() -> None:
    claimed = {example.format for example in examples()}
    assert claimed == {"text_only", "text2text", "conversation", "paired", "ranked", "labelled", "prompts", "hh"}
    assert {s["template"] for e in examples() for s, _ in e.rendered} == set(TEMPLATES)
