"""manifest.json at the start of a run: what it was made from must still be that."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.errors import CheckpointError, ModelError
from rlhf_cli.files import digest_file, digest_tree, write_json
from rlhf_cli.rundir import read_manifest
from rlhf_cli.runtime import manifest
from rlhf_cli.schema import PpoConfig, ScoreConfig, to_dict
from tests.reward_models import write_run


def config(base: Path, lora: bool, trainable: str) -> dict[str, Any]:
    return {"model": {"path": str(base), "trainable": {"mode": trainable}}, "lora": {"enabled": lora}}


@pytest.mark.parametrize(
    ("lora", "trainable", "needed"), [(True, "all", True), (False, "last_layers", True), (False, "all", False)]
)
def test_a_run_does_not_go_on_over_another_base(tmp_path: Path, lora: bool, trainable: str, needed: bool) -> None:
    base, run_dir = tmp_path / "base", tmp_path / "run"
    base.mkdir()
    (base / "model.safetensors").write_bytes(b"one")
    begin = lambda: manifest.begin(run_dir, "rm", config(base, lora, trainable), 1)
    begun = begin()["base_digest"]
    assert (begun is not None) == needed
    (base / "model.safetensors").write_bytes(b"two")
    again = begin()["base_digest"]  # nothing was trained yet, so another base is as good
    assert (again != begun) == needed
    (run_dir / "checkpoints" / "step_00000001").mkdir(parents=True)
    assert begin()["base_digest"] == again
    (base / "model.safetensors").write_bytes(b"three")
    if not needed:  # a checkpoint has all weights that are trained, and these are all
        begin()
        return
    with pytest.raises(CheckpointError, match=f"the model in {base} has changed since .* was started from it"):
        begin()


def model_at(folder: Path, run: bool = False, **of_run: Any) -> Path:
    """Something that lies where a model does; run: as the result of a run."""
    place = folder / "model" if run else folder
    place.mkdir(parents=True)
    (place / "model.safetensors").write_bytes(folder.name.encode())
    if run:
        write_run(folder, **of_run)
    return folder


def ppo_config(policy: Path, sources: list[dict[str, Any]], **ppo: Any) -> dict[str, Any]:
    values = to_dict(PpoConfig())
    values["model"]["path"], values["reward"]["sources"] = str(policy), sources
    values["ppo"] |= ppo
    return values


def test_reference_and_critic_are_in_the_lineage(tmp_path: Path) -> None:
    sft, ref, critic = (
        model_at(tmp_path / name, run=True, kind="policy", task="causal_lm") for name in ("sft", "ref", "critic")
    )
    reward = model_at(tmp_path / "rm", run=True)
    values = ppo_config(sft, [{"path": str(reward)}, {"path": None}], ref=str(ref), critic=str(critic))
    begun = manifest.begin(tmp_path / "run", "ppo", values, 1)
    assert begun["parents"] == [
        {"role": role, "run_dir": str(path), "digest": digest_tree(path / "model")}
        for role, path in (("policy", sft), ("reward", reward), ("reference", ref), ("critic", critic))
    ]
    assert begun["inputs"] == {}
    assert begun["base_digest"] == digest_tree(sft / "model")  # the reference is read from there again
    for word in ("auto", "reward", "policy"):
        (tmp_path / word).mkdir()  # no paths, even where such a directory is
        assert len(manifest.parents(ppo_config(sft, [], critic=word))) == 1


@pytest.mark.parametrize("changed", ["policy", "rm", "reward.py", "ref", "critic"])
def test_plain_models_and_files_must_stay_what_they_were(tmp_path: Path, changed: str) -> None:
    policy, rm, ref, critic = (model_at(tmp_path / name) for name in ("policy", "rm", "ref", "critic"))
    code = tmp_path / "reward.py"
    code.write_text("one")
    sources = [{"path": str(rm)}, {"path": str(code)}, {"path": "some/hub_id"}]
    values = ppo_config(policy, sources, ref=str(ref), critic=str(critic))
    run_dir = tmp_path / "run"
    begun = manifest.begin(run_dir, "ppo", values, 1)
    assert begun["inputs"] == {
        **{str(path): digest_tree(path) for path in (critic, ref, rm)}, str(code): digest_file(code),
    }  # fmt: skip
    assert begun["base_digest"] == digest_tree(policy)
    file = tmp_path / changed if changed.endswith(".py") else tmp_path / changed / "model.safetensors"
    (run_dir / "checkpoints" / "step_00000001").mkdir(parents=True)
    manifest.begin(run_dir, "ppo", values, 1)
    stored = file.read_bytes()
    file.write_bytes(b"other")
    before = read_manifest(run_dir)
    with pytest.raises(CheckpointError, match=f"{tmp_path / changed} has changed since {run_dir} was started from it"):
        manifest.begin(run_dir, "ppo", values, 1)
    assert read_manifest(run_dir) == before  # and so the next start is refused, too
    file.write_bytes(stored)
    manifest.begin(run_dir, "ppo", values, 1)


def test_a_manifest_without_inputs_is_of_an_older_version(tmp_path: Path) -> None:
    values = ppo_config(model_at(tmp_path / "policy"), [{"path": str(model_at(tmp_path / "rm"))}])
    run_dir = tmp_path / "run"
    old = manifest.begin(run_dir, "ppo", values, 1)
    write_json(run_dir / "manifest.json", {name: value for name, value in old.items() if name != "inputs"})
    (run_dir / "checkpoints" / "step_00000001").mkdir(parents=True)
    assert manifest.begin(run_dir, "ppo", values, 1)["inputs"] == old["inputs"]


def test_scoring_looks_after_its_sources_itself(tmp_path: Path) -> None:
    values = to_dict(ScoreConfig())
    values["reward"]["sources"] = [{"path": str(model_at(tmp_path / "rm"))}]
    assert manifest.begin(tmp_path / "run", "score", values, 1)["inputs"] == {}


@pytest.mark.parametrize("content", ["{", "[]", '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}"])
def test_a_damaged_manifest_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ModelError, match=r"manifest\.json is damaged \("):
        read_manifest(tmp_path)


def test_the_commit_is_that_of_this_checkout_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "empty"], check=True)
    for folder, is_ours in ((tmp_path / "rlhf_cli", True), (tmp_path / ".venv" / "lib" / "rlhf_cli", False)):
        monkeypatch.setattr(manifest, "__file__", str(folder / "runtime" / "manifest.py"))
        folder.mkdir(parents=True)
        assert (manifest.git_commit() is not None) == is_ours
