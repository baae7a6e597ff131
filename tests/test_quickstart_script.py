"""scripts/quickstart.sh: which commands it runs, in which order, with whose overrides."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path

from rlhf_cli.config.compose import compose_stage

ROOT = Path(__file__).parent.parent
# Writes down how it was called.
RECORDER = '#!/bin/bash\nprintf \'%s\\0\' "$(basename "$0")" "$@" >> "$CALLS"; printf \'\\n\\0\' >> "$CALLS"\n'


def recorded(folder: Path, *words: str, **variables: str) -> tuple[list[list[str]], str]:
    """The commands that the script runs in an environment where the package is installed, and what it prints."""
    (folder / "bin").mkdir()
    for tool in ("rlhf", "python"):
        (folder / "bin" / tool).write_text(RECORDER)
        (folder / "bin" / tool).chmod(0o755)
    installed = hashlib.sha256((ROOT / "pyproject.toml").read_bytes() + f"{ROOT}\n".encode()).hexdigest()
    (folder / ".rlhf-installed").write_text(f"{installed} base\n")
    env = {"PATH": f"{folder}/bin:{os.environ['PATH']}", "VIRTUAL_ENV": str(folder), "CALLS": str(folder / "calls")}
    done = subprocess.run(
        ["bash", str(ROOT / "scripts" / "quickstart.sh"), *words],
        env=env | variables, cwd=folder, capture_output=True, text=True, check=True,
    )  # fmt: skip
    calls = (folder / "calls").read_text().split("\n\0")[:-1]
    return [call.split("\0")[:-1] for call in calls], done.stdout


def test_the_chain_of_commands(tmp_path: Path) -> None:
    runs = str(tmp_path / "r")
    calls, shown = recorded(tmp_path, "train.seed=2", RUNS=runs, PPO_ARGS="ppo.kl_coef=0.2 ppo.num_iterations=3")
    stages = [call[1] for call in calls]
    assert stages == [
        "sft", "rm", "merge-lora", "ppo", "raft", "score", "report", "scripts/quickstart_table.py"
    ]  # fmt: skip
    for tool, stage, *overrides in calls[:6]:
        assert tool == "rlhf"
        composed = compose_stage(stage, overrides)
        assert composed.problems == composed.unmet == [], stage
        assert composed.values["run_dir"].startswith(f"{runs}/")
        if stage in ("sft", "rm", "ppo", "raft"):
            assert composed.config.train.seed == 2, stage
    ppo, raft = (compose_stage(call[1], call[2:]).config for call in calls[3:5])
    assert (ppo.ppo.kl_coef, ppo.ppo.num_iterations) == (0.2, 3)
    assert raft.raft.kl_coef == 0.0
    assert {ppo.model.path, raft.model.path} == {f"{runs}/sft"}
    assert {ppo.reward.sources[0].path, raft.reward.sources[0].path} == {f"{runs}/rm_merged"}
    assert calls[6] == ["rlhf", "report", runs, f"out={runs}/report.html"]
    assert calls[7] == ["python", "scripts/quickstart_table.py", runs]
    assert f"$ rlhf sft conf=quickstart run_dir={runs}/sft train.seed=2" in shown
    assert "installing" not in shown
