"""`rlhf report`: what is found, what stands on the page, and what becomes of runs that are damaged."""

from __future__ import annotations

import html
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_cli import api
from rlhf_cli.cli import main
from rlhf_cli.errors import DataError
from rlhf_cli.report.chain import Edge
from rlhf_cli.report.chain import make_chain as chain_of
from rlhf_cli.report.comparison import aligned_table, comparison, differences, raised, supervised_table
from rlhf_cli.report.cost import cost, cost_of
from rlhf_cli.report.find import find_runs, short_names
from rlhf_cli.report.markup import duration, escaped, table, tag
from rlhf_cli.report.page import page
from rlhf_cli.report.responses import groups_of, responses
from rlhf_cli.report.runs import read_ancestors, read_run, read_runs
from rlhf_cli.report.settings import changed
from rlhf_cli.report.write import read_words
from tests.report_cases import PPO, RAFT, RM, SFT, cells, make_chain, make_run, parsed, texts


def names(paths: list[Path]) -> list[str]:
    return sorted(path.name for path in paths)


# --- finding


def test_runs_are_found_outright_and_below_folders_each_once(tmp_path: Path) -> None:
    runs = make_chain(tmp_path / "runs" / "chain")
    make_run(tmp_path / "runs" / "sweep" / "optim.lr=0.1", "sft", SFT)
    make_run(runs["sft"] / "copy", "sft", SFT)  # what lies in a run is a part of it
    (tmp_path / "runs" / "mine").mkdir()
    (tmp_path / "runs" / "mine" / "manifest.json").write_text('{"name": "of another program"}')
    begun = tmp_path / "runs" / "begun"
    begun.mkdir()
    (begun / "config.yaml").write_text("run_dir: x\nstage: rm\n")  # no manifest yet
    found = find_runs([tmp_path / "runs", runs["ppo"], tmp_path / "runs" / "chain" / ".." / "chain"])
    assert names(found) == ["begun", "optim.lr=0.1", "ppo", "raft", "rm", "rm_merged", "sft"]
    assert (read_run(begun, "begun").stage, read_run(begun, "begun").status) == ("rm", "not started")


def test_runs_that_are_links_are_found_and_circles_left(tmp_path: Path) -> None:
    disk, runs = tmp_path / "disk", tmp_path / "runs"
    make_run(disk / "sft", "sft", SFT)
    make_run(disk / "far" / "rm", "rm", RM)
    runs.mkdir()
    (runs / "sft").symlink_to(disk / "sft")
    (runs / "again").symlink_to(disk / "sft")
    (runs / "more").symlink_to(disk / "far")
    (runs / "circle").symlink_to(runs)
    (runs / "a" / "b" / "c").mkdir(parents=True)
    (runs / "a" / "b" / "c" / "deep").symlink_to(disk / "far")  # too deep to be looked into, and so not done with
    (runs / "gone").symlink_to(disk / "nothing")
    assert find_runs([runs]) == [(disk / name).resolve() for name in ("sft", "far/rm")]


def test_names_are_as_long_as_tells_runs_apart() -> None:
    assert short_names([Path("/a/x/run"), Path("/b/x/run"), Path("/c/run")]) == ["a/x/run", "b/x/run", "c/run"]
    assert short_names([Path("/a/one"), Path("/a/two")]) == ["one", "two"]


# --- the command


def test_the_page_is_written_where_it_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_chain(tmp_path / "runs")
    odd = make_run(tmp_path / "sweep" / "optim.lr=0.1", "sft", SFT)
    assert main(["report", "runs"]) == 0
    assert capsys.readouterr().out.startswith("report.html: 5 runs, ")
    assert main(["report", str(odd), "out=new/page.html"]) == 0
    assert capsys.readouterr().out.startswith("new/page.html: 1 run, ")
    assert os.listdir("new") == ["page.html"]
    assert texts(Path("new/page.html").read_text(), "h1") == ["rlhf report: optim.lr=0.1"]
    assert api.report(["runs", odd], "both.html") == Path("both.html")
    assert texts(Path("both.html").read_text(), "h1") == ["rlhf report: 6 runs"]
    assert main(["report", "--help"]) == 0
    assert "out=FILE.html" in capsys.readouterr().out


def test_a_wrong_request_is_one_line_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = str(make_run(tmp_path / "runs" / "sft", "sft", SFT))
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    for words, said in (
        ([], "no run directory is named"),
        ([run, "none"], "none: no such directory"),
        ([run, "empty"], "empty holds no run"),
        ([run, "--out=a.html"], "no flag '--out=a.html'; usage: rlhf report RUN_DIR... [out=FILE.html]"),
        ([run, "outt=a.html"], "outt=a.html: no such directory"),
        ([run, "out=a.html", "out=b.html"], "is given 2 times"),
        ([run, f"out={run}/metrics.jsonl"], "end the name in .html"),
        ([run, "out=file/a.html"], "file/a.html cannot be written (File exists)"),
    ):
        assert main(["report", *words]) == 2, words
        shown = capsys.readouterr()
        assert said in shown.err
        assert shown.err.startswith("error: ")
        assert len(shown.err.splitlines()) == 1
        assert shown.out == ""
    assert not list(tmp_path.rglob("*.html"))
    assert main(["repot", run]) == 2
    assert "did you mean `rlhf report`?" in capsys.readouterr().err
    with pytest.raises(DataError, match="no such directory"):
        api.report(["none"])


def test_every_report_that_the_pages_show_is_a_request() -> None:
    root = Path(__file__).parent.parent
    pages = [root / "README.md", *sorted((root / "docs").glob("*.md"))]
    shown = [(p.name, words) for p in pages for words in re.findall(r"^    rlhf report (.*)$", p.read_text(), re.M)]
    assert {"README.md", "report.md", "raft.md"} <= {name for name, _ in shown}
    for _, words in shown:
        places, out = read_words(shlex.split(re.split(r"\s{2,}", words)[0]))  # two blanks part a remark
        assert places
        assert out.suffix == ".html"


def test_no_heavy_library_is_loaded(tmp_path: Path) -> None:
    make_chain(tmp_path / "runs")
    program = (
        "import sys; from rlhf_cli.cli import main; main(sys.argv[1:]);"
        "sys.exit(bool({'torch', 'numpy', 'matplotlib', 'transformers', 'hydra'} & set(sys.modules)))"
    )
    words = ["report", str(tmp_path / "runs"), f"out={tmp_path / 'a.html'}"]
    done = subprocess.run([sys.executable, "-c", program, *words], check=False, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")


# --- the page


def test_the_page_needs_nothing_beside_it_and_runs_nothing(tmp_path: Path) -> None:
    make_chain(tmp_path / "runs")
    runs = read_runs(find_runs([tmp_path / "runs"]))
    document = page(runs, read_ancestors(runs), "now")
    tree = parsed(document)
    elements = {element.tag for element in tree.iter()}
    assert not elements & {"script", "link", "img", "iframe", "object", "embed", "image", "use"}
    attributes = [pair for element in tree.iter() for pair in element.attrib.items()]
    assert not [name for name, _ in attributes if name.startswith("on") or name in ("src", "srcset", "background")]
    ids = {value for name, value in attributes if name == "id"}
    links = {value for name, value in attributes if name == "href"}
    assert links == {f"#{key}" for key in ("chain", "results", "curves", "responses", "time", "settings", "origins")}
    assert {link.removeprefix("#") for link in links} <= ids
    assert not re.search(r"https?:|@import|url\((?!#head\))", document)
    assert "<script>alert('x')</script>" in texts(document, "div")  # to be read, not run
    for drawn in tree.iter("svg"):
        assert drawn.get("aria-hidden") == "true" or (drawn.get("role") == "img" and drawn.get("aria-label"))
    for shown in tree.iter("table"):
        assert shown.find("caption") is not None
        assert all(cell.get("scope") for cell in shown.iter("th"))


@given(st.text(st.characters(codec=None), max_size=30))
def test_any_text_can_stand_on_a_page(text: str) -> None:
    written = escaped(text)
    written.encode("utf-8")
    assert tag("p", text, title=text) == f'<p title="{written}">{written}</p>'
    assert not re.search("[<>\"'\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", written)
    shown = html.unescape(written)
    assert len(shown) == len(text)
    assert all(a == b or not a.isprintable() for a, b in zip(text, shown, strict=True))


def test_markup_is_escaped_once() -> None:
    assert tag("b", "a<b", tag("i", "&")) == "<b>a&lt;b<i>&amp;</i></b>"
    assert tag("p", "\x00\x1b") == "<p>␀␛</p>"
    assert cells(table(["a", "b"], [["<x>", 1]], "c")) == [["a", "b"], ["<x>", "1"]]


def test_durations_have_two_units() -> None:
    # 90061 s = 1 d + 1 h + 1 min + 1 s
    assert [duration(s) for s in (0.25, 59.6, 61, 3600, 90061, None)] == [
        "0.2 s", "1 min 0 s", "1 min 1 s", "1 h 0 min", "1 d 1 h", "–",
    ]  # fmt: skip


# --- tables


def test_a_row_for_each_policy(tmp_path: Path) -> None:
    runs = [
        read_run(make_run(tmp_path / "ppo", "ppo", PPO), "ppo"),
        read_run(make_run(tmp_path / "raft", "raft", RAFT, status="running"), "raft"),
        read_run(make_run(tmp_path / "new", "raft", RAFT[:1], status="interrupted"), "new"),
    ]
    assert cells(aligned_table(runs))[1:] == [
        ["ppo", "ppo", "2", "-1.500 ± 0.250 → -0.500 ± 0.125", "-0.500 after 2", "-0.750", "4.00", "0.500", "20.0",
         "3.5000", "17 min 1 s", "1,064"],
        ["raft", "raft", "1 (running)", "-1.500 ± 0.250 → -1.000 ± 0.250", "-1.000 after 1", "-1.250", "0.00", "0.875",
         "17.0", "–", "7.0 s", "64"],
        ["new", "raft", "0 (interrupted)", "-1.500 ± 0.250 → –", "-1.500 after 0", "–", "–", "–", "–", "–", "–", "0"],
    ]  # fmt: skip


def test_figures_of_supervised_stages_and_of_merges(tmp_path: Path) -> None:
    runs = read_runs(list(make_chain(tmp_path).values()))
    by_name = {run.name: run for run in runs}
    rows = cells(supervised_table([by_name["sft"], by_name["rm"]]))[1:]
    assert rows[0] == ["sft", "sft", "10", "3.7500", "–", "–", "–", "–", "–", "–", "4.0 s"]
    assert rows[1] == ["rm", "rm", "8", "–", "–", "0.875 ± 0.062", "–", "–", "–", "–", "–"]
    merged = make_run(
        tmp_path / "m",
        "merge-lora",
        [],
        manifest={"metrics": {"shards": 2.0, "bad": float("nan")}, "eval_rows_seen": 3},
    )
    assert ["m", "merge-lora", "complete", "shards 2"] in cells(comparison([read_run(merged, "m")]))
    seen = make_run(tmp_path / "seen", "rm", [], manifest={"eval_rows_seen": [{"run_dir": "/sft", "rows": 7}]})
    assert "seen: 7 held-out rows were trained on in /sft" in texts(comparison([read_run(seen, "seen")]), "li")


def test_what_forbids_to_compare_is_said(tmp_path: Path) -> None:
    a = make_run(tmp_path / "a", "ppo", PPO, generation={"temperature": 0.5})
    b = make_run(tmp_path / "b", "raft", RAFT, eval={"temperature": 0.5})  # the same: a follows its rollouts
    c = make_run(tmp_path / "c", "raft", RAFT, model={"path": "other"}, reward={"sources": [], "clip": 5.0})
    alike, others = read_runs([a, b]), read_runs([a, b, c])
    assert differences(alike) == []
    assert differences(others) == [
        "model.path is start in a, b; other in c",
        "reward.sources is not the same in a, b; c (see the settings)",
        "reward.clip is null in a, b; 5.0 in c",
        "eval.temperature is 0.5 in a, b; 1.0 in c",
    ]


def test_an_alarm_is_named_where_it_was_first_raised(tmp_path: Path) -> None:
    lines = [{"step": s, "alarm/kl_budget": float(s >= 3), "objective/kl": 1.0} for s in (1, 2, 3, 4)]
    run = read_run(make_run(tmp_path / "a", "ppo", lines), "a")
    assert raised([run]) == ["a: alarm kl_budget, first after iteration 3"]
    runs = read_runs([tmp_path / "a"])
    document = page(runs, {}, "now")
    assert "a: alarm kl_budget" in texts(document, "title")


def test_settings_are_those_that_differ_from_the_defaults(tmp_path: Path) -> None:
    sources = [{"type": "model", "path": "rm", "weight": 1.0}, {"type": "rouge", "weight": 0.5}]
    a = make_run(tmp_path / "a", "ppo", PPO, ppo={"kl_coef": 0.25, "gone": 3}, reward={"sources": sources})
    b = make_run(tmp_path / "b", "ppo", PPO, train={"seed": 7}, deepspeed={"json": {"zero": {"stage": 1}}})
    found = {s.key: s for s in changed("ppo", read_runs([a, b]))}
    assert found["ppo.kl_coef"].values == ["0.25", None]
    assert found["ppo.kl_coef"].differs
    assert found["train.seed"].values == [None, "7"]
    assert found["model.path"].values == ["start", "start"]
    assert not found["model.path"].differs
    assert found["reward.sources"].values == ["[{path: rm}, {type: rouge, weight: 0.5}]", "[{path: rm}]"]
    assert found["deepspeed.json"].values == [None, "{zero: {stage: 1}}"]
    assert (found["ppo.gone"].default, found["ppo.gone"].values) == (None, ["3", None])
    # generation.temperature, clip and the others are at their defaults; where a run lies is said elsewhere
    assert set(found) == {
        "model.path", "data.path", "reward.sources", "deepspeed.json", "ppo.kl_coef", "train.seed", "ppo.gone",
    }  # fmt: skip


def test_time_by_part_and_the_most_memory(tmp_path: Path) -> None:
    ppo = read_run(make_chain(tmp_path)["ppo"], "ppo")
    found = cost_of(ppo)
    # 4 + 6, 1 + 2, 3 + 5; of 1021 s
    assert found.parts == {"writing": 10.0, "scoring": 3.0, "learning": 8.0, "rest": 1000.0}
    assert found.memory_gb == 2.5
    drawn = cost([ppo])
    # 10:00:00 to 11:01:05
    assert cells(drawn)[1] == [
        "ppo", "ppo", "1 h 1 min", "17 min 1 s", "10 s", "3.0 s", "8.0 s", "16 min 40 s", "–", "–", "2.50", "–",
    ]  # fmt: skip
    widths = [float(rect.get("width") or 0) for rect in parsed(drawn).iter("rect") if rect.get("height") == "16"]
    assert widths == [round(part / 1021 * 600, 1) for part in (10, 3, 8, 1000)]


# --- the chain


def test_the_chain_has_a_column_for_each_step(tmp_path: Path) -> None:
    paths = make_chain(tmp_path)
    runs = read_runs(list(paths.values()))
    chain = chain_of(runs, {})
    key = {name: str(path) for name, path in paths.items()}
    assert [[c for c in column if isinstance(c, str)] for column in chain.columns[:3]] == [
        [key["sft"]], [key["rm"]], [key["rm_merged"]],
    ]  # fmt: skip
    assert set(chain.columns[3]) == {key["ppo"], key["raft"]}
    # what skips a column has a place in it: the merge's base, and the policy of ppo and raft
    base, ppo, raft = (
        Edge(key["sft"], key[to], role) for to, role in (("rm_merged", "base"), ("ppo", "policy"), ("raft", "policy"))
    )
    assert [{c for c in column if isinstance(c, Edge)} for column in chain.columns] == [
        set(), {base, ppo, raft}, {ppo, raft}, set(),
    ]  # fmt: skip
    document = page(runs, {}, "now")
    assert "ppo (ppo) from policy sft, reward rm_merged" in texts(document, "li")


def test_ancestors_are_followed_as_far_as_they_are_there(tmp_path: Path) -> None:
    paths = make_chain(tmp_path)
    elsewhere = make_run(
        tmp_path / "late", "raft", RAFT, parents={"policy": paths["ppo"], "reward": tmp_path / "deleted" / "rm"}
    )
    runs = read_runs([elsewhere])
    chain = chain_of(runs, read_ancestors(runs))
    listed = {node.name: node.listed for node in chain.nodes.values()}
    parent = tmp_path.name
    assert listed == {"late": True, "deleted/rm": False} | {
        f"{parent}/{name}": False for name in ("sft", "rm", "rm_merged", "ppo")
    }
    assert [node.status for node in chain.nodes.values() if node.name == "deleted/rm"] == ["gone"]


def test_a_model_that_no_run_made_begins_the_chain(tmp_path: Path) -> None:
    made = make_run(tmp_path / "sft", "sft", SFT, manifest={"base_model": "some/hub-id"})
    inside = make_run(tmp_path / "raft", "raft", RAFT, manifest={"base_model": str(made / "model")})
    chain = chain_of(read_runs([made, inside]), {})
    assert set(chain.edges) == {Edge("some/hub-id", str(made), "base"), Edge(str(made), str(inside), "base")}
    # a base that is a parent, too, is drawn once: named relatively, the parent is resolved
    rm = make_run(tmp_path / "rm", "rm", [], parents={"policy": made}, manifest={"base_model": f"{tmp_path.name}/sft"})
    assert [edge.role for edge in chain_of(read_runs([made, rm]), {}).edges if edge.target == str(rm)] == ["policy"]


def test_runs_that_were_moved_together_find_each_other(tmp_path: Path) -> None:
    old = Path("/elsewhere/runs")
    sft = make_run(tmp_path / "sft", "sft", SFT)
    ppo = make_run(tmp_path / "ppo", "ppo", PPO, parents={"policy": old / "sft", "reward": old / "rm"})
    for path, name in ((sft, "sft"), (ppo, "ppo")):
        (path / "config.yaml").write_text(f"stage: {name}\nrun_dir: runs/{name}\n")
    runs = read_runs([sft, ppo])
    chain = chain_of(runs, read_ancestors(runs))
    assert set(chain.edges) == {Edge(str(sft), str(ppo), "policy"), Edge(str(old / "rm"), str(ppo), "reward")}
    assert len(chain.nodes) == 3


def test_a_circle_of_damaged_manifests_is_drawn_all_the_same(tmp_path: Path) -> None:
    one = make_run(tmp_path / "one", "sft", SFT, parents={"policy": tmp_path / "two"})
    two = make_run(tmp_path / "two", "sft", SFT, parents={"policy": one, "reward": tmp_path / "two"})
    runs = read_runs([one, two])
    chain = chain_of(runs, read_ancestors(runs))
    assert len(chain.edges) == 1
    assert [len(column) for column in chain.columns] == [1, 1]
    parsed(page(runs, read_ancestors(runs), "now"))


# --- responses


def test_the_same_prompts_side_by_side(tmp_path: Path) -> None:
    rows = lambda *texts: [{"prompt": p, "response": f"{t} {p}", "score": 1.0} for t in texts for p in ("a", "b", "b")]
    a = make_run(
        tmp_path / "a", "ppo", PPO, samples={"eval_00000000.jsonl": rows("old"), "eval_00000002.jsonl": rows("new")}
    )
    b = make_run(
        tmp_path / "b", "raft", RAFT, samples={"eval_00000000.jsonl": rows("old"), "eval_00000010.jsonl": rows("b's")}
    )
    other = make_run(tmp_path / "c", "sft", SFT, samples={"step_00000005.jsonl": [{"prompt": "c", "response": "x"}]})
    groups = groups_of(read_runs([a, b, other]))
    assert [[column.title for column in group.columns] for group in groups] == [
        ["before", "a, iteration 2", "b, iteration 10"], ["c, step 5"],
    ]  # fmt: skip
    assert groups[0].prompts == [("a", 0), ("b", 0), ("b", 1)]
    drawn = responses(read_runs([a, b, other]))
    assert texts(drawn, "h5")[:3] == ["before score 1.000", "a, iteration 2 score 1.000", "b, iteration 10 score 1.000"]
    assert [t for t in texts(drawn, "div") if t in ("old a", "new a", "b's a")] == ["old a", "new a", "b's a"]


def test_starts_that_were_judged_otherwise_stand_apart(tmp_path: Path) -> None:
    row = lambda score: [{"prompt": "a", "response": "same", "score": score}]
    runs = read_runs(
        [
            make_run(tmp_path / n, "ppo", PPO, samples={"eval_00000000.jsonl": row(s), "eval_00000002.jsonl": row(9.0)})
            for n, s in (("a", -2.5), ("b", -2.51), ("c", 0.5))
        ]
    )
    (group,) = groups_of(runs)
    assert [c.title for c in group.columns[:2]] == ["before a, b", "before c"]


# --- what is damaged


def test_damaged_runs_are_shown_with_what_is_wrong_and_the_others_as_usual(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = make_run(tmp_path / "good", "ppo", PPO)
    bad = make_run(tmp_path / "bad", "ppo", PPO)
    (bad / "manifest.json").write_text('{"stage": "ppo", ')
    (bad / "metrics.jsonl").write_text(
        json.dumps(PPO[1]) + '\n{"step": \n"text"\n{"step": true}\n' + json.dumps(PPO[2]) + "\n" + '{"step": 3, "obj'
    )
    worse = make_run(tmp_path / "worse", "ppo", PPO)
    (worse / "manifest.json").write_bytes(b"\xff\x00")
    (worse / "config.yaml").write_text("a: [")
    odd = make_run(
        tmp_path / "odd",
        "sft",
        [{"step": 1, "loss": "high"}, {"step": 2, "loss": float("nan")}, {"step": 3, "loss": 1e300}],
    )
    said = {"stage": "sft", "status": 5, "parents": [3, {"role": 1}], "data": "x", "metrics": 1, "versions": []}
    (odd / "manifest.json").write_text(json.dumps(said))
    (odd / "samples").mkdir()
    (odd / "samples" / "step_00000001.jsonl").write_bytes(
        b'\xff\n{"prompt": "a", "response": 3}\n' + b"[" * 9999 + b"\n"
    )
    strange = make_run(tmp_path / "strange", "another-stage", SFT)
    out = tmp_path / "a.html"
    assert main(["report", *map(str, (good, bad, worse, odd, strange)), f"out={out}"]) == 0
    notes = sorted(capsys.readouterr().err.splitlines())
    expected = [
        f"note: bad: {bad}/manifest.json is damaged (",
        f"note: bad: {bad}/metrics.jsonl:2 is damaged; 3 lines are left out",
        f"note: odd: {odd}/samples/step_00000001.jsonl:1 is damaged; 3 lines are left out",
        f"note: worse: {worse}/config.yaml cannot be read (",
        f"note: worse: {worse}/manifest.json is damaged (",
    ]
    assert len(notes) == len(expected)
    assert all(note.startswith(words) for note, words in zip(notes, expected, strict=True))
    document = out.read_text()
    policies = {row[0]: row[2:5] for row in cells(document) if len(row) == 12 and row[1] == "ppo" and "→" in row[3]}
    assert policies == {
        "good": ["2", "-1.500 ± 0.250 → -0.500 ± 0.125", "-0.500 after 2"],
        "bad": ["2 (unknown)", "-0.500 ± 0.125 → –", "-0.500 after 2"],  # its line of step 0 is gone
    }
    statuses = {row[0]: row[1] for row in cells(document) if len(row) == 8}
    assert [statuses[name] for name in ("good", "bad", "worse", "odd", "strange")] == [
        "complete", "unknown", "unknown", "5", "complete",
    ]  # fmt: skip
    problems = parsed(document).find(".//section[@id='problems']")
    assert problems is not None
    assert len(list(problems.iter("li"))) == 5


def test_a_failed_run_says_why(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "sft", SFT, status="failed")
    (run / "logs").mkdir()
    note = {
        "time": 1.0,
        "rank": 3,
        "host": "h",
        "kind": "crash",
        "message": "no <room>",
        "traceback": "",
        "exit_code": 1,
    }
    (run / "logs" / "error_rank_3.json").write_text(json.dumps(note))
    document = page(read_runs([run]), {}, "now")
    assert "run: it ended with: rank 3: no <room>" in texts(document, "li")
    (run / "logs" / "error_rank_3.json").write_text("{}")
    assert "cannot be read" in read_run(run, "run").problems[0]


def test_an_empty_run_has_a_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "ppo", [], status="running")
    document = page(read_runs([run]), {}, "now")
    assert texts(document, "h2") == [
        "The chain", "What came out", "Time and memory", "Settings that differ from the defaults",
        "Where it comes from",
    ]  # fmt: skip
