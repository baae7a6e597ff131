"""What a run of `rlhf raft` leaves: trail, figures, models; what it says; what it learns."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_cli.data.prompts import prompt_order
from rlhf_cli.rundir import read_manifest
from rlhf_cli.runtime.metrics import read_metrics
from tests.ppo_reference import naive_logprobs
from tests.raft_cases import Given, equal, lines, raft_words, said, trail, weights
from tests.stage_cases import write_prompts

RAFT = "tests.raft_cases:run_raft"
Ranks = Callable[..., list[Any]]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Given:
    return Given(tmp_path_factory.mktemp("given"))


def best_of(run_dir: Path, before: int = 99) -> int:
    """The first iteration with the highest reward on held-out prompts."""
    rewards = {line["step"]: line["eval_reward"] for line in read_metrics(run_dir) if line["step"] < before}
    return max(rewards, key=lambda step: (rewards[step], -step))


RULES = "[{name: r, pattern: 'r'}, {name: k, pattern: 'k', action: score, score: 0.5}]"


@pytest.fixture(scope="module")
def rules_run(given: Given, run_on_ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("rules") / "run"
    overrides = given.words(
        reward__rules=RULES, raft__keep_models="true", raft__result="last", raft__alarms__length_drift=1e-6,
        raft__alarms__window=1, logging__log_samples_every=1, train__save_every=2, generation__length_sampler="[4,10]",
        logging__progress="lines",
    )  # fmt: skip
    (figures,) = run_on_ranks(1, RAFT, run_dir=str(run_dir), overrides=overrides, plots=True)
    assert read_manifest(run_dir)["metrics"] == figures
    return run_dir


def test_the_trail_says_of_each_response_why(rules_run: Path) -> None:
    seen = set()
    for iteration in (1, 2, 3):
        rows = trail(rules_run, iteration)
        assert [row["sample"] for row in rows] == list(range(16))
        for first in range(0, 16, 4):
            group = rows[first : first + 4]
            assert len({row["prompt"] for row in group}) == 1
            for row in group:
                assert "!" not in row["response"]
                assert row["reward"] == row["reward/function"]
                assert row["reward"] == row["response"].count("e") / max(1, len(row["response"]))
                assert row["rules"] == [letter for letter in "rk" if letter in row["response"]]
                score = None if "r" in row["rules"] else 0.5 if "k" in row["rules"] else row["reward"]
                assert row["score"] == score
            left = sorted((row for row in group if row["score"] is not None), key=lambda row: -row["score"])
            for rank, row in enumerate(left, start=1):
                assert (row["rank"], row["kept"]) == (rank, rank == 1)
                assert row["why_not"] == (None if rank == 1 else "others rank higher")
            for row in group:
                if row not in left:
                    assert (row["rank"], row["kept"], row["why_not"]) == (None, False, "discarded: r")
            seen.update(row["why_not"] for row in group)
        assert trail(rules_run, iteration, "selected") == [row for row in rows if row["kept"]]
    assert seen == {None, "others rank higher", "discarded: r"}
    limits = [{r["sample"]: r["tokens"] for r in trail(rules_run, i) if r["ending"] == "length"} for i in (1, 2)]
    assert all(4 <= limit <= 10 for of_iteration in limits for limit in of_iteration.values())
    assert any(limits[0][i] != limits[1][i] for i in limits[0].keys() & limits[1].keys()), "drawn anew"


def test_the_figures_are_those_of_the_trail(rules_run: Path) -> None:
    found = lines(rules_run)
    assert [line["step"] for line in read_metrics(rules_run)] == [0, 1, 2, 3]
    for line in found:
        rows = trail(rules_run, line["step"])
        final = [0.5 if "k" in row["rules"] else row["reward"] for row in rows]
        kept = [row["score"] for row in rows if row["kept"]]
        assert line["raft/reward_policy"] == pytest.approx(np.mean(final[::4]))
        assert line["raft/reward_selected"] == pytest.approx(np.mean(kept))
        assert line["raft/selected"] == len(kept)
        assert line["raft/discarded"] == np.mean(["r" in row["rules"] for row in rows])
        assert line["raft/length"] == np.mean([row["tokens"] for row in rows[::4]])
        assert line["raft/kl"] == pytest.approx(np.mean([row["kl"] for row in rows[::4]]))
        assert line["raft/reward_eval"] == line["eval_reward"]
        for name in ("raft/distinct_1", "raft/distinct_2", "loss", "grad_norm", "perf/generate_s", "perf/score_s",
                     "perf/train_s", "perf/rollout_tokens_per_s", "perf/mfu", "rules/r", "rules/k"):  # fmt: skip
            assert line[name] >= 0, name
        assert line["learning_rate"] == 0.003
    assert found[0]["raft/kl"] == 0.0, "the policy is the reference before the first step, bit for bit"
    assert found[-1]["raft/kl"] != 0.0
    assert found[-1]["tokens"] == sum(row["tokens"] for i in (1, 2, 3) for row in trail(rules_run, i))
    # Two passes over those selected, two at a time.
    steps = sum(2 * -(-len(trail(rules_run, i, "selected")) // 2) for i in (1, 2, 3))
    assert found[-1]["optimizer_steps"] == steps
    figures = read_manifest(rules_run)["metrics"]
    assert figures["optimizer_steps"] == steps
    assert figures["episodes"] == 48
    assert figures["eval_reward"] == found[-1]["eval_reward"], "of the last policy, which is model/"
    assert figures["raft/reward_selected"] == found[-1]["raft/reward_selected"]


def test_models_beside_and_what_was_said(rules_run: Path, given: Given) -> None:
    last = weights(rules_run)
    assert equal(last, weights(rules_run, "models/iteration_03"))
    assert not equal(last, weights(rules_run, "models/iteration_02"))
    best = best_of(rules_run)
    if best == 3:
        assert not (rules_run / "best_policy").exists()
    else:
        where = rules_run / "models" / f"iteration_{best:02d}" if best else given.policy / "model"
        assert equal(weights(rules_run, "best_policy"), load_file(where / "model.safetensors"))
    AutoModelForCausalLM.from_pretrained(rules_run / "model")
    AutoTokenizer.from_pretrained(rules_run / "model")
    assert read_manifest(rules_run)["output"] == {
        "kind": "policy", "task": "causal_lm", "path": "model", "format": "hf"
    }  # fmt: skip
    assert (rules_run / "plots" / "raft.png").stat().st_size > 10_000
    words = said(rules_run)
    assert "alarm length_drift: mean length went from" in words
    assert words.count("alarm length_drift") == 1
    assert any("alarm/length_drift" in line for line in lines(rules_run))
    tables = words.replace("\n", " ").split("evaluation after iteration")[1:4]  # one behind each, with the next samples
    for number, table in enumerate(tables, start=1):
        assert f"iteration {number}" in table
        assert re.search(r"│ (\d of 4|discarded) ", table), "a response has its rank beside it"
    checkpoints = sorted(path.name for path in (rules_run / "checkpoints").glob("step_*"))
    assert checkpoints == [f"step_{lines(rules_run)[i]['optimizer_steps']:08d}" for i in (1, 2)]


def test_an_alarm_stops_and_the_best_adapter_is_the_result(given: Given, run_on_ranks: Ranks, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    overrides = given.words(
        raft__num_iterations=6, raft__alarms__action="stop", raft__alarms__length_drift=1e-6, raft__alarms__window=1,
        raft__keep_models="true", raft__result="last", lora__enabled="true", lora__r=4, optim__lr=0.02,
    )  # fmt: skip
    (figures,) = run_on_ranks(1, RAFT, run_dir=str(run_dir), overrides=overrides)
    reached = len(lines(run_dir))
    assert reached < 6
    assert "alarm/length_drift" in lines(run_dir)[-1]
    assert f"ended by an alarm after iteration {reached}" in said(run_dir)
    best = best_of(run_dir, before=reached)  # what raised the alarm is not handed over, however high its reward
    assert figures["best_iteration"] == best
    assert read_manifest(run_dir)["output"] == {
        "kind": "adapter", "task": "causal_lm", "path": "model", "format": "peft"
    }  # fmt: skip
    assert equal(weights(run_dir, "last_policy"), weights(run_dir, f"models/iteration_{reached:02d}"))
    if best:
        assert equal(weights(run_dir), weights(run_dir, f"models/iteration_{best:02d}"))
    else:
        assert all((tensor == 0).all() for name, tensor in weights(run_dir).items() if "lora_B" in name)


def test_nothing_is_learnt_where_all_is_discarded(given: Given, run_on_ranks: Ranks, tmp_path: Path) -> None:
    rule = "[{name: short, min_tokens: 1000}]"
    run_dir, overrides = tmp_path / "run", given.words(reward__rules=rule, raft__num_iterations=2)
    (figures,) = run_on_ranks(1, RAFT, run_dir=str(run_dir), overrides=overrides)
    assert figures["optimizer_steps"] == 0
    assert equal(weights(run_dir), load_file(given.policy / "model" / "model.safetensors"))
    for number in (1, 2):
        assert f"iteration {number}: all responses are discarded, nothing is learnt; see reward.rules" in said(run_dir)
        assert {row["why_not"] for row in trail(run_dir, number)} == {"discarded: short"}
        assert trail(run_dir, number, "selected") == []
    for line in lines(run_dir):
        assert line["raft/discarded"] == 1.0
        assert line["raft/skipped_prompts"] == 4
        assert not {"raft/reward_selected", "raft/distinct_2_selected", "loss"} & line.keys()


def test_ranked_by_the_policy_itself_less_its_distance(given: Given, run_on_ranks: Ranks, tmp_path: Path) -> None:
    """No source, six prompts, all to learn from: iteration 2 against the models of iterations 0 and 1, one response
    after the other."""
    prompts = write_prompts(tmp_path / "prompts.jsonl", rows=6)
    more = {"raft__kl_coef": 0.1, "raft__keep_models": "true", "generation__temperature": 0.7, "optim__lr": 0.01,
            "data__validation_split_percentage": 0}  # fmt: skip
    overrides = [w for w in raft_words(given.policy, prompts, "", **more) if not w.startswith("eval.")]
    run_dir = tmp_path / "run"
    run_on_ranks(1, RAFT, run_dir=str(run_dir), overrides=overrides)
    assert "ranked by their mean token log-probability under the policy itself" in said(run_dir)
    rows = trail(run_dir, 2)
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "model")
    asked = [np.array(tokenizer(row["prompt"], add_special_tokens=False).input_ids) for row in rows]
    written = [np.array(row["token_ids"]) for row in rows]
    start = AutoModelForCausalLM.from_pretrained(given.policy / "model").float()
    policy = AutoModelForCausalLM.from_pretrained(run_dir / "models" / "iteration_01").float()
    own, cooler, reference = (
        naive_logprobs(model, asked, written, temperature).sum(1).numpy()
        for model, temperature in ((policy, 1.0), (policy, 0.7), (start, 0.7))
    )
    mean = own / [len(response) for response in written]
    assert [row["reward"] for row in rows] == pytest.approx(mean, abs=1e-5)
    assert [row["reward/mean_logprob"] for row in rows] == [row["reward"] for row in rows]
    assert [row["kl"] for row in rows] == pytest.approx(cooler - reference, abs=1e-4)
    assert np.abs(cooler - reference).max() > 0.1
    scores = [row["score"] for row in rows]
    assert scores == pytest.approx(mean - 0.1 * (cooler - reference), abs=1e-4)
    assert [row["kept"] for row in rows] == [scores[i] == max(scores[i // 4 * 4 :][:4]) for i in range(16)]
    # Four prompts an iteration: 12 of 6 are each of them twice, in an order of its own each time.
    order = prompt_order(6, 0)
    walked = [trail(run_dir, 1 + cursor // 4)[cursor % 4 * 4]["prompt"] for cursor in range(12)]
    assert sorted(walked[:6]) == sorted(walked[6:])
    assert len(set(walked[:6])) == 6
    assert walked[:6] != walked[6:]
    assert [walked[6:][[order(6 + i) for i in range(6)].index(order(i))] for i in range(6)] == walked[:6]
    assert lines(run_dir)[-1]["epoch"] == 2
    assert [line["step"] for line in read_metrics(run_dir)] == [1, 2, 3], "nothing to evaluate on"
    assert not (run_dir / "last_policy").exists()


@pytest.mark.parametrize("soft", [False, True])
def test_the_policy_learns_what_a_function_likes(given: Given, run_on_ranks: Ranks, tmp_path: Path, soft: bool) -> None:
    run_dir = tmp_path / "run"
    more = {"raft__soft_temperature": 0.02, "train__global_batch_size": 64} if soft else {"raft__epochs": 4}
    overrides = given.words(
        raft__num_iterations=6, raft__batch_size=16, optim__lr=0.01, generation__batch_size=64, eval__num_prompts=8,
        **({"train__global_batch_size": 8, "train__micro_batch_size": 8} | more),
    )  # fmt: skip
    (figures,) = run_on_ranks(1, RAFT, run_dir=str(run_dir), overrides=overrides)
    assert figures["eval_reward"] > figures["eval_reward_before"] + 0.1, "share of the letter e on held-out prompts"
    found = lines(run_dir)
    assert found[-1]["raft/reward_policy"] > found[0]["raft/reward_policy"] + 0.1
    for line in found:
        assert line["raft/reward_selected"] > line["raft/reward_policy"]
        assert line["raft/selected"] == 16 if not soft else line["raft/selected"] > 16
    assert torch.isfinite(torch.tensor([line["loss"] for line in found])).all()
