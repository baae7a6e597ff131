"""Imports go down only (docs/design.md). Read from the syntax trees, so that lazy imports count too."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "rlhf_cli"

# Each layer may import the ones it names, and itself. Both columns share the first few.
BOTH = {"errors", "schema", "rundir", "files", "jobfiles"}
TRAINING = BOTH | {"ops", "data", "models", "runtime", "loop", "run"}
ALLOWED = {
    "__init__": set(),
    "errors": set(),
    "schema": {"errors"},
    "rundir": {"errors", "files"},
    "files": {"errors"},
    "jobfiles": {"errors"},
    # front: never imports torch
    "config": BOTH,
    "launch": BOTH,
    "job": BOTH | {"config", "launch"},
    "sweep": BOTH | {"config", "job"},
    "help": BOTH | {"config", "__init__"},
    "report": BOTH | {"__init__"},
    "cli": BOTH | {"config", "help", "job", "sweep", "report", "__init__"},
    "api": BOTH | {"config", "job", "report"},
    "__main__": {"cli"},
    # train: what runs in a rank
    "ops": BOTH,
    "data": BOTH | {"ops"},
    "models": BOTH | {"ops"},
    "runtime": BOTH | {"ops", "__init__"},
    "estimate": BOTH | {"ops", "data", "models"},
    "judgement": BOTH | {"ops", "data"},
    "rollout": BOTH | {"ops", "models"},
    "lm_loss": TRAINING,
    "reward": BOTH | {"ops", "data", "models", "runtime"},
    "loop": BOTH | {"ops", "runtime"},
    "run": BOTH | {"runtime", "loop"},
    "assemble": TRAINING,
    "training": TRAINING | {"assemble", "estimate"},
    "lm_objective": TRAINING | {"assemble", "lm_loss", "rollout"},
    "align": TRAINING | {"assemble", "estimate", "lm_loss", "rollout", "reward"},
    "ppo": TRAINING | {"assemble", "estimate", "rollout", "reward", "align"},
    "raft": TRAINING | {"assemble", "estimate", "rollout", "reward", "align"},
    "comparison_objective": TRAINING | {"assemble", "judgement"},
    "stages": TRAINING
    | {"assemble", "training", "lm_objective", "comparison_objective", "reward", "align"}
    | {"ppo", "raft"},
    "worker": BOTH | {"stages", "runtime"},
}
FRONT = BOTH | {"config", "launch", "job", "sweep", "help", "report", "cli", "api", "__main__", "__init__"}
HEAVY = {"torch", "transformers", "deepspeed", "datasets", "peft", "accelerate", "tokenizers", "numpy"}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def layer(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found


def our_layers(path: Path) -> set[str]:
    named: set[str] = set()
    for name in imports(path):
        parts = name.split(".")
        if parts[0] != "rlhf_cli":
            continue
        if len(parts) == 1:
            continue
        is_layer = (PACKAGE / parts[1]).is_dir() or (PACKAGE / f"{parts[1]}.py").is_file()
        named.add(parts[1] if is_layer else "__init__")
    return named


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down_only(path: Path) -> None:
    mine = layer(path)
    assert mine in ALLOWED, f"{path.name} belongs to no layer; say where it stands in tests/test_layers.py"
    upward = our_layers(path) - ALLOWED[mine] - {mine}
    assert not upward, f"{path.relative_to(PACKAGE)} imports {sorted(upward)}"


@pytest.mark.parametrize("path", [p for p in modules() if layer(p) in FRONT], ids=lambda p: str(p.relative_to(PACKAGE)))
def test_the_front_imports_nothing_heavy(path: Path) -> None:
    assert not {name.split(".")[0] for name in imports(path)} & HEAVY


def test_no_stage_imports_another() -> None:
    for path in (PACKAGE / "stages").glob("*.py"):
        others = {name for name in imports(path) if name.startswith("rlhf_cli.stages.")}
        assert not others, f"{path.name} imports {others}"


def test_only_the_engine_files_import_deepspeed() -> None:
    users = {p.name for p in modules() if any(name.split(".")[0] == "deepspeed" for name in imports(p))}
    assert users == {"engine.py", "engine_fragments.py"}


def test_composing_a_config_loads_no_torch() -> None:
    program = (
        "import sys; from rlhf_cli.config.compose import compose_stage; compose_stage('sft', ['conf=shakespeare_bpe']);"
        "import rlhf_cli.cli, rlhf_cli.job, rlhf_cli.sweep; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
