"""The pairs of the rm benchmark, its loss and its table. The programs themselves are not run here."""

from __future__ import annotations

import json
import math
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "scripts" / "benchmarks"


@pytest.fixture
def scripts() -> Iterator[Any]:
    """The scripts as modules; they find each other the way they do when they are started."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import _material
        import _mfu
        import _ours
        import _plain
        import _probe
        import _table

        yield SimpleNamespace(
            material=_material, mfu=_mfu, ours=_ours, plain=_plain, probe=_probe, table=_table
        )  # fmt: skip
    finally:
        sys.path.remove(str(BENCHMARKS))


def material_job(out: Path, **changes: Any) -> dict[str, Any]:
    return {"out": str(out), "seed": 3, "vocab": 600, "hidden": 32, "layers": 2, "heads": 2, "mean_prompt": 30,
            "mean_answer": 12, "min_length": 1, "max_length": 64, "pairs": 60, "weights": False} | changes  # fmt: skip


def lengths_of(directory: Path) -> np.ndarray:
    """(pairs, 2) tokens with EOS of the pairs in file order, each text taken as a whole."""
    from rlhf_cli.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(directory / "model")
    rows = [json.loads(line) for line in (directory / "pairs.jsonl").read_text().splitlines()]
    count = lambda text: len(tokenizer(text).input_ids) + 1
    return np.array([[count(row["prompt"] + row[side]) for side in ("chosen", "rejected")] for row in rows])


def test_pairs_are_ragged_and_in_the_order_of_our_run(scripts: Any, tmp_path: Path) -> None:
    from rlhf_cli.data import plan

    scripts.material.main(material_job(tmp_path))
    written, in_order = (
        [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        for name in ("pairs.jsonl", "in_order.jsonl")
    )
    course = plan.Course(60, np.ones(60, np.int64), 12, seed=3)
    assert in_order == [written[row] for step in range(5) for row in course.rows(step)]
    lengths = lengths_of(tmp_path)
    assert json.loads((tmp_path / "tokens.json").read_text()) == lengths.sum()
    assert lengths.max() <= 64
    assert len(set(lengths.flatten().tolist())) > 20
    assert (lengths[:, 0] != lengths[:, 1]).mean() > 0.8
    # The mean of a log-normal law, a little less for what is cut off and for words that do not fit: 30 + 12.
    assert 32 < lengths.mean() < 43


def test_full_pairs_for_mfu(scripts: Any, tmp_path: Path) -> None:
    scripts.material.main(material_job(tmp_path, min_length=64, mean_prompt=32, mean_answer=32, pairs=12))
    lengths = lengths_of(tmp_path)
    # A text is cut at a word, and a word of this vocabulary takes a few tokens; prompt and answer are cut.
    assert lengths.min() > 64 - 2 * 8
    assert lengths.max() <= 64


def test_log_normal_has_the_asked_mean(scripts: Any) -> None:
    # The mean of 100,000 draws strays by σ = 0.95 mean / sqrt(100,000), 0.3 %.
    draws = scripts.material.log_normal(np.random.default_rng(0), 120.0, 100_000)
    assert draws.mean() == pytest.approx(120, rel=0.015)
    assert np.median(draws) == pytest.approx(120 * math.exp(-(0.8**2) / 2), rel=0.015)


def test_our_rm_and_the_plain_loop_read_the_same_tokens(scripts: Any, tmp_path: Path) -> None:
    """One program joins the tokens of prompt and answer, the other ones take the tokens of both texts joined."""
    from rlhf_cli.data.comparisons import prepare_comparisons
    from rlhf_cli.data.templates import TEMPLATES
    from rlhf_cli.models.tokenizer import load_tokenizer, tokenizer_digest
    from rlhf_cli.schema import ComparisonDataConfig

    scripts.material.main(material_job(tmp_path))
    tokenizer = load_tokenizer(tmp_path / "model")
    config = ComparisonDataConfig(path=str(tmp_path / "pairs.jsonl"), format="paired", max_length=64)
    prepared = prepare_comparisons(config, tokenizer, tokenizer_digest(tokenizer), TEMPLATES["none"], print)
    stage = scripts.plain.STAGES["rm"]
    for number, line in enumerate((tmp_path / "pairs.jsonl").read_text().splitlines()):
        texts = stage.texts(json.loads(line))
        ours = [prepared.train.ids(sequence).tolist() for sequence in prepared.train.sequences(number)]
        assert ours == [[*tokenizer(text).input_ids, tokenizer.eos_token_id] for text in texts]


def test_loss_of_the_plain_loop(scripts: Any) -> None:
    # Scores are what a fake model says: the sum of a sequence's tokens that are no padding.
    def model(input_ids: torch.Tensor, attention_mask: torch.Tensor, use_cache: bool) -> Any:
        return SimpleNamespace(logits=(input_ids * attention_mask).sum(1, keepdim=True).float())

    rows = [[[1, 1, 1], [2]], [[1], [3]]]
    # chosen − rejected: 3 − 2 = 1 and 1 − 3 = −2; −log σ(1) − log σ(−2) = log(1 + e⁻¹) + log(1 + e²)
    loss = scripts.plain.pair_losses(model, rows, pad=9)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-1)) + math.log(1 + math.exp(2)), abs=1e-6)
    assert sum(map(scripts.plain.STAGES["rm"].terms, rows)) == 2


def test_model_has_one_score_that_every_program_can_load(scripts: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    scripts.material.main(material_job(tmp_path, pairs=4, weights=True))
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    assert model.score.weight.shape == (1, 32)
    assert model.config.pad_token_id is not None
    # N(0, 1/√(H+1)): a head of the program's own would start with the spread of transformers, 0.02.
    assert model.score.weight.std().item() == pytest.approx(1 / math.sqrt(33), rel=0.5)


def test_table_shows_pairs_per_second(scripts: Any) -> None:
    # After the first step, at 2 s, 60 pairs of 3000 tokens until 5 s.
    probe = scripts.probe.Probe(
        0.0, 50.0, times=[2.0, 3.0, 5.0], tokens=[9, 1000, 2000], samples=[30, 30, 30], losses=[0.7]
    )
    row = scripts.table.summarise("ours", [probe], 1)
    assert row.samples == 20
    table = scripts.table.comparison([row], "trl", 1_310_720, samples="pairs").splitlines()
    assert table[0].startswith("| program | pairs/s | tokens/s |")
    assert table[2].startswith("| ours | 20.00 | 1,000 | 0% | 1.00 | 50 |")
    assert len({line.count("|") for line in table}) == 1


def test_command_of_each_stage(scripts: Any, tmp_path: Path) -> None:
    job = {"rows": "pairs.jsonl", "max_length": 64, "lr": 1e-4, "steps": 2, "global_batch": 4, "micro_batch": 2,
           "seed": 0, "dtype": "fp32", "checkpointing": False, "packing": True, "model": "model"}  # fmt: skip
    rm = scripts.ours.command(job | {"stage": "rm"}, tmp_path, 1)
    sft = scripts.ours.command(job | {"stage": "sft"}, tmp_path, 1)
    assert "rm" in rm
    assert {"data.format=paired", "data.path=pairs.jsonl", "model.path=model"} <= set(rm)
    assert not any(word.startswith(("data.packing", "generation")) for word in rm)
    assert "sft" in sft
    assert {"data.format=text_only", "data.packing=true"} <= set(sft)


def test_work_of_a_reward_model(scripts: Any) -> None:
    shape = scripts.mfu.Shape(8, 2, 16, full_layers=4, vocab=100, length=10, micro_batch=4)
    scores = scripts.mfu.of_pairs(shape)
    assert scores.micro_batch == 2  # as many sequences
    # As for a language model, without the 6 · 100 · 8 of a logit for each word.
    assert scripts.mfu.flops_per_token(shape, 2) - scripts.mfu.flops_per_token(scores, 2) == 4800


def test_answers_differ_between_seeds(scripts: Any) -> None:
    language = scripts.material.make_language(random.Random(0), 600)
    texts = {scripts.material.text(random.Random(seed), language, 30) for seed in range(5)}
    assert len(texts) == 5
