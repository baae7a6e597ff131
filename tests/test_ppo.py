"""`rlhf ppo` from its config to its run directory, in the ranks of a test pool."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf_cli.rundir import read_manifest
from rlhf_cli.runtime.metrics import read_metrics
from tests.stage_cases import (
    ppo_words,
    rm_words,
    words,
    write_dialogues,
    write_letter_reward,
    write_pairs,
    write_prompts,
)

SFT, RM, PPO = (f"tests.stage_cases:run_{stage}" for stage in ("sft", "rm", "ppo"))
STOPPING, KILLED = "tests.ppo_stop_cases:run_ppo_stopping", "tests.ppo_stop_cases:run_ppo_killed"
Ranks = Callable[..., list[Any]]


class Chain:
    """A tiny policy, a reward model of it, and prompts."""

    def __init__(self, root: Path, run_on_ranks: Ranks):
        self.policy, self.reward, self.adapter = root / "policy", root / "reward", root / "adapter"
        self.prompts = write_prompts(root / "prompts.jsonl")
        self.letters = write_letter_reward(root)
        data = write_dialogues(root / "sft.jsonl")
        run_on_ranks(1, SFT, run_dir=str(self.policy), overrides=words(data, train__max_steps=30))
        pairs = write_pairs(root / "pairs.jsonl", rows=40)
        start = {"model__init": "pretrained", "model__path": self.policy, "model__tokenizer__train": "none"}
        settings = start | {"train__max_steps": 4, "data__template": "auto"}
        trained = [w for w in rm_words(pairs, **settings) if not w.startswith("model.arch")]
        run_on_ranks(1, RM, run_dir=str(self.reward), overrides=trained)
        adapter = [*trained, "lora.enabled=true", "lora.r=4"]
        run_on_ranks(1, RM, run_dir=str(self.adapter), overrides=adapter)

    def words(self, sources: str | None = None, **more: Any) -> list[str]:
        return ppo_words(self.policy, self.prompts, sources or self.letters, **more)


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory, run_on_ranks: Ranks) -> Chain:
    return Chain(tmp_path_factory.mktemp("chain"), run_on_ranks)


def samples(run_dir: Path, iteration: int = 0) -> list[dict[str, Any]]:
    path = run_dir / "samples" / f"iteration_{iteration:08d}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def policy_weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "model" / "model.safetensors")


def test_the_policy_learns_what_a_function_likes(chain: Chain, run_on_ranks: Ranks, tmp_path: Path) -> None:
    overrides = chain.words(
        ppo__num_iterations=30, ppo__rollout_batch_size=32, ppo__kl_coef=0.01, optim__lr=0.01,
        train__micro_batch_size=16,
    )  # fmt: skip
    (figures,) = run_on_ranks(1, PPO, run_dir=str(tmp_path), overrides=overrides)
    assert figures["eval_reward"] > figures["eval_reward_before"] + 0.1, "share of the letter e on held-out prompts"
    lines = [line for line in read_metrics(tmp_path) if "objective/kl" in line]
    assert lines[0]["objective/kl"] == 0.0, "the policy is the reference before the first step, bit for bit"
    assert lines[-1]["objective/kl"] > 0.1
    assert [line["step"] for line in lines] == list(range(1, 31))
    assert lines[-1]["optimizer_steps"] == 30 * 2 * 2
    manifest = read_manifest(tmp_path)
    assert manifest["output"] == {"kind": "policy", "task": "causal_lm", "path": "model", "format": "hf"}
    assert manifest["template"] == "hh"
    assert [parent["role"] for parent in manifest["parents"]] == ["policy"]


def test_what_stands_in_the_run_directory(chain: Chain, run_on_ranks: Ranks, tmp_path: Path) -> None:
    """A reward model and a function together; transformers loads what came out."""
    model = f"{{type: model, path: {chain.reward}, name: liked}}"
    overrides = chain.words(f"{model}, {chain.letters}", logging__log_samples_every=2, train__save_every=2)
    (figures,) = run_on_ranks(1, PPO, run_dir=str(tmp_path), overrides=overrides)
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tmp_path / "model")
    critic = AutoModelForSequenceClassification.from_pretrained(tmp_path / "critic")
    assert policy.config.vocab_size == critic.config.vocab_size
    assert critic.num_labels == 1
    assert (tmp_path / "plots" / "policy.png").stat().st_size > 10_000
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step_00000002", "step_00000004"]
    for iteration in (0, 2):
        rows = samples(tmp_path, iteration)
        assert len(rows) == 16
        for row in rows:
            assert row["score"] == pytest.approx(row["reward/liked"] + row["reward/function"], abs=1e-5)
            reply = row["response"].removeprefix(" ")  # the template's own
            assert row["reward/function"] == reply.count("e") / max(1, len(reply))
            assert row["ending"] in ("eos", "stop", "length")
    assert all(row["kl"] == 0.0 for row in samples(tmp_path))
    lines = list(read_metrics(tmp_path))
    counters = {"step", "episode", "epoch", "tokens", "num_tokens", "samples", "seconds"}
    assert all(counters <= line.keys() for line in lines), "that of the evaluation before the first iteration, too"
    assert (lines[0]["samples"], lines[0]["tokens"]) == (0, 0)
    seconds = [0.0, *(line["seconds"] for line in lines)]
    assert all(earlier < later for earlier, later in pairwise(seconds)), "evaluations take time as well"
    line = lines[-1]
    for name in (
        "objective/kl", "objective/entropy", "objective/non_score_reward", "objective/rlhf_reward", "objective/scores",
        "policy/approxkl_avg", "policy/clipfrac_avg", "policy/entropy_avg", "loss/policy_avg", "loss/value_avg",
        "val/clipfrac_avg", "val/ratio", "val/ratio_var", "val/num_eos_tokens", "lr", "episode", "eval_reward/liked",
        "perf/samples_per_s", "perf/tokens_per_s", "perf/peak_memory_gb", "perf/generate_s", "perf/score_s",
        "perf/train_s", "perf/mfu",
    ):  # fmt: skip
        assert name in line, name
    assert figures["optimizer_steps"] == 16


@pytest.mark.distributed
def test_two_ranks_and_zero3_do_what_one_rank_does(chain: Chain, run_on_ranks: Ranks, tmp_path: Path) -> None:
    model = f"{{type: model, path: {chain.reward}}}"
    overrides = chain.words(model, ppo__num_iterations=2, optim__lr=0.0003)
    run_on_ranks(1, PPO, run_dir=str(tmp_path / "one"), overrides=overrides)
    sharded = [*overrides, "deepspeed=zero3", "train.micro_batch_size=2"]
    run_on_ranks(2, PPO, run_dir=str(tmp_path / "two"), overrides=sharded)
    one, two = samples(tmp_path / "one"), samples(tmp_path / "two")
    assert [row["response"] for row in one] == [row["response"] for row in two], "the same noise on any number of ranks"
    for a, b in zip(read_metrics(tmp_path / "one"), read_metrics(tmp_path / "two"), strict=True):
        for name in ("objective/scores", "loss/value_avg", "policy/entropy_avg", "val/ratio"):
            if name in a:
                assert a[name] == pytest.approx(b[name], abs=1e-4), (a["step"], name)
    before = load_file(chain.policy / "model" / "model.safetensors")
    ours, theirs = policy_weights(tmp_path / "one"), policy_weights(tmp_path / "two")
    moved = max((ours[name] - before[name]).abs().max().item() for name in ours)
    apart = max((ours[name] - theirs[name]).abs().max().item() for name in ours)
    assert apart < 0.05 * moved, (apart, moved)


RESUMED = {
    "train__eval_every": 2, "train__save_every": 2, "ppo__ema": 0.9, "ppo__kl_controller": "adaptive",
    "ppo__kl_target": 0.5, "reward__normalize": "true", "reward__moments": "running",
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(chain: Chain, run_on_ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupts."""
    run_dir = tmp_path_factory.mktemp("whole")
    run_on_ranks(1, PPO, run_dir=str(run_dir), overrides=chain.words(**RESUMED))
    return run_dir


def assert_same_run(whole: Path, cut: Path, models: tuple[str, ...] = ("model", "last_policy", "critic")) -> None:
    for model in models:
        one, two = (load_file(run / model / "model.safetensors") for run in (whole, cut))
        assert all(torch.equal(one[name], two[name]) for name in one), f"{model}: bitwise"
    timeless = lambda line: {k: v for k, v in line.items() if not k.startswith("perf/") and k != "seconds"}
    lines = [[timeless(line) for line in read_metrics(run)] for run in (whole, cut)]
    assert lines[0] == lines[1]
    figures = [timeless(read_manifest(run)["metrics"]) for run in (whole, cut)]
    assert figures[0] == figures[1]


@pytest.mark.parametrize("phase", ["generate", "judge", "measure", "update", "evaluate"])
def test_stopped_in_any_phase_it_ends_with_the_same_weights(
    chain: Chain, run_on_ranks: Ranks, whole: Path, tmp_path: Path, phase: str
) -> None:
    overrides = chain.words(**RESUMED)
    (nothing,) = run_on_ranks(1, STOPPING, run_dir=str(tmp_path), overrides=overrides, phase=phase, iteration=2)
    assert nothing == {}
    assert read_manifest(tmp_path)["status"] == "interrupted"
    run_on_ranks(1, PPO, run_dir=str(tmp_path), overrides=overrides)
    assert_same_run(whole, tmp_path)


@pytest.mark.parametrize("phase", ["generate", "judge", "update", "evaluate", "saving", "ending"])
def test_killed_in_any_phase_it_ends_with_the_same_weights(
    chain: Chain, run_on_ranks: Ranks, whole: Path, tmp_path: Path, phase: str
) -> None:
    overrides = chain.words(**RESUMED)
    run_on_ranks(1, KILLED, run_dir=str(tmp_path), overrides=overrides, phase=phase, iteration=3)
    assert read_manifest(tmp_path)["status"] == "running"
    run_on_ranks(1, PPO, run_dir=str(tmp_path), overrides=overrides)
    assert_same_run(whole, tmp_path)


@pytest.mark.distributed
def test_a_model_that_cannot_be_written_costs_no_training(chain: Chain, run_on_ranks: Ranks, tmp_path: Path) -> None:
    overrides = chain.words(ppo__num_iterations=2)
    full = "tests.ppo_stop_cases:run_ppo_without_room"
    with pytest.raises(AssertionError, match=r"model could not be written: File too large\. A checkpoint"):
        run_on_ranks(2, full, run_dir=str(tmp_path / "cut"), overrides=overrides)
    assert [p.name for p in (tmp_path / "cut" / "checkpoints").iterdir()] == ["step_00000002"]
    run_on_ranks(2, PPO, run_dir=str(tmp_path / "cut"), overrides=overrides)
    run_on_ranks(2, PPO, run_dir=str(tmp_path / "whole"), overrides=overrides)
    assert_same_run(tmp_path / "whole", tmp_path / "cut", ("model", "critic"))


def test_a_source_that_fails_costs_nothing_but_its_iteration(chain: Chain, run_on_ranks: Ranks, tmp_path: Path) -> None:
    (tmp_path / "moody.py").write_text(
        "from pathlib import Path\n"
        "calls = Path(__file__).with_name('calls')\n"
        "def moody(prompts, responses, **_):\n"
        "    calls.write_text(calls.read_text() + '.' if calls.exists() else '.')\n"
        "    if len(calls.read_text()) == 4:\n"  # an evaluation and two iterations are behind
        "        raise OSError('the weather is bad')\n"
        "    return [float(len(r)) for r in responses]\n"
    )
    source = f"{{type: function, path: {tmp_path / 'moody.py'}, function: moody}}"
    overrides = chain.words(source, ppo__num_iterations=3)
    with pytest.raises(AssertionError, match="the weather is bad"):
        run_on_ranks(1, PPO, run_dir=str(tmp_path / "cut"), overrides=overrides)
    assert [p.name for p in (tmp_path / "cut" / "checkpoints").iterdir()] == ["step_00000002"]
    run_on_ranks(1, PPO, run_dir=str(tmp_path / "cut"), overrides=overrides)
    run_on_ranks(1, PPO, run_dir=str(tmp_path / "whole"), overrides=overrides)
    assert_same_run(tmp_path / "whole", tmp_path / "cut", ("model", "critic"))


@pytest.mark.parametrize("advantage", ["rloo", "grpo", "reinforce++"])
def test_without_a_critic(chain: Chain, run_on_ranks: Ranks, tmp_path: Path, advantage: str) -> None:
    run_on_ranks(1, PPO, run_dir=str(tmp_path), overrides=chain.words(ppo__advantage=advantage, ppo__num_iterations=2))
    assert not (tmp_path / "critic").exists()
    line = list(read_metrics(tmp_path))[-1]
    assert "loss/value_avg" not in line
    assert line["policy/entropy_avg"] > 0
    prompts = [row["prompt"] for row in samples(tmp_path)]
    groups = 1 if advantage == "reinforce++" else 4
    assert all(len(set(prompts[i : i + groups])) == 1 for i in range(0, 16, groups)), "stand together"
    assert len({row["response"] for row in samples(tmp_path)}) > 8, "each has noise of its own"


@pytest.mark.distributed
def test_hydra_on_two_ranks(chain: Chain, run_on_ranks: Ranks, tmp_path: Path) -> None:
    source = f"{{type: model, path: {chain.adapter}}}"
    overrides = chain.words(
        source, lora__enabled="true", lora__r=4, ppo__sharing="hydra", ppo__critic="reward", ppo__num_iterations=3,
        optim__lr=0.01,
    )  # fmt: skip
    run_on_ranks(1, PPO, run_dir=str(tmp_path / "one"), overrides=overrides)
    run_on_ranks(2, PPO, run_dir=str(tmp_path / "two"), overrides=[*overrides, "deepspeed=zero3"])
    for name in ("one", "two"):
        assert read_manifest(tmp_path / name)["output"]["kind"] == "adapter"
        assert (tmp_path / name / "critic" / "adapter_model.safetensors").is_file()
        lines = [line for line in read_metrics(tmp_path / name) if "objective/kl" in line]
        assert lines[0]["objective/kl"] == 0.0
        assert lines[-1]["objective/kl"] != 0.0, "the policy's adapter moves"
    written = [[row["response"] for row in samples(tmp_path / name)] for name in ("one", "two")]
    assert written[0] == written[1]


def test_text_ends_before_the_stop_string(chain: Chain, run_on_ranks: Ranks, tmp_path: Path) -> None:
    """The HH layout scaled down: a length sampler, a stop string, a rule for stray hashes, a small KL coefficient."""
    overrides = chain.words(
        generation__stop="[' the']", generation__length_sampler="[6,12]", ppo__kl_coef=0.001, ppo__missing_eos="set:-2",
        reward__rules="[{name: hash, pattern: '#', score: -1}]", ppo__num_iterations=2,
    )  # fmt: skip
    run_on_ranks(1, PPO, run_dir=str(tmp_path), overrides=overrides)
    rows = samples(tmp_path)
    assert {"stop", "length"} <= {row["ending"] for row in rows}, "this test is about both"
    for row in rows:
        assert " the" not in row["response"]
        assert row["tokens"] <= 12
        if row["ending"] == "length":
            assert row["tokens"] >= 6
            assert row["score"] == (-1 if row["rules"] else -2)
        else:
            assert row["tokens"] == len(row["response"]) + (4 if row["ending"] == "stop" else 1)  # tokens are letters


def test_discarded_responses_are_drawn_again(chain: Chain, run_on_ranks: Ranks, tmp_path: Path) -> None:
    rule = "[{name: no_king, pattern: 'k', action: discard}]"
    run_on_ranks(1, PPO, run_dir=str(tmp_path), overrides=chain.words(reward__rules=rule, ppo__num_iterations=2))
    assert len(samples(tmp_path)) == 16
    assert not any("k" in row["response"] for row in samples(tmp_path))
    line = next(line for line in read_metrics(tmp_path) if "rules/no_king_redrawn" in line)
    assert line["rules/no_king_redrawn"] > 0
    assert line["rules/no_king"] == 0


def test_the_score_of_a_rule_is_final(chain: Chain, run_on_ranks: Ranks, tmp_path: Path) -> None:
    """Also where it equals what the sources say, and where the response has no end."""
    (tmp_path / "minus.py").write_text("def minus(prompts, responses, **_):\n    return [-1.0] * len(responses)\n")
    source = f"{{type: function, path: {tmp_path / 'minus.py'}, function: minus}}"
    overrides = chain.words(
        source, reward__rules="[{name: river, pattern: 'r', score: -1}]", ppo__missing_eos="subtract:5",
        ppo__num_iterations=1,
    )  # fmt: skip
    run_on_ranks(1, PPO, run_dir=str(tmp_path / "run"), overrides=overrides)
    rows = [row for row in samples(tmp_path / "run") if row["ending"] == "length"]
    assert {bool(row["rules"]) for row in rows} == {True, False}
    assert all(row["score"] == (-1.0 if row["rules"] else -6.0) for row in rows)


def test_what_can_never_be_kept_is_one_message(chain: Chain, run_on_ranks: Ranks, tmp_path: Path) -> None:
    rule = "[{name: too_short, min_tokens: 1000, action: discard}]"
    with pytest.raises(AssertionError, match=r"after 8 draws 16 of 16 responses still hit .* \(too_short 128 times\)"):
        run_on_ranks(1, PPO, run_dir=str(tmp_path), overrides=chain.words(reward__rules=rule))


def test_a_forbidden_end_trips_the_negative_kl_alarm(chain: Chain, run_on_ranks: Ranks, tmp_path: Path) -> None:
    """A policy that has learnt to end early, sampled with min_new_tokens: the texts are not its own, and
    E[log π/π_ref] = KL(q‖π_ref) − KL(q‖π) is negative, which no KL is. Without it the same policy is fine."""
    (tmp_path / "short.py").write_text("def short(prompts, responses, **_):\n    return [-len(r) for r in responses]\n")
    short = f"{{type: function, path: {tmp_path / 'short.py'}, function: short}}"
    settings = {"ppo__rollout_batch_size": 32, "train__micro_batch_size": 16, "optim__lr": 0.01, "ppo__kl_coef": 0.0}
    run_on_ranks(
        1, PPO, run_dir=str(tmp_path / "ends"), overrides=chain.words(short, ppo__num_iterations=15, **settings)
    )
    for minimum in (12, 0):
        run_dir = tmp_path / str(minimum)
        overrides = chain.words(
            short, model__path=tmp_path / "ends", ppo__ref=chain.policy, generation__min_new_tokens=minimum,
            ppo__num_iterations=1, **settings,
        )  # fmt: skip
        run_on_ranks(1, PPO, run_dir=str(run_dir), overrides=overrides)
        line = list(read_metrics(run_dir))[-1]
        assert ("alarm/negative_kl" in line) == (minimum > 0)
        assert (line["objective/kl"] < 0) == (minimum > 0)


def test_an_alarm_stops_and_hands_over_the_best_policy(chain: Chain, run_on_ranks: Ranks, tmp_path: Path) -> None:
    overrides = chain.words(
        ppo__num_iterations=40, ppo__kl_coef=0.0, optim__lr=0.01, train__eval_every=1, ppo__alarms__action="stop",
        ppo__alarms__kl_budget=1.0, ppo__alarms__window=1, ppo__alarms__distinct_2_drop=0,
        ppo__alarms__separator_drop=0,
    )  # fmt: skip
    (figures,) = run_on_ranks(1, PPO, run_dir=str(tmp_path), overrides=overrides)
    lines = [line for line in read_metrics(tmp_path) if "objective/kl" in line]
    assert len(lines) < 40
    assert lines[-1]["objective/kl"] > 1.0
    assert "alarm/kl_budget" in lines[-1]
    evaluations = {line["step"]: line["eval_reward"] for line in list(read_metrics(tmp_path))[:-1]}
    best = max(evaluations, key=lambda step: (evaluations[step], -step))
    assert figures["best_iteration"] == best
    assert figures["eval_reward"] == evaluations[best]
    assert not list((tmp_path / "checkpoints").glob("best_*"))


@pytest.mark.distributed
def test_an_alarm_ends_two_ranks_that_average(chain: Chain, run_on_ranks: Ranks, tmp_path: Path) -> None:
    overrides = chain.words(
        ppo__num_iterations=9, train__eval_every=1, ppo__alarms__action="stop", ppo__alarms__kl_budget=1e-9,
        ppo__alarms__window=1, ppo__ema=0.9, optim__lr=0.01,
    )  # fmt: skip
    figures = run_on_ranks(2, PPO, run_dir=str(tmp_path), overrides=overrides)
    assert figures[0]["iterations"] < 9
    assert "best_iteration" in figures[0]
    assert (tmp_path / "last_policy" / "model.safetensors").is_file()


def test_ptx_and_the_average(chain: Chain, run_on_ranks: Ranks, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"the king sees the rose {i}"}) + "\n" for i in range(20)))
    overrides = chain.words(
        ppo__ptx__coef=1.0, ppo__ptx__batch_size=8, ppo__ptx__data__path=text, ppo__ema=0.9, eval__tax_path=text,
        ppo__ptx__data__cache_dir=tmp_path / "cache", ppo__num_iterations=6, optim__lr=0.003,
    )  # fmt: skip
    (figures,) = run_on_ranks(1, PPO, run_dir=str(tmp_path / "run"), overrides=overrides)
    lines = [line for line in read_metrics(tmp_path / "run") if "loss/ptx" in line]
    assert lines[-1]["loss/ptx"] < lines[0]["loss/ptx"]
    assert figures["alignment_tax"] < 0, "the text it trains on beside gets likelier"
    average, last = policy_weights(tmp_path / "run"), load_file(tmp_path / "run" / "last_policy" / "model.safetensors")
    assert any(not torch.equal(average[name], last[name]) for name in average)
