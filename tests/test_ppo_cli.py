"""`rlhf ppo` as a user types it: killed in every phase and started again, dry, refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from rlhf_cli.rundir import read_manifest
from rlhf_cli.runtime.metrics import read_metrics
from tests.command_line import finish, rlhf, start, wait_for_step
from tests.ppo_models import write_policy_run, write_reward_run
from tests.stage_cases import ppo_words, write_letter_reward, write_prompts
from tests.tiny_models import tiny_tokenizer

# Slow enough that a kill can hit the scoring, too.
SLOW_REWARD = """
import time
def slow(prompts, responses, **columns):
    time.sleep(0.3)
    return [response.count("e") / max(1, len(response)) for response in responses]
"""


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_policy_run(tmp_path_factory.mktemp("policy") / "sft")


def overrides(policy: Path, folder: Path, **more: object) -> list[str]:
    prompts = folder / "prompts.jsonl"
    if not prompts.exists():
        write_prompts(prompts)
        (folder / "slow.py").write_text(SLOW_REWARD)
    source = f"{{type: function, path: {folder / 'slow.py'}, function: slow}}"
    settings: dict[str, object] = {"ppo__num_iterations": 10, "train__save_every": 2, "ppo__ema": 0.9} | more
    return ppo_words(policy, prompts, source, **settings)


@pytest.mark.slow
@pytest.mark.distributed
def test_killed_at_any_moment_it_ends_with_the_same_weights(policy: Path, tmp_path: Path) -> None:
    words = overrides(policy, tmp_path)
    finish("ppo", tmp_path / "whole", words)
    for step, wait in ((5, 0.35),):  # between two checkpoints; tests/test_ppo.py has every phase
        front = start("ppo", tmp_path / "killed", words)
        wait_for_step(tmp_path / "killed", step, front)
        time.sleep(wait)
        front.send_signal(signal.SIGKILL)
        front.wait()
        assert read_manifest(tmp_path / "killed")["status"] == "running"
    finish("ppo", tmp_path / "killed", words)
    for model in ("model", "last_policy", "critic"):
        whole, killed = (load_file(tmp_path / n / model / "model.safetensors") for n in ("whole", "killed"))
        assert all(torch.equal(whole[name], killed[name]) for name in whole), f"{model}: bitwise"
    lines = [[(x["step"], x.get("objective/scores"), x.get("eval_reward")) for x in read_metrics(tmp_path / n)]
             for n in ("whole", "killed")]  # fmt: skip
    assert lines[0] == lines[1]
    assert [step for step, *_ in lines[0]] == list(range(11)), "every iteration once, and the evaluation before them"


@pytest.mark.slow
@pytest.mark.distributed
def test_one_dead_rank_ends_the_job_in_seconds(policy: Path, tmp_path: Path) -> None:
    words = overrides(policy, tmp_path, launch__num_processes=2, ppo__num_iterations=200)
    front = start("ppo", tmp_path / "run", words)
    wait_for_step(tmp_path / "run", 2, front)
    ranks = subprocess.run(
        ["pgrep", "-f", f"rlhf_cli.worker {tmp_path / 'run'}"], capture_output=True, text=True, check=True
    )
    workers = [int(pid) for pid in ranks.stdout.split() if b"torch.distributed" not in _command(int(pid))]
    os.kill(workers[-1], signal.SIGKILL)
    began = time.monotonic()
    assert front.wait(timeout=60) == 1
    assert time.monotonic() - began < 30
    assert "killed" in (tmp_path / "front.log").read_text().lower()


def _command(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


@pytest.mark.slow
def test_dry_run_of_the_7b_recipe_fits_eight_times_40_gb(tmp_path: Path) -> None:
    base = tmp_path / "llama-7b"
    LlamaConfig(architectures=["LlamaForCausalLM"], pad_token_id=0).save_pretrained(base)
    tiny_tokenizer("bpe", 300).save_pretrained(base)
    adapter = tmp_path / "hh_rm_7b"
    tiny_tokenizer("bpe", 300).save_pretrained(adapter)
    settings = {
        "task_type": "SEQ_CLS", "peft_type": "LORA", "r": 16, "lora_alpha": 32, "base_model_name_or_path": str(base),
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    }  # fmt: skip
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    save_file({"base_model.model.score.weight": torch.zeros(1, 4096)}, adapter / "adapter_model.safetensors")
    prompts = write_prompts(tmp_path / "prompts.jsonl", rows=60)
    done = rlhf(
        "ppo", "--dry-run", "conf=hh_rlhf_llama_7b", f"model.path={base}", f"data.path={prompts}",
        f"reward.sources=[{{type: model, path: {adapter}}}]", "reward.normalize=false", f"run_dir={tmp_path / 'run'}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if "memory per rank" in line)
    gib = float(line.split("GiB")[0].split()[-1])
    assert 13 < gib < 40e9 / 2**30, line  # one base of 13.5 GB in bf16, shared by all four
    assert not (tmp_path / "run").exists()


def test_wrong_requests_are_told_together(policy: Path, tmp_path: Path) -> None:
    reward = write_reward_run(tmp_path / "rm")
    letters = write_letter_reward(tmp_path)
    done = rlhf(
        "ppo", f"model.path={reward}", "data.path=missing.jsonl", f"reward.sources=[{letters}, {{path: {policy}}}]",
        "ppo.kl_coeff=0.1", "ppo.missing_eos=never", "train.micro_batch_size=7", "generation.length_sampler=[9,3]",
        "ppo.sharing=hydra", "generation.temperature=0", f"run_dir={tmp_path / 'run'}",
    )  # fmt: skip
    assert done.returncode == 2
    for part in (
        f"model.path: {reward} holds a reward model, here a policy is needed", "data.path: no such file",
        f"reward.sources[1].path: {policy} holds a policy, here a reward model is needed: a run of `rlhf rm`",
        "did you mean ppo.kl_coef?", "ppo.missing_eos: got 'never'; allowed: none, set:VALUE, subtract:VALUE",
        "ppo.rollout_batch_size: 128 / num_mini_batches 1 = 128 is not a multiple", "generation.length_sampler: got",
        "ppo.sharing: hydra trains adapters", "generation.temperature: must be > 0",
    ):  # fmt: skip
        assert part in done.stderr, part
    assert not (tmp_path / "run").exists()
