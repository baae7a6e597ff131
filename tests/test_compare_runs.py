"""scripts/compare_runs.py: the table and the curves of runs whose figures stand here."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"

PPO = [
    {"step": 0, "episode": 0, "eval_reward": -1.5, "eval_reward_stderr": 0.25, "eval_loss": 3.25},
    {"step": 1, "episode": 32, "seconds": 10.5, "objective/scores": -1.0, "objective/kl": -0.5, "text/distinct_2": 0.75,
     "text/length": 16.0},
    {"step": 2, "episode": 1064, "seconds": 1021.0, "objective/scores": -0.75, "objective/kl": 4.0,
     "text/distinct_2": 0.5, "text/length": 20.0, "eval_reward": -0.5, "eval_reward_stderr": 0.125, "eval_loss": 3.5},
]  # fmt: skip
RAFT = [
    {"step": 0, "episode": 0, "raft/reward_eval": -1.5, "raft/reward_eval_stderr": 0.25},
    {"step": 1, "episode": 64, "seconds": 7.0, "raft/reward_policy": -1.25, "raft/reward_selected": 9.0, "raft/kl": 0.0,
     "raft/distinct_2": 0.875, "raft/length": 17.0, "raft/reward_eval": -1.0, "raft/reward_eval_stderr": 0.25},
]  # fmt: skip
SFT = [{"step": 5, "loss": 4.0, "seconds": 2.0}, {"step": 10, "loss": 3.5, "eval_loss": 3.75, "seconds": 4.0}]


@pytest.fixture
def script() -> Iterator[Any]:
    sys.path.insert(0, str(SCRIPTS))
    try:
        import compare_runs

        yield compare_runs
    finally:
        sys.path.remove(str(SCRIPTS))


def make_run(place: Path, stage: str, lines: list[dict[str, Any]], status: str = "complete", **options: Any) -> str:
    """A run directory as far as the script reads it. options: section=..., merged into the config."""
    place.mkdir(parents=True)
    config: dict[str, Any] = {"stage": stage, "model": {"path": "start"}, "data": {"path": "prompts.jsonl"}}
    if stage != "sft":
        config |= {"generation": {"temperature": 1.0}, "eval": {"num_prompts": 64, "temperature": None}}
        config["reward"] = {"sources": [{"type": "model", "path": "rm"}], "normalize": False, "clip": None}
    for section, changes in options.items():
        config[section] = config[section] | changes
    (place / "config.yaml").write_text(yaml.safe_dump(config))
    (place / "manifest.json").write_text(json.dumps({"stage": stage, "status": status}))
    (place / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(place)


@pytest.mark.filterwarnings("error")
def test_a_row_for_each_run(script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ppo = make_run(tmp_path / "ppo", "ppo", PPO)
    raft = make_run(tmp_path / "raft", "raft", RAFT, status="running")
    sft = make_run(tmp_path / "sft", "sft", SFT, model={"path": "elsewhere"})  # the start of an sft run is another
    out = tmp_path / "new" / "figure.png"
    assert script.main([ppo, raft, sft, "--out", str(out)]) == 0
    table, picture = capsys.readouterr().out.split("\n\n")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert rows[2:] == [
        ["ppo", "ppo", "2", "-1.500 ± 0.250 → -0.500 ± 0.125", "-0.750", "4.00", "0.500", "20.0", "3.5000", "1,021",
         "1,064"],
        ["raft", "raft", "1 (running)", "-1.500 ± 0.250 → -1.000 ± 0.250", "-1.250", "0.00", "0.875", "17.0", "–", "7",
         "64"],
        ["sft", "sft", "10", "–", "–", "–", "–", "–", "3.7500", "4", "–"],
    ]  # fmt: skip
    assert {len(row) for row in rows} == {11}
    assert picture == f"picture: {out}\n"
    assert out.read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in out.parent.iterdir()] == ["figure.png"]


def curves(axes: Any) -> list[list[tuple[float, float]]]:
    """The points of the lines that have any."""
    points = [[(float(x), float(y)) for x, y in line.get_xydata()] for line in axes.lines]
    return [line for line in points if line]


def test_what_is_drawn(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = []
    monkeypatch.setattr(script, "save_figure", lambda figure, path: figures.append(figure))
    ppo, raft = make_run(tmp_path / "first", "ppo", PPO), make_run(tmp_path / "second", "raft", RAFT)
    script.draw(script.read_runs([Path(ppo), Path(raft)]), tmp_path / "a.png")
    axes = {(a.get_xlabel(), a.get_ylabel()): a for a in figures[0].axes}
    assert {x for x, _ in axes} == {"iteration", "seconds", "√KL"}
    assert len(axes) == 10
    by_step = curves(axes["iteration", "reward"])
    for line in ([(1, -1), (2, -0.75)], [(0, -1.5), (2, -0.5)], [(1, -1.25)], [(0, -1.5), (1, -1)]):
        assert line in by_step  # the responses and the held-out prompts of each
    by_seconds = curves(axes["seconds", "reward"])
    for line in ([(10.5, -1), (1021, -0.75)], [(0, -1.5), (1021, -0.5)], [(0, -1.5), (7, -1)]):
        assert line in by_seconds
    assert curves(axes["iteration", "KL to reference (nats)"]) == [[(1, -0.5), (2, 4)], [(1, 0)]]
    assert curves(axes["seconds", "distinct-2"]) == [[(10.5, 0.75), (1021, 0.5)], [(7, 0.875)]]
    assert curves(axes["seconds", "length (tokens)"]) == [[(10.5, 16), (1021, 20)], [(7, 17)]]
    assert curves(axes["√KL", "policy reward"]) == [[(0, -1), (2, -0.75)], [(0, -1.25)]]  # √4; -0.5 counts as 0
    assert curves(axes["seconds", "loss on held-out text (nats per token)"]) == [[(0, 3.25), (1021, 3.5)]]
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["first (ppo)", "second (raft)"]


@pytest.mark.filterwarnings("error")
def test_runs_that_have_just_begun(script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [
        make_run(tmp_path / name / "run", stage, lines[:1], status="interrupted")
        for name, stage, lines in (("a", "ppo", PPO), ("b", "raft", RAFT))
    ]
    assert script.main([*runs, "--out", str(tmp_path / "a.png")]) == 0
    table = capsys.readouterr().out
    assert "| a/run | ppo | 0 (interrupted) | -1.500 ± 0.250 → – | – |" in table
    assert "| b/run | raft | 0 (interrupted) | -1.500 ± 0.250 → – | – |" in table


def test_what_forbids_to_compare_is_said(script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = make_run(tmp_path / "a", "ppo", PPO, generation={"temperature": 0.5})
    b = make_run(tmp_path / "b", "raft", RAFT, eval={"temperature": 0.5})  # the same: a follows its rollouts
    c = make_run(tmp_path / "c", "raft", RAFT, model={"path": "other"}, reward={"sources": []})
    assert script.main([a, b, "--out", str(tmp_path / "a.png")]) == 0
    assert "not alike" not in capsys.readouterr().out
    assert script.main([a, b, c, "--out", str(tmp_path / "a.png")]) == 0
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("- ")]
    assert notes == [
        "- not alike: model.path is start in a, start in b, other in c",
        "- not alike: reward.sources, see each config.yaml",
        "- not alike: eval.temperature is 0.5 in a, 0.5 in b, 1.0 in c",
    ]


def test_one_line_for_what_cannot_be_compared(script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "ppo", "ppo", PPO)
    rm = make_run(tmp_path / "rm", "rm", PPO)
    empty = make_run(tmp_path / "empty", "raft", [], status="running")
    damaged = make_run(tmp_path / "damaged", "raft", RAFT)
    (tmp_path / "damaged" / "metrics.jsonl").write_text('{"step": \n{"step": 1}\n')
    unreadable = make_run(tmp_path / "unreadable", "raft", RAFT)
    (tmp_path / "unreadable" / "config.yaml").write_text("a: [")
    without = make_run(tmp_path / "without", "raft", RAFT)
    (tmp_path / "without" / "config.yaml").unlink()
    out = ["--out", str(tmp_path / "a.png")]
    for words, said in (
        ([run, str(tmp_path / "none")], "none is no run directory (it has no manifest.json)"),
        ([run, str(tmp_path)], "is no run directory (it has no manifest.json)"),
        ([run, without], "without is no run directory (it has no config.yaml)"),
        ([run, rm], "rm is a run of `rlhf rm`; allowed: runs of ppo, raft, sft"),
        ([empty], "metrics.jsonl has no line yet (status: running)"),
        ([damaged], "metrics.jsonl:1 is damaged"),
        ([unreadable], "config.yaml is damaged"),
        ([run, run + "/../ppo"], "is named twice"),
        ([run, "--out", str(tmp_path / "a.jpg")], "end the name in .png"),
        ([run, "--out", f"{run}/manifest.json/a.png"], "manifest.json/a.png cannot be written (File exists)"),
    ):
        assert script.main([*words, *([] if "--out" in words else out)]) == 2, words
        shown = capsys.readouterr()
        assert said in shown.err
        assert shown.err.startswith("error: ")
        assert len(shown.err.splitlines()) == 1
        assert shown.out == ""
    assert not list(tmp_path.glob("**/*.png"))
