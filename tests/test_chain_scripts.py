"""The scripts that chain stages: what they run, in which order, with whose overrides; one of them for real."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from rlhf_cli.config.compose import compose_stage
from rlhf_cli.rundir import read_manifest
from tests.tiny_models import PLAY

SCRIPTS = Path(__file__).parent.parent / "scripts"
# Writes down how it was called; fails with the code in FAIL_CODE when its first word is FAIL_STAGE.
RECORDER = """#!/bin/bash
printf '%s\\0' "$@" >> "$CALLS"; printf '\\n\\0' >> "$CALLS"
if [[ "$1" == "${FAIL_STAGE:-}" ]]; then exit "$FAIL_CODE"; fi
"""
SMALL = "model.arch.hidden_size=32 model.arch.num_layers=2 model.arch.num_heads=2 model.tokenizer.vocab_size=300"
NEEDED = {
    "hh_rlhf_llama_7b.sh": {},
    "hh_small.sh": {"DATA": "pairs.jsonl"},
    "shakespeare.sh": {},
    "instructgpt.sh": {
        "MODEL": "m", "DEMOS": "d.jsonl", "RANKINGS": "r.jsonl", "PROMPTS": "p.jsonl", "TEXT": "t.jsonl"
    },
}  # fmt: skip


class Chain(NamedTuple):
    """exit_code of the script; calls: the words of each `rlhf` that it ran; shown: what it printed."""

    exit_code: int
    calls: list[list[str]]
    shown: str


def recorded(folder: Path, script: str, *words: str, **variables: str) -> Chain:
    """Run a script with an `rlhf` that only writes down how it is called."""
    tool = folder / "bin" / "rlhf"
    tool.parent.mkdir(exist_ok=True)
    tool.write_text(RECORDER)
    tool.chmod(0o755)
    calls = folder / "calls"
    calls.unlink(missing_ok=True)
    path = f"{tool.parent}:/usr/bin:/bin"
    env = {"PATH": path, "CALLS": str(calls), "HOME": str(folder), **NEEDED[script], **variables}
    done = subprocess.run(
        ["bash", str(SCRIPTS / script), *words], env=env, cwd=folder, capture_output=True, text=True, check=False
    )
    written = calls.read_text().split("\0") if calls.exists() else []
    found: list[list[str]] = [[]]
    for word in written[:-1]:
        if word == "\n":
            found.append([])
        else:
            found[-1].append(word)
    return Chain(done.returncode, found[:-1], done.stdout + done.stderr)


def value(call: list[str], key: str) -> str:
    return next(word for word in reversed(call) if word.startswith(f"{key}=")).split("=", 1)[1]


@pytest.mark.parametrize("script", sorted(p.name for p in SCRIPTS.glob("*.sh")))
def test_every_script_parses(script: str) -> None:
    assert subprocess.run(["bash", "-n", str(SCRIPTS / script)], check=False).returncode == 0


@pytest.mark.parametrize("script", NEEDED)
def test_every_stage_composes_and_reads_what_an_earlier_one_wrote(script: str, tmp_path: Path) -> None:
    chain = recorded(tmp_path, script)
    assert chain.exit_code == 0, chain.shown
    written: list[str] = []
    for stage, *words in chain.calls:
        composed = compose_stage(stage, words)
        assert composed.problems + composed.unmet == []
        run_dir = value(words, "run_dir")
        text = " ".join(word for word in words if not word.startswith("run_dir="))
        assert all(used in written for used in re.findall(rf"\b{re.escape(str(Path(run_dir).parent))}/\w+", text))
        written.append(run_dir)
        assert f"$ rlhf {stage} " in chain.shown
    assert len(set(written)) == len(written) >= 3
    assert [stage for stage, *_ in chain.calls][:2] == ["sft", "rm"]


@pytest.mark.parametrize("script", NEEDED)
def test_arguments_reach_every_training_stage_and_variables_one(script: str, tmp_path: Path) -> None:
    chain = recorded(tmp_path, script, "train.seed=7", SFT_ARGS="optim.lr=3e-3 'data.columns={text: body of text}'")
    for stage, *words in chain.calls:
        assert (words[-1:] == ["train.seed=7"]) == (stage != "merge-lora")
        assert ("data.columns={text: body of text}" in words) == ("optim.lr=3e-3" in words) == (stage == "sft")


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_the_small_chain_divides_its_batches_for_any_number_of_ranks(ranks: int, tmp_path: Path) -> None:
    for stage, *words in recorded(tmp_path, "hh_small.sh", RANKS=str(ranks)).calls:
        config = compose_stage(stage, words).config
        if stage == "merge-lora":
            continue
        share = config.train.micro_batch_size * config.launch.num_processes
        rows = config.ppo if stage == "ppo" else config.train
        size = rows.rollout_batch_size // rows.num_mini_batches if stage == "ppo" else rows.global_batch_size
        assert size % share == 0
        assert config.launch.num_processes == ranks


def test_what_is_asked_for_is_run_and_nothing_after_a_failure(tmp_path: Path) -> None:
    stages = lambda **more: [call[0] for call in recorded(tmp_path, "hh_rlhf_llama_7b.sh", **more).calls]
    assert stages() == ["sft", "rm", "merge-lora", "raft", "ppo", "merge-lora"]
    assert stages(ALIGN="raft") == ["sft", "rm", "merge-lora", "raft"]
    assert stages(ALIGN="ppo") == ["sft", "rm", "ppo", "merge-lora"]
    stopped = recorded(tmp_path, "hh_rlhf_llama_7b.sh", FAIL_STAGE="rm", FAIL_CODE="130")
    assert (stopped.exit_code, [call[0] for call in stopped.calls]) == (130, ["sft", "rm"])
    without_data = recorded(tmp_path, "hh_small.sh", DATA="")
    assert without_data.exit_code != 0
    assert without_data.calls == []
    assert "DATA=pairs.jsonl" in without_data.shown


@pytest.mark.slow
def test_the_shakespeare_chain_for_real_and_again(tmp_path: Path) -> None:
    tool = tmp_path / "bin" / "rlhf"
    tool.parent.mkdir()
    tool.write_text(f'#!/bin/bash\nexec {sys.executable} -m rlhf_cli "$@"\n')
    tool.chmod(0o755)
    (tmp_path / "plays.txt").write_text(PLAY * 100, encoding="utf-8")
    labels = [{"text": f"hear me speak {i}!", "label": ["happy", "sad"][i % 2]} for i in range(40)]
    (tmp_path / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labels), encoding="utf-8")
    env = {
        **os.environ, "PATH": f"{tool.parent}:{os.environ['PATH']}", "PLAYS": "plays.txt", "LABELS": "labels.jsonl",
        "RUNS": "runs/it", "ALIGN": "raft", "RLHF_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1",
        "SFT_ARGS": f"train.max_steps=2 generation.num_prompts=0 'generation.prompts=[]' {SMALL}",
        "RM_ARGS": "train.max_steps=2", "RAFT_ARGS": "raft.num_iterations=1 raft.batch_size=16 eval.num_prompts=4",
    }  # fmt: skip
    words = ["bash", str(SCRIPTS / "shakespeare.sh"), "logging.tensorboard=false", "logging.progress=none"]
    done = subprocess.run(words, env=env, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    manifests = [read_manifest(tmp_path / "runs" / "it" / name) for name in ("sft", "mood", "raft")]
    assert [manifest["status"] for manifest in manifests] == ["complete"] * 3
    assert [parent["role"] for parent in manifests[-1]["parents"]] == ["policy", "reward"]
    again = subprocess.run(words, env=env, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
    assert again.returncode == 0
    assert (again.stdout + again.stderr).count("finished already") == 3
