"""The scripts that chain stages: what they run, in which order, with whose overrides; one of them for real."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from rlhf_cli.config.compose import compose_stage
from rlhf_cli.job import request_problems
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


class Example(NamedTuple):
    """A command that starts a chain, as a page or the head of a script shows it. slurm: variables of its allocation."""

    where: str
    script: str
    words: list[str]
    variables: dict[str, str]
    slurm: dict[str, str]


def shown_commands() -> Iterator[Example]:
    """Every line of the heads and of docs/multi-gpu.md that starts a chain, also inside `sbatch --wrap`."""
    for page in [*(SCRIPTS / name for name in NEEDED), SCRIPTS.parent / "docs" / "multi-gpu.md"]:
        joined = re.sub(r"\\\n#? *", "", page.read_text(encoding="utf-8"))
        for line in re.findall(r"^(?:#   )?((?:[A-Z]+=|\.\.\. |sbatch |scripts/).*)$", joined, re.MULTILINE):
            outer = shlex.split(line)
            inner = shlex.split(outer[-1].partition(";")[0]) if "--wrap" in outer else outer
            start = next((i for i, word in enumerate(inner) if word.startswith("scripts/")), None)
            if start is None:
                continue
            variables = dict(word.split("=", 1) for word in outer[:start] if re.match(r"[A-Z_]+=", word))
            asked = dict(word[2:].split("=", 1) for word in outer if re.match(r"--[a-z-]+=", word))
            yield Example(page.name, inner[start][8:], inner[start + 1 :], variables, allocation(asked))


def allocation(asked: dict[str, str]) -> dict[str, str]:
    """What sbatch sets for these options; nothing for none."""
    if not asked:
        return {}
    tasks, cpus = int(asked.get("ntasks-per-node", 1)), int(asked.get("cpus-per-task", 1))
    return {
        "SLURM_JOB_ID": "7", "SLURM_NNODES": asked["nodes"], "SLURM_GPUS_ON_NODE": asked["gpus-per-node"],
        "SLURM_CPUS_ON_NODE": str(tasks * cpus),
    }  # fmt: skip


@pytest.mark.parametrize("example", shown_commands(), ids=lambda e: f"{e.where}: {e.script} {e.slurm}")
def test_the_ranks_of_every_command_shown_divide_every_batch(
    example: Example, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    for name, text in {**example.slurm, "CUDA_VISIBLE_DEVICES": ""}.items():
        monkeypatch.setenv(name, text)
    chain = recorded(tmp_path, example.script, *example.words, **example.variables)
    assert chain.exit_code == 0, chain.shown
    for stage, *words in chain.calls:
        config = compose_stage(stage, words).config
        wrong = [problem for problem in request_problems(config, weights_needed=False) if "batch" in problem.key]
        assert wrong == [], f"rlhf {stage} {words}"


def test_commands_for_slurm_are_shown() -> None:
    on_slurm = {(e.where, e.script, e.slurm["SLURM_NNODES"]) for e in shown_commands() if e.slurm}
    assert on_slurm == {
        ("hh_rlhf_llama_7b.sh", "hh_rlhf_llama_7b.sh", "1"),
        ("instructgpt.sh", "instructgpt.sh", "2"),
        ("multi-gpu.md", "hh_rlhf_llama_7b.sh", "2"),
    }


@pytest.mark.parametrize("script", NEEDED)
@pytest.mark.parametrize("runs", ["runs/sweep/optim.lr=1e-05", "runs/[x] {y}"])
def test_any_directory_may_hold_the_runs(script: str, runs: str, tmp_path: Path) -> None:
    chain = recorded(tmp_path, script, RUNS=runs)
    for stage, *words in chain.calls:
        composed = compose_stage(stage, words)
        assert composed.problems == [], stage
        if stage in ("ppo", "raft"):
            assert composed.config.reward.sources[0].path.startswith(f"{runs}/")
    # What is shown can be typed.
    typed = [shlex.split(line[2:]) for line in chain.shown.splitlines() if line.startswith("$ ")]
    assert [words[1:] for words in typed] == chain.calls


def test_an_old_bash_is_told_at_once(tmp_path: Path) -> None:
    """BASH_VERSINFO cannot be set, so the text asks another array."""
    text = (SCRIPTS / "chain.sh").read_text().replace("BASH_VERSINFO", "VERSION")

    def under(version: str) -> subprocess.CompletedProcess[str]:
        words = ["bash", "-c", f"VERSION=({version})\n{text}\necho on"]
        return subprocess.run(words, capture_output=True, text=True, check=False)

    assert under("4 4").stdout == under("5 0").stdout == "on\n"
    old = under("4 3")
    assert (old.returncode, old.stdout) == (2, "")
    assert old.stderr.startswith("error: bash 4.4 or newer is needed")


# A python that makes environments at once, and has no torch.
PYTHON = """#!/bin/bash
case "$1 $2" in
    "-c import torch") exit 1 ;;
    "-m venv")
        target="${@: -1}"
        [[ " $* " != *" --clear "* ]] || rm -rf "$target"
        mkdir -p "$target/bin"
        cp "$0" "$target/bin/python"
        [[ -z "${INTERRUPTED:-}" ]] || exit 1
        echo "VIRTUAL_ENV=$target PATH=$target/bin:\\$PATH" > "$target/bin/activate" ;;
esac
"""


def test_an_interrupted_environment_is_made_anew(tmp_path: Path) -> None:
    for folder, text in {"bin/python3": PYTHON, "scripts/setup.sh": (SCRIPTS / "setup.sh").read_text()}.items():
        (tmp_path / folder).parent.mkdir()
        (tmp_path / folder).write_text(text)
        (tmp_path / folder).chmod(0o755)
    (tmp_path / "pyproject.toml").touch()

    def setup(**env: str) -> subprocess.CompletedProcess[str]:
        words = ["bash", "-euc", "source scripts/setup.sh; setup; command -v python"]
        path = {"PATH": f"{tmp_path}/bin:/usr/bin:/bin"}
        return subprocess.run(words, cwd=tmp_path, env=path | env, capture_output=True, text=True, check=False)

    assert setup(INTERRUPTED="yes").returncode == 1
    assert (tmp_path / ".venv" / "bin" / "python").exists()
    (tmp_path / ".venv" / "half").touch()
    done = setup()
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, f"{tmp_path}/.venv/bin/python"), done.stderr
    assert not (tmp_path / ".venv" / "half").exists()
    again = setup()
    assert again.stdout == f"{tmp_path}/.venv/bin/python\n", "the second time it does nothing"


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
