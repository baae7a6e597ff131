"""The stage around the merge: manifest, comparison, dry run, interrupted merges, bases from the hub's cache."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, GenerationConfig

from rlhf_cli.errors import ModelError, RunFailed
from rlhf_cli.files import digest_tree, write_json
from rlhf_cli.models import merge as merge_module
from rlhf_cli.models.merge_plan import Target
from rlhf_cli.models.merge_verify import Verification, available_memory
from rlhf_cli.models.tokenizer import load_tokenizer
from rlhf_cli.rundir import read_manifest
from rlhf_cli.runtime.process import RankProcess
from rlhf_cli.runtime.stop import StopWatch
from rlhf_cli.schema import MergeConfig, MergeLoraConfig, ProgressConfig
from rlhf_cli.stages import merge_lora
from tests.merge_cases import IDS, classifier_of, logits, save_base, save_peft

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
REWARD = {"mean": -1.25, "std": 0.5, "type": "labels", "labels": ["happy", "sad"]}


def adapter_run(
    run_dir: Path, base_run: Path, reward: dict[str, Any] | None = None, template: str | None = "hh"
) -> Any:
    """A finished run of LoRA on the model of another run. Returns base + adapter."""
    base = base_run / "model"
    task = "causal_lm" if reward is None else "sequence_classification"
    model = AutoModelForCausalLM.from_pretrained(base) if reward is None else classifier_of(base, len(reward["labels"]))
    wrapped = save_peft(
        run_dir / "model", model, tokenizer=load_tokenizer(base), base_path=base.resolve(),
        task_type="CAUSAL_LM" if reward is None else "SEQ_CLS",
    )  # fmt: skip
    digest = digest_tree(base)
    manifest = {
        "stage": "sft" if reward is None else "rm", "status": "complete", "template": template, "reward": reward,
        "output": {"kind": "adapter", "task": task, "path": "model", "format": "peft"},
        "base_model": str(base_run), "base_digest": digest,
        "parents": [{"role": "policy", "run_dir": str(base_run), "digest": digest}],
    }  # fmt: skip
    write_json(run_dir / "manifest.json", manifest)
    return wrapped


@pytest.fixture
def base_run(tmp_path: Path) -> Path:
    run_dir = tmp_path / "sft"
    save_base(run_dir / "model")
    output = {"kind": "policy", "task": "causal_lm", "path": "model", "format": "hf"}
    write_json(run_dir / "manifest.json", {"stage": "sft", "status": "complete", "output": output, "template": "hh"})
    return run_dir


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., tuple[Path, str]]:
    """run(name, **options) -> (run directory, what was said), as a worker runs the stage."""

    def go(name: str, **options: Any) -> tuple[Path, str]:
        run_dir = tmp_path / name
        run_dir.mkdir(exist_ok=True)
        said = io.StringIO()
        config = MergeLoraConfig(merge=MergeConfig(**options), logging=ProgressConfig("lines"))
        merge_lora.run(config, run_dir, RankProcess(0, 0, 1, said, StopWatch(run_dir, 0)))
        return run_dir, said.getvalue()

    return go


def test_policy_with_everything_that_later_stages_read(
    tmp_path: Path, base_run: Path, run: Callable[..., tuple[Path, str]]
) -> None:
    wrapped = adapter_run(tmp_path / "lora", base_run)
    run_dir, said = run("merged", adapter=str(tmp_path / "lora"))
    manifest = read_manifest(run_dir)
    assert (manifest["stage"], manifest["status"], manifest["template"]) == ("merge-lora", "complete", "hh")
    assert manifest["output"] == {"kind": "policy", "task": "causal_lm", "path": "model", "format": "hf"}
    assert manifest["base_model"] == str(base_run)
    assert manifest["parents"] == [
        {"role": "adapter", "run_dir": str(tmp_path / "lora"), "digest": digest_tree(tmp_path / "lora" / "model")},
        {"role": "base", "run_dir": str(base_run), "digest": digest_tree(base_run / "model")},
    ]
    assert manifest["finished"]
    assert manifest["metrics"]["tensors_merged"] == 6.0  # three modules in each of two layers
    assert 0 < manifest["verification"]["max_abs_difference"] < 1e-5
    assert manifest["verification"]["inputs"] == 6
    assert "6 of 21 tensors change, LlamaForCausalLM, float32" in said
    merged = AutoModelForCausalLM.from_pretrained(run_dir / "model")
    torch.testing.assert_close(logits(merged), logits(wrapped), rtol=1e-5, atol=1e-5)
    assert GenerationConfig.from_pretrained(run_dir / "model").pad_token_id == 0


def test_reward_model_takes_moments_and_labels_along(
    tmp_path: Path, base_run: Path, run: Callable[..., tuple[Path, str]]
) -> None:
    wrapped = adapter_run(tmp_path / "lora", base_run, REWARD)
    run_dir, said = run("merged", adapter=str(tmp_path / "lora" / "model"), output_dtype="bf16")
    manifest = read_manifest(run_dir)
    assert manifest["output"]["kind"] == "reward"
    assert manifest["reward"] == REWARD
    assert manifest["parents"][0]["run_dir"] == str(tmp_path / "lora"), "the run is found from its model"
    assert "left out, since a LlamaForSequenceClassification has no place for them: lm_head.weight" in said
    config = AutoConfig.from_pretrained(run_dir / "model")
    assert config.reward == REWARD
    assert config.id2label == {0: "happy", 1: "sad"}
    assert config.dtype == torch.bfloat16
    merged = AutoModelForSequenceClassification.from_pretrained(run_dir / "model", dtype=torch.float32)
    assert merged.score.weight.shape == (2, 32)
    torch.testing.assert_close(logits(merged), logits(wrapped), rtol=0.05, atol=0.05)
    assert 1e-5 < manifest["verification"]["max_abs_difference"] < 0.05, "the rounding of bf16 is recorded as it is"


def test_chain_of_two_adapters(tmp_path: Path, base_run: Path, run: Callable[..., tuple[Path, str]]) -> None:
    """sft's adapter, merged; a reward model's adapter on that; merged. Every base is found by itself."""
    adapter_run(tmp_path / "lora", base_run)
    merged, _ = run("merged", adapter=str(tmp_path / "lora"))
    wrapped = adapter_run(tmp_path / "rm_lora", merged, REWARD)
    rm, _ = run("rm", adapter=str(tmp_path / "rm_lora"))
    loaded = AutoModelForSequenceClassification.from_pretrained(rm / "model")
    torch.testing.assert_close(logits(loaded), logits(wrapped), rtol=1e-5, atol=1e-5)
    assert [p["run_dir"] for p in read_manifest(rm)["parents"]] == [str(tmp_path / "rm_lora"), str(merged)]


def wrong_pieces(target: Target) -> Any:
    yield target.start.read().to(target.dtype)  # the base, as if there were no adapter


def test_a_merge_that_went_wrong_is_not_published(
    tmp_path: Path, base_run: Path, run: Callable[..., tuple[Path, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter_run(tmp_path / "lora", base_run)
    with monkeypatch.context() as patched:
        patched.setattr(merge_module, "merged_pieces", wrong_pieces)
        with pytest.raises(RunFailed, match=r"differs from base \+ adapter by .*that is no rounding"):
            run("merged", adapter=str(tmp_path / "lora"))
    assert not (tmp_path / "merged" / "model").exists()
    assert read_manifest(tmp_path / "merged")["output"] is None
    run("merged", adapter=str(tmp_path / "lora"))
    assert read_manifest(tmp_path / "merged")["status"] == "complete"
    assert not list((tmp_path / "merged").glob(".model*"))


def test_what_counts_as_rounding() -> None:
    assert Verification(9e-4, 1.0, 6, 0.0).is_rounding(torch.float32)
    assert not Verification(1.1e-3, 1.0, 6, 0.0).is_rounding(torch.float32)
    assert Verification(1.1e-3, 2.0, 6, 0.0).is_rounding(torch.float32)  # 5.5e-4 of the largest logit
    assert Verification(0.09, 1.0, 6, 0.0).is_rounding(torch.bfloat16)
    assert not Verification(0.11, 1.0, 6, 0.0).is_rounding(torch.float16)
    assert not Verification(float("nan"), 1.0, 6, 0.0).is_rounding(torch.bfloat16)


def test_comparison_is_left_out_where_memory_is_short_or_the_user_says_so(
    tmp_path: Path, base_run: Path, run: Callable[..., tuple[Path, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter_run(tmp_path / "lora", base_run)
    monkeypatch.setattr(merge_lora, "available_memory", lambda: 1000)
    run_dir, said = run("merged", adapter=str(tmp_path / "lora"))
    assert "available are 0.0 GB" in read_manifest(run_dir)["verification"]["skipped"]
    assert "merge.verify=always tries it all the same" in said
    run_dir, _ = run("always", adapter=str(tmp_path / "lora"), verify="always")
    assert read_manifest(run_dir)["verification"]["inputs"] == 6
    run_dir, _ = run("never", adapter=str(tmp_path / "lora"), verify="never")
    assert read_manifest(run_dir)["verification"] == {"skipped": "merge.verify=never"}


def test_a_full_disk_is_noticed_before_anything_is_written(
    tmp_path: Path, base_run: Path, run: Callable[..., tuple[Path, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter_run(tmp_path / "lora", base_run)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 99, 1))  # type: ignore[attr-defined]
    with pytest.raises(RunFailed, match=r"no room for the merged model in .*: needs \d+\.\d+ MB, free are 0\.00 MB;"):
        run("merged", adapter=str(tmp_path / "lora"))
    assert not list((tmp_path / "merged").glob("*model*"))


def test_dry_run_tells_and_writes_nothing(
    tmp_path: Path, base_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    adapter_run(tmp_path / "lora", base_run, REWARD)
    before = digest_tree(tmp_path)
    merge = MergeConfig(adapter=str(tmp_path / "lora"), max_shard_size="20KB", output_dtype="bf16")
    merge_lora.dry_run(MergeLoraConfig(merge=merge), 1)
    said = " ".join(capsys.readouterr().out.split())
    for words in ("rank 4, scale 2", "LlamaForSequenceClassification", "21, of which 7 change, 1 brought whole",
                  "in 2 files, bfloat16", "compared │ yes"):  # fmt: skip
        assert words in said
    assert digest_tree(tmp_path) == before
    merge.base = str(tmp_path / "gone")
    with pytest.raises(ModelError, match="does not exist"):
        merge_lora.dry_run(MergeLoraConfig(merge=merge), 1)


KILLED = """
import io, os, signal, sys
from pathlib import Path
from rlhf_cli.models import merge
from rlhf_cli.runtime.progress import Display
from rlhf_cli.schema import MergeConfig
from rlhf_cli.stages import merge_lora
write, files = merge.write_tensors, []
def killed(path, specs, pieces):
    if files:
        path.write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    files.append(path)
    write(path, specs, pieces)
merge.write_tensors = killed
config = MergeConfig(adapter=sys.argv[1], max_shard_size="40KB")
merge_lora.merge(config, Path(sys.argv[2]), Display(io.StringIO(), "none", "merge-lora"))
"""


def test_killed_between_two_files_and_started_again(
    tmp_path: Path, base_run: Path, run: Callable[..., tuple[Path, str]]
) -> None:
    wrapped = adapter_run(tmp_path / "lora", base_run)
    (tmp_path / "merged").mkdir()
    words = [sys.executable, "-c", KILLED, str(tmp_path / "lora"), str(tmp_path / "merged")]
    done = subprocess.run(words, env=os.environ | {"PYTHONPATH": os.getcwd()}, check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert not (tmp_path / "merged" / "model").exists()
    run_dir, _ = run("merged", adapter=str(tmp_path / "lora"), max_shard_size="40KB")
    assert not list(run_dir.glob(".*"))
    merged = AutoModelForCausalLM.from_pretrained(run_dir / "model")
    torch.testing.assert_close(logits(merged), logits(wrapped), rtol=1e-5, atol=1e-5)


def test_a_base_from_the_hubs_cache(
    tmp_path: Path, base_run: Path, run: Callable[..., tuple[Path, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--some--model"
    shutil.copytree(base_run / "model", repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    wrapped = save_peft(tmp_path / "peft", AutoModelForCausalLM.from_pretrained(base_run / "model"))
    settings = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    write_json(tmp_path / "peft" / "adapter_config.json", settings | {"base_model_name_or_path": "some/model"})
    run_dir, _ = run("merged", adapter=str(tmp_path / "peft"))
    assert read_manifest(run_dir)["parents"][1] == {"role": "base", "path": "some/model", "digest": None}
    merged = AutoModelForCausalLM.from_pretrained(run_dir / "model")
    torch.testing.assert_close(logits(merged), logits(wrapped), rtol=1e-5, atol=1e-5)
    with pytest.raises(ModelError, match="other/model is not in the local cache, and a dry run downloads nothing"):
        merge_lora.dry_run(MergeLoraConfig(merge=MergeConfig(adapter=str(tmp_path / "peft"), base="other/model")), 1)
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE is set"):
        run("other", adapter=str(tmp_path / "peft"), base="other/model")


def test_only_the_adapters_tensors_differ_from_the_base(
    tmp_path: Path, base_run: Path, run: Callable[..., tuple[Path, str]]
) -> None:
    adapter_run(tmp_path / "lora", base_run)
    run_dir, _ = run("merged", adapter=str(tmp_path / "lora"), verify="never")
    before: dict[str, Tensor] = load_file(base_run / "model" / "model.safetensors")
    after = load_file(run_dir / "model" / "model.safetensors")
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys()
    assert changed == {
        f"model.layers.{i}.{m}.weight"
        for i in (0, 1)
        for m in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
    }
    assert IDS.max() < len(before["lm_head.weight"])


def test_the_stage_needs_no_deepspeed() -> None:
    program = "import sys, rlhf_cli.stages.merge_lora; sys.exit('deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_memory_ends_at_the_limit_of_a_container(tmp_path: Path) -> None:
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    5000 kB\n")
    assert available_memory(proc, groups) == 5000 * 1024  # no control groups at all
    (groups / "job" / "step").mkdir(parents=True)
    (proc / "self" / "cgroup").write_text("4:memory:/old\n0::/job/step\n")
    (groups / "job" / "step" / "memory.max").write_text("max\n")
    assert available_memory(proc, groups) == 5000 * 1024
    # the job may have 3,000,000 bytes and holds 2,000,000, of which 500,000 are files that can go
    (groups / "job" / "memory.max").write_text("3000000\n")
    (groups / "job" / "memory.current").write_text("2000000\n")
    (groups / "job" / "memory.stat").write_text("anon 1500000\ninactive_file 500000\n")
    assert available_memory(proc, groups) == 1_500_000
