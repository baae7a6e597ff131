"""What is wrong with reward sources is told before anything is loaded, and without torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.config.reward_requests import check_rewards
from rlhf_cli.schema import RewardConfig, RewardSourceConfig
from tests.reward_models import write_adapter, write_decoder, write_policy, write_run


def problems(normalize: bool = False, **options: Any) -> list[str]:
    config = RewardConfig(sources=[RewardSourceConfig(**options)], normalize=normalize)
    return [str(problem) for problem in check_rewards(config)]


def one(normalize: bool = False, **options: Any) -> str:
    (message,) = problems(normalize, **options)
    return message


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """rm: a run with one score; mood: one with labels; sft: a policy; lora: an adapter run on it."""
    root = tmp_path_factory.mktemp("made")
    write_decoder(root / "rm" / "model")
    write_run(root / "rm", reward={"mean": 0.0, "std": 1.0})
    write_decoder(root / "mood" / "model", labels=["angry", "happy"])
    write_run(root / "mood", reward={"labels": ["angry", "happy"]})
    write_policy(root / "sft" / "model")
    write_run(root / "sft", "policy", "causal_lm", stage="sft")
    write_adapter(root / "lora" / "model", root / "sft" / "model")
    write_run(root / "lora", "adapter")
    return root


def test_what_is_fine(made: Path, tmp_path: Path) -> None:
    (tmp_path / "f.py").write_text("")
    assert not problems(path=str(made / "rm"), normalize=True)
    assert not problems(path=str(made / "rm" / "model"))
    assert not problems(path=str(made / "lora"))
    assert not problems(path=str(made / "lora" / "model"))
    for label in ("happy", "HAPPY", "1"):
        assert not problems(type="classifier", path=str(made / "mood"), label=label)
    assert not problems(type="function", path=str(tmp_path / "f.py"), function="f")
    assert not problems(type="http", url="http://localhost:8000/score")
    assert not problems(type="rouge")
    assert not problems(path="someone/reward-model")


def test_models(made: Path, tmp_path: Path) -> None:
    assert "here a reward model is needed: a run of `rlhf rm`" in one(path=str(made / "sft"))
    assert "is a LlamaForCausalLM, no reward model" in one(path=str(made / "sft" / "model"))
    assert "reward.sources[0].path: no such directory" in one(path=str(made / "rn"))
    assert f"did you mean {made / 'mood'}?" in one(path=str(made / "mod"))
    write_run(tmp_path / "open", status="running")
    assert "not finished (status: running)" in one(path=str(tmp_path / "open"))
    (tmp_path / "empty").mkdir()
    assert "neither a run directory (manifest.json) nor a model" in one(path=str(tmp_path / "empty"))
    write_decoder(tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").rename(tmp_path / "pickled" / "pytorch_model.bin")
    assert "pickled weights" in one(path=str(tmp_path / "pickled"))
    write_decoder(tmp_path / "bare")
    assert "no mean and std" in one(path=str(tmp_path / "bare"), normalize=True)


def test_labels(made: Path) -> None:
    assert "no label 'hapy'; its labels are angry, happy; did you mean happy?" in one(
        path=str(made / "mood"), label="hapy"
    )
    assert "is required: " in one(path=str(made / "mood"))
    assert "gives one score and has no labels" in one(path=str(made / "rm"), label="happy")
    assert "has no label '2'" in one(path=str(made / "mood" / "model"), label="2")


def test_adapters(made: Path, tmp_path: Path) -> None:
    base = write_policy(tmp_path / "base")
    write_adapter(tmp_path / "lora", base)
    base.rename(tmp_path / "moved")
    assert "whose base is gone" in one(path=str(tmp_path / "lora"))
    (tmp_path / "lora" / "adapter_model.safetensors").unlink()
    assert "has no adapter_model.safetensors" in one(path=str(tmp_path / "lora"))
    write_run(tmp_path / "policy", "adapter", "causal_lm")
    assert "holds the adapter of a policy" in one(path=str(tmp_path / "policy"))


def test_the_others(tmp_path: Path) -> None:
    assert "reward.sources[0].path: no such file" in one(type="function", path=str(tmp_path / "f.py"), function="f")
    (tmp_path / "f.txt").write_text("")
    assert "is no Python file" in one(type="function", path=str(tmp_path / "f.txt"), function="f")
    assert "reward.sources[0].url: got 'localhost:8000'" in one(type="http", url="localhost:8000")


def test_no_torch() -> None:
    program = "import sys, rlhf_cli.config.reward_requests; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
