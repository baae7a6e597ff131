"""The command line as a user types it: exit codes, help, and runs that are killed and started again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rlhf_cli.rundir import read_manifest
from rlhf_cli.runtime.metrics import read_metrics
from tests.command_line import finish, rlhf, start, wait_for_step
from tests.stage_cases import words, write_dialogues

SLOW_STEPS = {
    "train__max_steps": 30,
    "train__save_every": 4,
    "train__keep_checkpoints": 2,
    "train__global_batch_size": 32,
}


# --- words


def test_a_reader_that_leaves_is_no_error() -> None:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    for asked in ([], ["ppo", "--help"]):  # less and more than a buffer holds
        program = [sys.executable, "-m", "rlhf_cli", *asked]
        with subprocess.Popen(program, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            process.stdout.close()  # long before Python has started
            assert (process.wait(60), process.stderr.read()) == (0, b"")


def test_help_is_quick_and_lists_the_stages() -> None:
    took = []
    for _ in range(3):
        began = time.monotonic()
        shown = rlhf("--help")
        took.append(time.monotonic() - began)
    assert shown.returncode == 0
    assert "rlhf sft --help" in shown.stdout or "sft " in shown.stdout
    # The contract's bound; the best of three, so that a busy machine does not decide it.
    assert min(took) < 0.5
    assert rlhf().stdout == shown.stdout


def test_stage_help_names_every_option_with_default_and_recipes() -> None:
    page = rlhf("sft", "--help").stdout
    assert "optim.lr  (number > 0, default 2e-05)" in page
    assert "optim.schedule  (one of constant, linear, cosine, inverse_sqrt, default cosine)" in page
    assert "hh_rlhf_llama_7b" in page
    assert "deepspeed= " in page


def test_cfg_job_prints_yaml_and_demands_nothing() -> None:
    import yaml

    done = rlhf("sft", "--cfg", "job", "optim.lr=1e-5")
    assert done.returncode == 0
    config = yaml.safe_load(done.stdout)
    assert (config["optim"]["lr"], config["model"]["path"]) == (1e-5, None)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["stf"], "did you mean `rlhf sft`?"),
        (["sft", "--lr=3"], "write lr=3 without dashes"),
        (["sft", "--cfg", "all"], "--cfg job"),
        (["sft", "optim.lrr=1"], "did you mean optim.lr?"),
        (["sft", "conf=nothing"], "shipped: "),
        (["sft", "model.path=gpt2", "data.path=missing.jsonl"], "no such file"),
    ],
)
def test_wrong_requests_exit_2_without_a_traceback(tmp_path: Path, arguments: list[str], part: str) -> None:
    done = rlhf(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert part in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_completion_offers_keys_recipes_groups_and_values() -> None:
    complete = lambda *w: rlhf("__complete", *w).stdout.split()
    assert complete("s") == ["sft", "score"]
    assert "optim.lr=" in complete("sft", "optim.")
    assert complete("sft", "conf=hh_rlhf_llama_7") == ["conf=hh_rlhf_llama_7b"]
    assert "deepspeed=zero3" in complete("sft", "conf=x", "deepspeed=z")
    assert complete("sft", "optim.schedule=co") == ["optim.schedule=constant", "optim.schedule=cosine"]
    script = rlhf("completion", "bash").stdout
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0


def test_completion_works_in_a_shell() -> None:
    """readline's view of `rlhf sft conf=hh_rlhf_llama_7<TAB>`, where = parts words."""
    script = rlhf("completion", "bash").stdout
    program = f"""
rlhf() {{ {sys.executable} -m rlhf_cli "$@"; }}
compopt() {{ :; }}
{script}
COMP_LINE='rlhf sft conf=hh_rlhf_llama_7'; COMP_POINT=${{#COMP_LINE}}
COMP_WORDS=(rlhf sft conf = hh_rlhf_llama_7); COMP_CWORD=4
_rlhf; echo "${{COMPREPLY[@]}}"
COMP_LINE='rlhf sft optim.l'; COMP_POINT=${{#COMP_LINE}}; COMP_WORDS=(rlhf sft optim.l); COMP_CWORD=2
_rlhf; echo "${{COMPREPLY[@]}}"
"""
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["hh_rlhf_llama_7b", "optim.lr="], done.stderr


# --- runs


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dialogues(tmp_path_factory.mktemp("data") / "dialogues.jsonl", rows=64)


@pytest.fixture(scope="module")
def uninterrupted(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    finish("sft", run_dir, words(data, **SLOW_STEPS))
    return run_dir


def assert_same_run(run_dir: Path, reference: Path) -> None:
    a, b = (load_file(r / "model" / "model.safetensors") for r in (run_dir, reference))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a), "bitwise"
    lines = [[(line["step"], line["loss"]) for line in read_metrics(r)] for r in (run_dir, reference)]
    assert lines[0] == lines[1]
    assert [step for step, _ in lines[0]] == list(range(1, 31)), "every step once"


@pytest.mark.slow
@pytest.mark.distributed
def test_killed_at_random_moments_it_ends_with_the_same_weights(
    data: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    run_dir, overrides = tmp_path / "run", words(data, **SLOW_STEPS)
    for step in (3, 9):  # before the first checkpoint, between two
        front = start("sft", run_dir, overrides)
        wait_for_step(run_dir, step, front)
        front.send_signal(signal.SIGKILL)
        front.wait()
        assert read_manifest(run_dir)["status"] == "running"
    finish("sft", run_dir, overrides)
    assert_same_run(run_dir, uninterrupted)


@pytest.mark.slow
@pytest.mark.distributed
def test_sigterm_saves_and_the_same_command_goes_on(data: Path, uninterrupted: Path, tmp_path: Path) -> None:
    overrides = words(data, **(SLOW_STEPS | {"train__save_every": 0}))
    run_dir = tmp_path / "run"
    front = start("sft", run_dir, overrides)
    wait_for_step(run_dir, 7, front)
    front.send_signal(signal.SIGTERM)
    assert front.wait(timeout=60) == 143
    manifest = read_manifest(run_dir)
    assert manifest["status"] == "interrupted"
    (checkpoint,) = (run_dir / "checkpoints").glob("step_*")
    stopped = json.loads((checkpoint / "loop_state.json").read_text())["loop"]["step"]
    assert [line["step"] for line in read_metrics(run_dir)] == list(range(1, stopped + 1))
    finish("sft", run_dir, overrides)
    assert_same_run(run_dir, uninterrupted)
    again = rlhf("sft", *overrides, f"run_dir={run_dir}")
    assert again.returncode == 0
    assert "finished already" in again.stderr


@pytest.mark.slow
@pytest.mark.distributed
def test_a_killed_rank_ends_the_job_within_seconds(data: Path, tmp_path: Path) -> None:
    overrides = words(data, launch__num_processes=2, **(SLOW_STEPS | {"train__max_steps": 100000}))
    run_dir = tmp_path / "run"
    front = start("sft", run_dir, overrides)
    wait_for_step(run_dir, 2, front)
    log = (run_dir / "logs" / "rank_1.log").read_text()
    victim = int(log.split("process ")[1].split()[0])
    os.kill(victim, signal.SIGKILL)
    began = time.monotonic()
    assert front.wait(timeout=30) == 1
    assert time.monotonic() - began < 10
    shown = (tmp_path / "front.log").read_text()
    assert "rank 1" in shown
    assert "SIGKILL" in shown
    assert "logs/rank_1.log" in shown
    assert "Traceback" not in shown
    assert read_manifest(run_dir)["status"] == "failed"


@pytest.mark.slow
@pytest.mark.distributed
def test_bad_data_is_one_message_and_exit_2(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "response": "b"}\n{"prompt": "a", "response": 3}\n')
    front = start("sft", tmp_path / "run", words(path))
    assert front.wait(timeout=120) == 2
    shown = (tmp_path / "front.log").read_text()
    assert f"{path}:2" in shown
    assert "response" in shown
    assert "Traceback" not in shown
    assert read_manifest(tmp_path / "run")["status"] == "failed"


@pytest.mark.slow
@pytest.mark.distributed
def test_a_sweep_runs_every_combination_and_prints_a_table(data: Path, tmp_path: Path) -> None:
    overrides = words(data, train__max_steps=2, data__validation_split_percentage=10)
    overrides = [w for w in overrides if not w.startswith("optim.lr=")]
    done = rlhf("sft", "-m", *overrides, "optim.lr=0.01,0.001", f"run_dir={tmp_path / 'sweep'}")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "sweep" / "sweep.jsonl").read_text().splitlines()]
    assert [row["run"] for row in rows] == ["optim.lr=0.01", "optim.lr=0.001"]
    assert rows[0]["metrics"]["eval_loss"] != rows[1]["metrics"]["eval_loss"]
    assert "eval_loss" in done.stderr


@pytest.mark.slow
def test_dry_run_of_the_7b_recipe_with_a_config_and_no_weights(tmp_path: Path) -> None:
    from transformers import LlamaConfig

    from tests.tiny_models import tiny_tokenizer

    model = tmp_path / "llama-7b"
    LlamaConfig(architectures=["LlamaForCausalLM"]).save_pretrained(model)  # transformers' defaults are LLaMA-7B
    tiny_tokenizer("bpe", 300).save_pretrained(model)
    path = write_dialogues(tmp_path / "hh.jsonl", rows=300)
    done = rlhf(
        "sft", "--dry-run", "conf=hh_rlhf_llama_7b", f"model.path={model}", f"data.path={path}",
        f"data.cache_dir={tmp_path / 'cache'}", f"run_dir={tmp_path / 'run'}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "6,738,415,616 parameters" in done.stdout
    assert "128 rows a step = 4 sequences x 8 ranks x 4 accumulation" in done.stdout
    assert "bfloat16" in done.stdout
    assert not (tmp_path / "run").exists()
