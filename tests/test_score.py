"""`rlhf score`: every kind of rows, the same file on any number of ranks, stops, and going on."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf_cli.data.rows import DialogueRow, LabelledRow, Message, PairRow, RankedRow, TextRow
from rlhf_cli.reward import open_reward
from rlhf_cli.reward.records import Summary, texts_of
from rlhf_cli.rundir import read_manifest
from rlhf_cli.schema import LaunchConfig, RewardConfig, RewardSourceConfig, ScoreConfig, SourceConfig
from rlhf_cli.stages import score
from tests.reward_models import write_decoder, write_run
from tests.score_cases import words

RUN, COUNT, STOP = (f"tests.score_cases:run_score{end}" for end in ("", "_counting", "_stopping"))
Runner = Callable[..., list[Any]]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """rm: a run with a reward model; length.py."""
    root = tmp_path_factory.mktemp("sources")
    write_decoder(root / "rm" / "model")
    write_run(root / "rm", template="hh")
    (root / "length.py").write_text("def length(prompts, responses): return [len(r) for r in responses]\n")
    return root


def length(sources: Path) -> str:
    return f"{{type: function, path: {sources / 'length.py'}, function: length}}"


def model(sources: Path) -> str:
    return f"{{path: {sources / 'rm'}}}"


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "scores.jsonl").read_text(encoding="utf-8").splitlines()]


def pairs(rows: int = 50, seed: int = 0) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    say = lambda: " ".join(draw.choice(["the", "floor", "of", "a", "room"]) for _ in range(draw.randint(1, 8)))
    return [{"prompt": say(), "chosen": say(), "rejected": say(), "id": i} for i in range(rows)]


# --- rows


def test_what_of_a_row_is_scored() -> None:
    ask, yes, more, no = (
        Message("user", "a?"), Message("assistant", "yes"), Message("user", "b?"), Message("assistant", "no"),
    )  # fmt: skip
    texts = lambda row: [(t.prompt, t.response) for t in texts_of(row)]
    assert texts(DialogueRow((ask, yes, more, no))) == [((ask, yes, more), "no")]
    assert texts(DialogueRow((ask, yes, more))) == [((ask,), "yes")]  # a question left open
    assert texts(PairRow((ask,), (yes,), (no,))) == [((ask,), "yes"), ((ask,), "no")]
    assert texts(PairRow((ask,), (yes, more, no), (no,))) == [((ask, yes, more), "no"), ((ask,), "no")]
    assert texts(PairRow(None, "good", "bad")) == [(None, "good"), (None, "bad")]
    assert texts(RankedRow((ask,), ("x", "y"), (1, 2))) == [((ask,), "x"), ((ask,), "y")]
    assert texts(TextRow("so")) == [(None, "so")]
    (labelled,) = texts_of(LabelledRow("so", "happy", columns={"id": 3}))
    assert (labelled.prompt, labelled.response, labelled.columns) == (None, "so", {"id": 3, "label": "happy"})


@pytest.mark.parametrize(
    ("row", "line"),
    [
        (
            {"prompt": "p", "response": "four", "id": 1, "score": 9, "source": "web"},
            {"prompt": "p", "response": "four", "score": 4.0, "id": 1, "data_score": 9, "data_source": "web"},
        ),
        (
            {"text": "so", "scores": [7], "chosen_score": 8, "by_source": {"a": 9}, "data_score": 1, "score": 2},
            {"text": "so", "score": 2.0, "data_scores": [7], "data_chosen_score": 8, "data_by_source": {"a": 9},
             "data_score": 1, "data_data_score": 2},
        ),
        ({"text": "žluť 床"}, {"text": "žluť 床", "score": 6.0}),
        ({"text": "lone \ud800"}, {"text": "lone \ud800", "score": 6.0}),
        ({"text": "so", "label": "sad"}, {"text": "so", "label": "sad", "score": 2.0}),
        (
            {"prompt": "p", "chosen": "abc", "rejected": "a", "margin": 0.5},
            {"prompt": "p", "chosen": "abc", "rejected": "a", "chosen_score": 3.0, "rejected_score": 1.0,
             "score_margin": 2.0, "margin": 0.5},
        ),
        (
            {"positive": "ab", "negative": "abcd"},
            {"chosen": "ab", "rejected": "abcd", "chosen_score": 2.0, "rejected_score": 4.0, "score_margin": -2.0},
        ),
        (
            {"prompt": "p", "responses": ["a", "bb", "ccc"], "ranks": [2, 1, 1]},
            {"prompt": "p", "responses": ["a", "bb", "ccc"], "ranks": [2.0, 1.0, 1.0], "scores": [1.0, 2.0, 3.0]},
        ),
        (
            {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"},
                          {"role": "assistant", "content": "ok"}]},
            {"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}],
             "response": "ok", "score": 2.0},
        ),
        (
            {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: cc"},
            {"prompt": "a", "chosen": "b", "rejected": "cc", "chosen_score": 1.0, "rejected_score": 2.0,
             "score_margin": -1.0},
        ),
    ],
)  # fmt: skip
def test_a_line_for_every_kind_of_row(
    run_on_ranks: Runner, sources: Path, tmp_path: Path, row: dict[str, Any], line: dict[str, Any]
) -> None:
    data = write(tmp_path / "data.jsonl", [row])
    run_on_ranks(1, RUN, run_dir=str(tmp_path / "run"), overrides=words(data, length(sources)))
    assert read(tmp_path / "run") == [{"source": f"{data}:1"} | line]


def test_figures_by_hand() -> None:
    summary = Summary()
    for chosen, rejected in [(3.0, 1.0), (0.0, 2.0), (1.0, 1.0)]:
        summary.add({"chosen_score": chosen, "rejected_score": rejected, "score_margin": chosen - rejected})
    figures = summary.figures()
    # right: 1, 0 and a tie, which counts half: mean 1/2, std sqrt(1/6), over sqrt(3)
    assert figures["accuracy"] == 0.5
    assert figures["accuracy_stderr"] == pytest.approx(math.sqrt(1 / 6 / 3))
    assert figures["mean_margin"] == 0.0
    assert (figures["rows"], figures["texts"], figures["min"], figures["max"]) == (3, 6, 0.0, 3.0)
    assert figures["mean"] == pytest.approx(8 / 6)
    assert figures["std"] == pytest.approx(np.std([3, 1, 0, 2, 1, 1]))
    ranked = Summary()
    # ranks 1 < 2 = 2: two pairs that tell, of which scores say one right, one half right
    ranked.add({"ranks": [2, 1, 2], "scores": [0.0, 1.0, 1.0], "by_source": {"a": [0, 1, 1], "b": [0, 0, 0]}})
    ranked.add({"ranks": [1, 1], "scores": [0.0, 1.0], "by_source": {"a": [0, 1], "b": [0, 0]}})  # all tied: no pair
    assert ranked.figures()["accuracy"] == 0.75
    assert (ranked.figures()["mean_a"], ranked.figures()["std_b"]) == (0.6, 0.0)


def test_pass_at_k_by_hand() -> None:
    summary = Summary([1, 2, 4], passes_above=0.5)
    for prompt, scores in (("a?", [1.0, 0.0, 0.0]), ("b?", [0.0, 0.6]), ("c?", [0.5, 0.0, 0.0])):
        for value in scores:
            summary.add({"prompt": prompt, "response": "x", "score": value})
    summary.add({"text": "no prompt, no task", "score": 1.0})
    figures = summary.figures()
    # 1 of 3, 1 of 2 and 0 of 3 are above 0.5; of two drawn: 1 - C(2,2)/C(3,2) = 2/3, 1, 0
    assert figures["tasks"] == 3
    assert figures["pass@1"] == pytest.approx((1 / 3 + 1 / 2) / 3)
    assert figures["pass@2"] == pytest.approx((2 / 3 + 1) / 3)
    assert math.isnan(figures["pass@4"])
    assert (summary.short(2), summary.short(3), summary.short(4)) == (0, 1, 3)


# --- the stage


@pytest.mark.distributed
def test_one_and_two_ranks_write_the_same_file(run_on_ranks: Runner, sources: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "pairs.jsonl", pairs())
    overrides = words(data, model(sources), length(sources)[:-1] + ", weight: 0.25}")
    (figures,) = run_on_ranks(1, RUN, run_dir=str(tmp_path / "one"), overrides=overrides)
    two = run_on_ranks(2, COUNT, run_dir=str(tmp_path / "two"), overrides=overrides)
    assert (tmp_path / "one" / "scores.jsonl").read_bytes() == (tmp_path / "two" / "scores.jsonl").read_bytes()
    assert [scored for _, scored in two] == [2 * (16 + 16), 2 * (16 + 2)], "parts of 16 rows, in turn"
    assert not (tmp_path / "two" / ".scores").exists()

    lines = read(tmp_path / "two")
    assert [line["id"] for line in lines] == list(range(50))
    reward = open_reward(sources / "rm", batch_size=1)
    chosen = reward.score([line["prompt"] for line in lines], [line["chosen"] for line in lines])
    assert [line["by_source"]["model"]["chosen"] for line in lines] == pytest.approx(chosen, abs=1e-5)
    for line in lines:
        apart = line["by_source"]
        assert line["chosen_score"] == pytest.approx(apart["model"]["chosen"] + 0.25 * len(line["chosen"]))
        assert line["rejected_score"] == pytest.approx(apart["model"]["rejected"] + 0.25 * len(line["rejected"]))
    right = [(line["score_margin"] > 0) + 0.5 * (line["score_margin"] == 0) for line in lines]  # some sides are equal
    assert figures["accuracy"] == pytest.approx(sum(right) / 50)

    manifest = read_manifest(tmp_path / "two")
    assert manifest["status"] == "complete"
    assert manifest["output"] == {"kind": "scores", "task": None, "path": "scores.jsonl", "format": "jsonl"}
    assert manifest["metrics"]["mean_margin"] == pytest.approx(figures["mean_margin"])
    (parent,) = manifest["parents"]
    assert (parent["role"], parent["run_dir"]) == ("reward", str(sources / "rm"))
    (tally,) = manifest["data"]
    assert (tally["rows"], tally["kept"], tally["sequences"], tally["formats"]) == (50, 50, 100, ["paired"])


def test_the_summary_has_pass_at_k(run_on_ranks: Runner, sources: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"{i % 2}?", "response": "x" * i} for i in range(6)]
    data = write(tmp_path / "data.jsonl", rows)
    more = {"score__pass_at_k": "[1,3,4]", "score__passes_above": 2.5}
    run_on_ranks(1, RUN, run_dir=str(tmp_path / "run"), overrides=words(data, length(sources), **more))
    metrics = read_manifest(tmp_path / "run")["metrics"]
    # lengths 0 2 4 and 1 3 5: 1 of 3 and 2 of 3 are above 2.5
    assert metrics["pass@1"] == pytest.approx(0.5)
    assert metrics["pass@3"] == 1.0
    assert "pass@4" not in metrics


def test_the_file_can_be_scored_again(run_on_ranks: Runner, sources: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "pairs.jsonl", pairs(5))
    run_on_ranks(1, RUN, run_dir=str(tmp_path / "a"), overrides=words(data, model(sources)))
    again = words(tmp_path / "a" / "scores.jsonl", model(sources))
    run_on_ranks(1, RUN, run_dir=str(tmp_path / "b"), overrides=again)
    assert [x["score_margin"] for x in read(tmp_path / "b")] == [x["score_margin"] for x in read(tmp_path / "a")]


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_stopped_run_goes_on_and_ends_the_same(
    run_on_ranks: Runner, sources: Path, tmp_path: Path, world_size: int
) -> None:
    data = write(tmp_path / "pairs.jsonl", pairs())
    overrides = words(data, model(sources))
    run_on_ranks(1, RUN, run_dir=str(tmp_path / "whole"), overrides=overrides)
    stopped = run_on_ranks(world_size, STOP, run_dir=str(tmp_path / "parts"), overrides=overrides, part=1)
    assert stopped == [{}] * world_size
    assert read_manifest(tmp_path / "parts")["status"] == "interrupted"
    assert not (tmp_path / "parts" / "scores.jsonl").exists()
    ((_, scored),) = run_on_ranks(1, COUNT, run_dir=str(tmp_path / "parts"), overrides=overrides)
    # parts of 16, 16, 16 and 2 pairs: the first is there, and on two ranks what rank 1 had (the second and the last)
    assert scored == 2 * (50 - 16) if world_size == 1 else 2 * (50 - 16 - 16 - 2)
    assert (tmp_path / "parts" / "scores.jsonl").read_bytes() == (tmp_path / "whole" / "scores.jsonl").read_bytes()


def test_scores_of_other_data_or_sources_are_not_mixed_in(run_on_ranks: Runner, sources: Path, tmp_path: Path) -> None:
    code = tmp_path / "mine.py"
    code.write_text("def f(prompts, responses): return [1.0] * len(responses)\n")
    source = f"{{type: function, path: {code}, function: f}}"
    data = write(tmp_path / "pairs.jsonl", pairs())
    arguments: dict[str, Any] = {"run_dir": str(tmp_path / "run"), "overrides": words(data, source)}
    run_on_ranks(1, STOP, **arguments, part=2)
    code.write_text("def f(prompts, responses): return [2.0] * len(responses)\n")
    ((figures, scored),) = run_on_ranks(1, COUNT, **arguments)
    assert (scored, figures["min"], figures["max"]) == (100, 2.0, 2.0)
    run_on_ranks(1, STOP, **arguments, part=2)
    write(data, pairs(50, seed=1))
    ((_, scored),) = run_on_ranks(1, COUNT, **arguments)
    assert scored == 100


def test_bad_rows_are_counted_or_end_the_run(run_on_ranks: Runner, sources: Path, tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "ok"}]},
            {"messages": [{"role": "user", "content": "nobody answers"}]}, {"messages": 3}]  # fmt: skip
    data = write(tmp_path / "talk.jsonl", rows)
    overrides = words(data, length(sources), data__on_bad_row="skip")
    run_on_ranks(1, RUN, run_dir=str(tmp_path / "run"), overrides=overrides)
    assert [line["source"] for line in read(tmp_path / "run")] == [f"{data}:1"]
    (tally,) = read_manifest(tmp_path / "run")["data"]
    assert (tally["rows"], tally["kept"]) == (3, 1)
    assert tally["dropped"]["no reply of the assistant to score"] == 1
    with pytest.raises(AssertionError, match=r"talk\.jsonl:2: no reply of the assistant to score"):
        run_on_ranks(1, RUN, run_dir=str(tmp_path / "strict"), overrides=words(data, length(sources)))


def test_prompts_without_answers(sources: Path, tmp_path: Path) -> None:
    from rlhf_cli.data.stream import open_sources
    from rlhf_cli.errors import DataError

    settings = SourceConfig(path=str(write(tmp_path / "prompts.jsonl", [{"prompt": "p"}])))
    with pytest.raises(DataError, match=r"prompts\.jsonl:1: a prompt without an answer.*data\.columns"):
        score.look_through(settings, open_sources(settings, settings.path))


def test_a_dry_run_loads_no_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_decoder(tmp_path / "rm")
    (tmp_path / "rm" / "model.safetensors").unlink()
    data = write(tmp_path / "pairs.jsonl", pairs(7))
    config = ScoreConfig(
        data=SourceConfig(path=str(data)),
        reward=RewardConfig(sources=[RewardSourceConfig(path=str(tmp_path / "rm"))]),
        launch=LaunchConfig(),
    )
    score.dry_run(config, 2)
    shown = capsys.readouterr().out
    assert "nothing was started" in shown
    assert "14" in shown
    assert "LlamaForSequenceClassification" in shown.replace("\n", "")
