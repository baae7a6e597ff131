"""scripts/quickstart_table.py: its figures by hand, and the table of small runs against a slow reckoning."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_cli.models.save import save_model
from rlhf_cli.rundir import update_manifest
from tests.data_tokenizers import byte_bpe
from tests.reward_models import write_decoder, write_run
from tests.tiny_models import tiny_model

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
PROMPTS = ["a?", "What of it?", "the floor"]
# Counts letters, so that answers of random models differ.
WORLD = "def true_score(prompt, response):\n    return sum(c.isalpha() for c in response) / 100 + len(prompt)\n"


@pytest.fixture(scope="module")
def script() -> Iterator[Any]:
    sys.path.insert(0, str(SCRIPTS))
    try:
        import quickstart_table

        yield quickstart_table
    finally:
        sys.path.remove(str(SCRIPTS))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the quickstart leaves it, and in data/ a world with three held-out prompts."""
    place = tmp_path_factory.mktemp("quickstart")
    for seed, name in enumerate(("sft", "ppo", "raft")):
        model = tiny_model(seed=seed)
        model.resize_token_embeddings(len(byte_bpe()))
        save_model(model.config, dict(model.state_dict()), place / name / "model", byte_bpe())
        write_run(place / name, kind="policy", task="causal_lm", template="hh")
    write_decoder(place / "rm_merged" / "model")
    write_run(place / "rm_merged", template="hh")
    data = place / "data"
    data.mkdir()
    (data / "generate.py").write_text(WORLD)
    (data / "prompts_held_out.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS))
    return place


def test_means_and_agreement_by_hand(script: Any) -> None:
    # values 1, 2, 6: mean 3, variance (4 + 1 + 9) / 2 = 7, error √(7/3)
    assert script.mean(torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64)) == pytest.approx((3.0, (7 / 3) ** 0.5))
    true = torch.tensor([[0.0, 1.0, 0.5], [1.0, 1.0, 0.0]])
    rewards = torch.tensor([[-3.0, 4.0, 4.0], [-1.0, 2.0, 0.0]])
    # first prompt: 0 < 1 right, 0 < 0.5 right, 1 > 0.5 but equal rewards; second: one of two right, and a tie: 3 of 5
    assert script.agreement(rewards, true) == pytest.approx(3 / 5)
    assert math.isnan(script.agreement(rewards, torch.ones(2, 3))), "nothing to agree on"


def test_means_over_runs_by_hand(script: Any) -> None:
    def row(reward: float, true: float, agree: float) -> Any:
        wide = script.Mean(reward, 9.0), script.Mean(true, 9.0)
        return script.Row("ppo", *wide, agree=agree, kl=reward / 2, distinct_2=0.25, tokens=8.0, answers=[])

    (found,) = script.over_runs([[row(1.0, 0.5, 0.8)], [row(3.0, 0.7, 0.9)]])
    # rewards 1 and 3: mean 2, standard deviation √2, error 1; true 0.5 and 0.7: 0.6, 0.1. The runs' errors stay out.
    assert found.reward == pytest.approx((2.0, 1.0))
    assert found.true == pytest.approx((0.6, 0.1))
    assert (found.agree, found.kl, found.tokens) == pytest.approx((0.85, 1.0, 8.0))
    assert "| ppo | 2.00 ± 1.00 | 0.600 ± 0.100 | 0.85 | 1.00 | 0.25 | 8.0 |" in script.table([found])
    undecided = found._replace(agree=float("nan"))
    assert "| 0.600 ± 0.100 | - | 1.00 |" in script.table([undecided])


def test_figures_of_runs_are_those_of_one_answer_at_a_time(script: Any, runs: Path) -> None:
    rows, prompts = script.measure(runs, runs / "data", ("sft", "ppo"))
    assert [row.name for row in rows] == ["base", "sft", "ppo"]
    assert [prompt.text for prompt in prompts] == PROMPTS
    assert rows[1].kl == 0.0, "the same model"
    model, start = script.load(runs / "ppo" / "model"), script.load(runs / "sft" / "model")
    judges = script.Judges(byte_bpe(), start, script.open_reward(runs / "rm_merged"), None, prompts)
    requests = [script.Request(p.token_ids, i, 32) for i, p in enumerate(p for p in prompts for _ in range(4))]
    responses = script.generate(model, byte_bpe(), requests, script.SAMPLING, script.TEMPLATE.stop, 0)
    kl, true, rewards = [], [], []
    for number, response in enumerate(responses):
        prompt = prompts[number // 4]
        ids = torch.tensor([[*prompt.token_ids.tolist(), *response.token_ids.tolist()]])
        head = len(prompt.token_ids)
        per_model = []
        for reader in (model, start):
            with torch.no_grad():
                logits = reader(input_ids=ids).logits[0].double()
            per_model.append(sum(logits[t - 1].log_softmax(-1)[ids[0, t]].item() for t in range(head, ids.shape[1])))
        kl.append(per_model[0] - per_model[1])
        true.append(sum(c.isalpha() for c in response.text) / 100 + len(prompt.text))
        rewards += judges.reward.score([PROMPTS[number // 4]], [response.text])
    ppo = rows[2]
    assert ppo.kl == pytest.approx(sum(kl) / 12, rel=1e-4)
    assert ppo.true.value == pytest.approx(sum(true) / 12)
    assert ppo.reward.value == pytest.approx(sum(rewards) / 12, abs=1e-5)
    per_prompt = torch.tensor(true, dtype=torch.float64).view(3, 4).mean(1)
    assert ppo.true.error == pytest.approx((per_prompt.var() / 3).sqrt().item()), "prompts are the independent ones"
    assert ppo.tokens == sum(len(response.token_ids) for response in responses) / 12
    bigrams = [pair for r in responses[::4] for pair in pairwise(r.token_ids[: r.num_text_tokens].tolist())]
    assert ppo.distinct_2 == pytest.approx(len(set(bigrams)) / len(bigrams))
    assert ppo.answers == [(responses[i].text, pytest.approx(true[i])) for i in (0, 4, 8)]


def test_several_folders_end_with_their_means(script: Any, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(runs), str(runs), "--data", str(runs / "data"), "--policies", "sft"]
    assert script.main(words) == 0
    shown = capsys.readouterr().out
    tables = [line for line in shown.splitlines() if line.startswith("| sft |")]
    assert len(tables) == 3, shown
    assert "± 0.00 |" in tables[2], "the same run twice"
    assert f"{runs}: 3 held-out prompts, 4 answers to each" in shown
    assert shown.count("What of it?") == 2


def test_a_run_that_is_not_finished_is_named(script: Any, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    update_manifest(runs / "raft", status="interrupted")
    words = [str(runs), "--data", str(runs / "data")]
    try:
        assert script.main(words) == 2
    finally:
        update_manifest(runs / "raft", status="complete")
    said = capsys.readouterr().err
    assert str(runs / "raft") in said
    assert "interrupted" in said
    assert "scripts/quickstart.sh" in said


def test_evaluations_of_a_run_by_hand(
    script: Any, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = tmp_path / "ppo" / "samples"
    samples.mkdir(parents=True)
    for iteration, response, score in ((0, "no", -1.0), (10, "yes yes", 2.0)):
        rows = [
            {"prompt": "a?", "response": response, "score": score},
            {"prompt": "b?", "response": "", "score": score - 1},
        ]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (samples / f"eval_{iteration:08d}.jsonl").write_text(lines)
    (tmp_path / "ppo" / "metrics.jsonl").write_text(json.dumps({"step": 10, "objective/kl": 0.75}) + "\n")
    assert script.main([str(tmp_path), "--data", str(runs / "data"), "--iterations"]) == 0
    shown = capsys.readouterr().out
    # true_score: letters / 100 + length of the prompt: 2.02 and 2.00, 2.06 and 2.00; errors half of the differences
    assert "| ppo | 0 | -1.50 | 2.010 ± 0.010 | - |" in shown
    assert "| ppo | 10 | 1.50 | 2.030 ± 0.030 | 0.75 |" in shown
    assert script.main([str(tmp_path), "--data", str(runs / "data"), "--iterations", "--policies", "raft"]) == 2
    assert "no samples/eval_*.jsonl in raft" in capsys.readouterr().err
