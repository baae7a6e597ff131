"""What stands in the pictures of runs, read from the figures before they become pixels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.runtime import plots


def line(step: int, **more: float) -> dict[str, Any]:
    """Of an iteration; figures that tell each other apart."""
    names = ("reward_policy", "reward_selected", "distinct_1", "distinct_2", "kl", "length", "discarded")
    return {"step": step, **{f"raft/{n}": 10 * i + step for i, n in enumerate(names)}, "loss": 100 + step, **more}


def held_out(value: float) -> dict[str, float]:
    return {"raft/reward_eval": value, "raft/reward_eval_stderr": 0.5}


def write(run_dir: Path, lines: list[dict[str, Any]]) -> Path:
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    return run_dir


def curves(axes: Any) -> dict[str, list[tuple[float, float]]]:
    """Label -> points, of lines with a label of their own."""
    handles, labels = axes.get_legend_handles_labels()
    lines = [getattr(handle, "lines", [handle])[0] for handle in handles]  # of error bars, the line between them
    return {name: [(float(x), float(y)) for x, y in of.get_xydata()] for of, name in zip(lines, labels, strict=True)}


def test_ranking_shows_rewards_and_what_goes_with_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [
        {"step": 0} | held_out(-2),
        line(1),
        line(2, **{"alarm/distinct_2_drop": 1.0}) | held_out(-1),
        line(3, **{"alarm/distinct_2_drop": 1.0, "alarm/kl_budget": 1.0}) | {"loss": float("nan")},
    ]
    figures = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: figures.append((figure, path)))
    plots.plot_ranking(write(tmp_path, lines), "a run")
    ((figure, path),) = figures
    assert path == tmp_path / "plots" / "raft.png"
    top, *below = figure.axes
    assert curves(top) == {
        "policy": [(1, 1), (2, 2), (3, 3)], "selected": [(1, 11), (2, 12), (3, 13)], "held-out": [(0, -2), (2, -1)],
    }  # fmt: skip
    assert {a.get_ylabel(): curves(a) for a in below} == {
        "distinct n-grams (share)": {"distinct-1": [(1, 21), (2, 22), (3, 23)],
                                     "distinct-2": [(1, 31), (2, 32), (3, 33)]},
        "KL to reference (nats)": {"kl": [(1, 41), (2, 42), (3, 43)]},
        "length (tokens)": {"length": [(1, 51), (2, 52), (3, 53)]},
        "discarded (share)": {"discarded": [(1, 61), (2, 62), (3, 63)]},
        "loss (nats)": {"loss": [(1, 101), (2, 102)]},
    }  # fmt: skip
    # Each alarm once, where it was first raised
    assert [(text.get_text(), text.xy[0]) for text in top.texts] == [
        ("alarm distinct_2_drop", 2),
        ("alarm kl_budget", 3),
    ]
    for axes in figure.axes:
        assert [of.get_xdata()[0] for of in axes.lines if of.get_linestyle() == ":"] == [2, 3]
        assert axes.get_xlabel() == "iteration"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("only", [{"step": 0} | held_out(-2), line(1)], ids=["evaluation", "iteration"])
def test_one_line_is_enough_for_a_picture(only: dict[str, Any], tmp_path: Path) -> None:
    path = plots.plot_ranking(write(tmp_path, [only]), "a run")
    assert path is not None
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_spread_that_is_infinite_has_no_bar(tmp_path: Path) -> None:
    """Of rewards like 1e300; json reads it back."""
    wild = held_out(1) | {"raft/reward_eval_stderr": float("inf")}
    assert plots.plot_ranking(write(tmp_path, [{"step": 0} | held_out(-2), line(1) | wild]), "a run") is not None


def test_nothing_logged_is_no_picture(tmp_path: Path) -> None:
    assert plots.plot_ranking(tmp_path, "a run") is None
    assert not list(tmp_path.iterdir())


def test_the_alarms_of_ppo_stand_where_iterations_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: figures.append(figure))
    lines = [{"step": s, "objective/scores": 0.1 * s, "objective/kl": s, "loss/policy_avg": 0.5} for s in (1, 2, 3)]
    lines[1]["alarm/negative_kl"] = 1.0
    plots.plot_policy(write(tmp_path, lines), "a run")
    marked = {
        a.get_xlabel(): [of.get_xdata()[0] for of in a.lines if of.get_linestyle() == ":"] for a in figures[0].axes
    }
    assert marked == {"iteration": [2], "√KL": []}
