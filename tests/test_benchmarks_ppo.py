"""The prompts and the policy of the ppo benchmark, its command and its table; one test runs our side of it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "scripts" / "benchmarks"


@pytest.fixture
def scripts() -> Iterator[Any]:
    """The scripts as modules; they find each other the way they do when they are started."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import _ppo_material
        import _ppo_table
        import _probe
        import ppo

        yield SimpleNamespace(material=_ppo_material, table=_ppo_table, probe=_probe, ppo=ppo)
    finally:
        sys.path.remove(str(BENCHMARKS))
        sys.modules.pop("ppo", None)


def material_job(out: Path, **changes: Any) -> dict[str, Any]:
    return {"out": str(out), "seed": 3, "vocab": 600, "hidden": 64, "layers": 2, "heads": 2, "prompt": 24,
            "response": 30, "prompts": 40, "mean_share": None} | changes  # fmt: skip


def prompt_lengths(directory: Path) -> list[int]:
    from rlhf_cli.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(directory / "model")
    rows = [json.loads(line)["text"] for line in (directory / "prompts.jsonl").read_text().splitlines()]
    return [len(ids) for ids in tokenizer(rows).input_ids]


def test_prompts_have_full_length_and_are_in_the_order_of_our_run(scripts: Any, tmp_path: Path) -> None:
    from rlhf_cli.data.prompts import prompt_order

    scripts.material.main(material_job(tmp_path))
    written, in_order = (
        [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        for name in ("prompts.jsonl", "in_order.jsonl")
    )
    order = prompt_order(40, seed=3)
    assert in_order == [written[order(cursor)] for cursor in range(40)]
    assert prompt_lengths(tmp_path) == [24] * 40


def test_ragged_prompts_and_an_end_as_likely_as_asked(scripts: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    scripts.material.main(material_job(tmp_path, mean_share=1 / 3, prompts=400))
    lengths = torch.tensor(prompt_lengths(tmp_path), dtype=torch.float)
    assert lengths.max() <= 24
    # The mean of a log-normal law, 24 / 3, less what is cut off.
    assert 6 < lengths.mean() < 8.5
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ids = torch.randint(2, 600, (64, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        end = model(ids).logits.softmax(-1)[..., model.config.eos_token_id]
    # A third of 30 tokens: one end in ten, measured on other tokens than those that it was set with.
    assert end.mean() == pytest.approx(0.1, rel=0.2)
    assert end.std() < 0.05  # and nearly as likely everywhere, so that lengths are geometric


def figures(**changes: float) -> dict[str, float]:
    return {"scores": 0.5, "scores_std": 0.8, "kl": 0.0, "nats_per_token": 8.25, "length": 60.0, "optimizer_steps": 4.0,
            "generate_s": 1.0, "score_s": 2.0, "train_s": 5.0} | changes  # fmt: skip


def row(scripts: Any, name: str, times: list[float], peak: float, **changes: float) -> Any:
    probe = scripts.probe.Probe(
        100.0, peak, times=times, samples=[64] * len(times), figures=[figures(**changes)] * len(times)
    )
    return scripts.table.summarise(name, [probe], 1)


def test_table_shows_ratios_to_trl(scripts: Any) -> None:
    # 128 responses in 8 s and in 32 s after the first iteration; 250 and 500 MiB above imports.
    rows = [row(scripts, "ours", [9.0, 13.0, 17.0], 350.0), row(scripts, "trl", [20.0, 36.0, 52.0], 600.0, kl=-4e-7)]
    lines = scripts.table.table(rows, "trl").splitlines()
    assert (
        lines[2]
        == "| ours | 16.00 | 4.00 | 0% | 1.00 | 2.00 | 5.00 | 4 | 250 | 0.50 | 0.500 | 0.00000 | 8.250 | 60.0 |"
    )
    assert lines[3].startswith("| trl | 4.00 | 1.00 | 0% |")
    assert len({line.count("|") for line in lines}) == 1
    assert scripts.table.disagreements(rows, 64) == []


def test_programs_that_differ_make_the_comparison_void(scripts: Any) -> None:
    # The standard error of a difference of two means of 64 scores with std 0.8 is 0.8 · √2 / 8 = 0.1414; four of them
    # are 0.566.
    rows = [row(scripts, "ours", [1.0, 2.0], 200.0, scores=1.06), row(scripts, "trl", [1.0, 2.0], 200.0)]
    assert scripts.table.disagreements(rows, 64) == []
    rows[0].first["scores"] = 1.07
    (doubt,) = scripts.table.disagreements(rows, 64)
    assert "standard errors of 0.1414" in doubt
    rows[0].first.update(scores=0.5, kl=0.01)
    assert scripts.table.disagreements(rows, 64) == ["ours starts with KL 0.01000, not 0"]


def test_command_is_accepted_by_the_program(scripts: Any, tmp_path: Path) -> None:
    """Each variant of ours composes and converts, with the batches of TRL's."""
    from rlhf_cli.api import compose

    options = SimpleNamespace(seed=0, response=12, batch=16, micro_batch=4, epochs=2, mini_batches=2, steps=3, lr=1e-5)
    for name, variant in scripts.ppo.VARIANTS.items():
        if variant.program != "ours":
            continue
        words = scripts.ppo.command(scripts.ppo.job_of(options, name, tmp_path), tmp_path / "run", tmp_path)
        assert words[1:4] == ["-m", "rlhf_cli", "ppo"]
        config = compose("ppo", words[4:])
        assert config.ppo.rollout_batch_size / config.ppo.num_mini_batches == 8
        assert (config.ppo.sharing == "hydra", config.lora.enabled) == (name == "ours-hydra", name != "ours")


@pytest.mark.slow
def test_our_side_runs(tmp_path: Path) -> None:
    """Material, reward model, merge and a run of each way of sharing, by the script itself."""
    command = [sys.executable, BENCHMARKS / "ppo.py", "--quick", "--threads", "1", "--work", tmp_path]
    command += ["--json", tmp_path / "figures.json"]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| ours-hydra |" in done.stdout
    found = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))["comparison"]
    ours, hydra = (found[name][0]["figures"] for name in ("ours", "ours-hydra"))
    assert [line["optimizer_steps"] for line in ours] == [2, 4]  # 2 epochs of 1 mini-batch
    # Both start from the same policy and draw with the same noise: merged or not, the rewards are the same.
    assert ours[0]["kl"] == hydra[0]["kl"] == 0
    assert ours[0]["scores"] == pytest.approx(hydra[0]["scores"], abs=1e-4)
