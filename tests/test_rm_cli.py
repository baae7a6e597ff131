"""`rlhf rm` as a user types it: killed and started again, fed with rubbish, dry, swept."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlhf_cli.rundir import read_manifest
from rlhf_cli.runtime.metrics import read_metrics
from tests.command_line import finish, rlhf, start, wait_for_step
from tests.stage_cases import rm_words, write_pairs
from tests.tiny_models import tiny_tokenizer

RUN = "tests.stage_cases:run_rm"
STEPS = {
    "train__max_steps": 24,
    "train__save_every": 4,
    "train__eval_every": 6,
    "train__global_batch_size": 16,
    "train__early_stopping__patience": 9,
    "optim__lr": 0.0005,
}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", rows=120)


@pytest.mark.slow
@pytest.mark.distributed
def test_killed_at_random_moments_it_ends_with_the_same_weights(pairs: Path, tmp_path: Path) -> None:
    overrides = rm_words(pairs, **STEPS)
    finish("rm", tmp_path / "whole", overrides)
    for step in (7,):  # after a checkpoint and an evaluation; tests/test_cli.py has other moments
        front = start("rm", tmp_path / "killed", overrides)
        wait_for_step(tmp_path / "killed", step, front)
        front.send_signal(signal.SIGKILL)
        front.wait()
        assert read_manifest(tmp_path / "killed")["status"] == "running"
    finish("rm", tmp_path / "killed", overrides)
    whole, killed = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "killed"))
    assert whole.keys() == killed.keys()
    assert all(torch.equal(whole[name], killed[name]) for name in whole), "bitwise"
    lines = [
        [(x["step"], x["loss"], x.get("eval_loss")) for x in read_metrics(tmp_path / n)] for n in ("whole", "killed")
    ]
    assert lines[0] == lines[1]
    assert [step for step, *_ in lines[0]] == list(range(1, 25)), "every step once"
    assert read_manifest(tmp_path / "whole")["reward"] == read_manifest(tmp_path / "killed")["reward"]


GOOD = {"prompt": "a?", "chosen": "b", "rejected": "c"}


@pytest.mark.parametrize(
    ("rows", "part"),
    [
        ([GOOD, {"prompt": "a?", "chosen": "b"}], r"rows\.jsonl:2: field 'rejected' is missing"),
        ([GOOD, {"prompt": "a?", "chosen": "b", "rejected": None}], r"rows\.jsonl:2: field 'rejected' is null"),
        ([GOOD, {"prompt": "a?", "chosen": "b", "rejected": 3}], r"rows\.jsonl:2: field 'rejected' is no list"),
        ([{**GOOD, "margin": 1.0}, {**GOOD, "margin": float("nan")}], r"rows\.jsonl:2: field 'margin' is no finite"),
        ([{**GOOD, "rejected": "b"}] * 4, "nothing is left to train on; of 4 rows identical sides: 4"),
        ([{"prompt": "a?", "responses": ["b", "c"], "ranks": [1, 1]}] * 4, "no two answers differ in rank: 4"),
        ([{"prompt": "a?", "responses": ["b"], "ranks": [1]}] * 4, "two or more answers"),
        ([{"text": "b", "label": "x"}] * 4, "label"),
        ([{"text": "b"}] * 4, "neither two answers to compare nor a label"),
        ([{"prompt": "a?", "response": "b"}] * 4, "neither two answers to compare nor a label"),
    ],
)  # fmt: skip
def test_what_cannot_be_learnt_is_one_message(
    run_on_ranks: Callable[..., list[Any]], tmp_path: Path, rows: list[dict[str, Any]], part: str
) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    settings = {"data__validation_split_percentage": 0, "model__tokenizer__train": "none"}
    overrides = rm_words(data, model__tokenizer__path=tmp_path / "tokenizer", **settings)
    with pytest.raises(AssertionError, match=part):
        run_on_ranks(1, RUN, run_dir=str(tmp_path / "run"), overrides=overrides)


@pytest.mark.slow
@pytest.mark.distributed
def test_a_bad_pair_is_one_message_and_exit_2(tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps(GOOD) + "\n" + json.dumps({"prompt": "a?", "chosen": "b"}) + "\n")
    done = rlhf("rm", *rm_words(data), f"run_dir={tmp_path / 'run'}")
    assert done.returncode == 2
    assert f"{data}:2: field 'rejected' is missing" in done.stderr
    assert "data.on_bad_row=skip" in done.stderr
    assert "Traceback" not in done.stderr


def test_wrong_requests_are_told_together(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    done = rlhf(
        "rm", "data.path=empty.jsonl", "model.path=./missing", "data.packing=true", "rm.centre_coef=1",
        "data=code", "train.early_stopping.patience=2", "data.format=text_only", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2
    for part in (
        "data.path: empty.jsonl is empty", "model.path: no such directory: ./missing", "data.packing: is not",
        "did you mean rm.center_coef?", "data: has no option 'code'", "train.early_stopping.patience: needs",
        "data.format: got 'text_only'; allowed: one of auto, paired, ranked, labelled, hh",
    ):  # fmt: skip
        assert part in done.stderr, part
    assert [p.name for p in tmp_path.iterdir()] == ["empty.jsonl"]


@pytest.mark.slow
def test_dry_run_of_the_7b_recipe_with_a_config_and_no_weights(tmp_path: Path) -> None:
    from transformers import LlamaConfig

    model = tmp_path / "llama-7b"
    LlamaConfig(architectures=["LlamaForCausalLM"]).save_pretrained(model)  # transformers' defaults are LLaMA-7B
    tiny_tokenizer("bpe", 300).save_pretrained(model)
    path = write_pairs(tmp_path / "pairs.jsonl", rows=300)
    done = rlhf(
        "rm", "--dry-run", "conf=hh_rlhf_llama_7b", f"model.path={model}", f"data.path={path}",
        f"data.cache_dir={tmp_path / 'cache'}", f"run_dir={tmp_path / 'run'}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # 6,607,343,616 without the lm_head (32000 x 4096); 39,976,960 in the adapter, 2 x 4096 in both heads
    assert "6,647,328,768 parameters, 39,981,056 trained" in done.stdout
    assert "64 rows a step = 4 pairs x 8 ranks x 2 accumulation" in done.stdout
    assert not (tmp_path / "run").exists()
