"""Composition and checks of configs: what wins, what is refused, and that all problems come together."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf_cli.config.compose import Composed, compose_stage
from rlhf_cli.config.freeze import default_run_dir, freeze, lock, standing
from rlhf_cli.config.requests import check_request
from rlhf_cli.config.tree import conf_dir, options, recipes
from rlhf_cli.errors import ConfigError, Problem
from rlhf_cli.schema import STAGES, SftConfig, build, known_keys, to_dict
from rlhf_cli.schema.stages import grad_accum_steps


def sft(*words: str) -> Composed:
    return compose_stage("sft", list(words))


def messages(composed: Composed) -> dict[str, str]:
    return {p.key: p.message for p in composed.problems}


# --- what wins


def test_command_line_wins_over_recipe_over_group_over_schema() -> None:
    assert sft("conf=shakespeare_bpe").config.optim.lr == 2e-3  # the recipe; group adamw says 2e-5
    assert sft("conf=shakespeare_bpe", "optim.lr=1e-5").config.optim.lr == 1e-5
    assert sft().config.optim.lr == 2e-5
    assert sft("optim=llama2").config.optim.betas == [0.9, 0.95]
    assert sft("conf=shakespeare_bpe", "optim=llama2").config.optim.lr == 2e-5
    assert sft("conf=shakespeare_bpe", "optim=llama2", "optim.lr=1e-5").config.optim.lr == 1e-5


def test_groups_are_chosen_by_one_word() -> None:
    assert sft("deepspeed=zero3").config.deepspeed.zero_stage == 3
    assert sft("conf=hh_rlhf_llama_7b").config.deepspeed.zero_stage == 3
    chosen = sft("conf=hh_rlhf_llama_7b", "deepspeed=zero2_offload").config.deepspeed
    assert chosen.zero_stage == 2
    assert chosen.json["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert "stage3_prefetch_bucket_size" not in chosen.json["zero_optimization"]
    assert sft("lora=qlora").config.model.quantization == "nf4"


# Recipes with values in most groups.
FULL = {"sft": "hh_rlhf_llama_7b", "rm": "instructgpt_kwise", "ppo": "hh_rlhf_llama_7b", "raft": "shakespeare_happy"}


@pytest.mark.parametrize(("stage", "group"), [(stage, group) for stage in FULL for group in STAGES[stage].groups])
def test_a_group_on_the_command_line_wins_over_the_values_of_a_recipe(stage: str, group: str) -> None:
    recipe = FULL[stage]
    before = compose_stage(stage, [f"conf={recipe}"]).values
    for option in options(group, STAGES[stage]):
        text = (conf_dir() / group / f"{option}.yaml").read_text()
        wanted = yaml.safe_load(text) if "@package _global_" in text else {group: yaml.safe_load(text)}
        found = compose_stage(stage, [f"conf={recipe}", f"{group}={option}"]).values
        assert_within(wanted, found, option)
        touched = {*wanted, "model"} if group == "lora" else {*wanted}  # qlora sets options of the model too
        assert all(found[name] == before[name] for name in before if name not in touched)


def assert_within(wanted: Any, found: Any, where: str) -> None:
    if isinstance(wanted, dict):
        for key, value in wanted.items():
            assert_within(value, found[key], f"{where}.{key}")
    elif isinstance(wanted, list) and len(wanted) == len(found):
        for i, value in enumerate(wanted):
            assert_within(value, found[i], f"{where}[{i}]")
    else:
        assert wanted == found, where


def test_a_group_leaves_other_values_of_the_section_to_the_recipe(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("optim: {lr: 3.0e-5, max_grad_norm: 0.5}\nlora: {enabled: false}\ndeepspeed: {json: {seed: 3}}\n")
    config = compose_stage("sft", [f"conf={own}", "optim=noam", "lora=r16", "deepspeed=zero3", "optim.eps=1e-6"]).config
    assert config is not None
    assert (config.optim.lr, config.optim.eps, config.optim.max_grad_norm) == (1e-3, 1e-6, 0.5)
    assert config.lora.enabled
    assert (config.deepspeed.zero_stage, config.deepspeed.json["seed"]) == (3, 3)


def test_a_users_file_may_name_the_shipped_groups(tmp_path: Path) -> None:
    path = tmp_path / "sft.yaml"  # the stem of a shipped config, which must not hide this file
    path.write_text("defaults:\n  - deepspeed: zero1\n  - override /optim: noam\noptim:\n  lr: 3.0e-4\n")
    config = sft(f"conf={path}", "train.seed=7").config
    assert (config.deepspeed.zero_stage, config.optim.schedule, config.optim.lr) == (1, "inverse_sqrt", 3e-4)
    assert config.train.seed == 7


def test_the_config_of_a_run_repeats_it_elsewhere(tmp_path: Path) -> None:
    first = sft("conf=shakespeare_bpe", "deepspeed=zero3", "data.path=x.txt", "data.columns.prompt=question")
    frozen = freeze(tmp_path / "run", first.values | {"run_dir": str(tmp_path / "run")})
    again = sft(f"conf={frozen}")
    assert again.values == first.values
    assert again.config.run_dir is None
    changed = sft(f"conf={frozen}", "deepspeed=zero1", "optim.lr=1e-6").config
    assert changed.deepspeed.json == {"zero_optimization": {"stage": 1}}  # replaced, nothing left of zero3
    assert changed.optim.lr == 1e-6
    assert sft(f"conf={tmp_path / 'run'}").values == first.values


@pytest.mark.parametrize("stage", STAGES)
def test_every_shipped_yaml_composes(stage: str) -> None:
    for recipe in recipes(STAGES[stage]):
        composed = compose_stage(stage, [f"conf={recipe.name}", "data.path=x.jsonl", "model.path=m"])
        left_to_the_user = ("model.path", "path", "reward.sources", "ppo.ptx.data.path")
        fatal = [p for p in composed.problems + composed.unmet if p.key not in left_to_the_user]
        assert not fatal, recipe.name
    for group in STAGES[stage].groups:
        for option in options(group, STAGES[stage]):
            assert not compose_stage(stage, [f"{group}={option}"]).problems, f"{group}={option}"
    shipped = {p.relative_to(conf_dir()).parts[0] for p in conf_dir().rglob("*.yaml")}
    assert shipped == {
        *(g for s in STAGES.values() for g in s.groups),
        "recipe",
        *(f"{s.key}.yaml" for s in STAGES.values()),
    }


@pytest.mark.parametrize("stage", STAGES)
def test_every_recipe_opens_with_purpose_hardware_command_and_an_override(stage: str) -> None:
    for recipe in recipes(STAGES[stage]):
        head = [line for line in recipe.path.read_text().splitlines() if line.startswith("#")]
        assert head[1].startswith("# Hardware: "), recipe.name
        assert any(line.startswith(f"# Run:      rlhf {stage} conf={recipe.name}") for line in head), recipe.name
        assert any(line.startswith(f"# Override: rlhf {stage} conf={recipe.name}") for line in head), recipe.name


# --- what is refused


def test_all_problems_are_reported_together_with_the_nearest_key() -> None:
    found = messages(sft("+optim.lrr=1", "optim.lr=fast", "deepspeed=zero4", "train.seed=1,2", "datta.path=x"))
    assert "did you mean optim.lr?" in found["optim.lrr"]
    assert found["optim.lr"] == "got 'fast'; allowed: number"
    assert "did you mean zero3?" in found["deepspeed"] or "allowed: zero0" in found["deepspeed"]
    assert "-m for a sweep" in found["train.seed"]
    assert "did you mean data.path?" in found["datta.path"]


@pytest.mark.parametrize(
    ("word", "part"),
    [
        ("train.epochs=0", "> 0"),
        ("train.max_steps=1.5", "integer or null"),
        ("optim.schedule=cosin", "one of constant, linear, cosine, inverse_sqrt"),
        ("optim.betas=0.9", "a list of numbers"),
        ("model=3", "allowed: pretrained"),
        ("data=hhh", "did you mean hh?"),
        ("optim.betas=[0.9,1.0]", "< 1"),
        ("lora.enabled=1", "true or false"),
    ],
)
def test_wrong_values_say_what_is_allowed(word: str, part: str) -> None:
    (problem,) = sft(word).problems
    assert problem.key == word.split("=")[0]
    assert part in problem.message


def test_a_whole_float_is_an_integer_and_text_needs_no_quotes() -> None:
    assert sft("train.max_steps=1e3").config.train.max_steps == 1000
    assert sft("data.row_format={prompt} -> {label}").config.data.row_format == "{prompt} -> {label}"
    assert sft("data.path=a=b.txt").config.data.path == "a=b.txt"


def test_problems_of_a_file_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text("optim:\n  lrate: 1\ntrain:\n  epochs: many\n")
    found = messages(sft(f"conf={path}"))
    assert found["optim.lrate"].endswith(f"(in {path})")
    assert found["train.epochs"].endswith(f"(in {path})")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("a: [1\n", "not valid YAML"),
        ("- 1\n", "must be a mapping"),
        ("defaults: [{optim: sgd}]\n", "no option 'sgd'"),
        ("defaults: [{ppo: x}]\n", "not a config group"),
        ("stage: rm\n", "a config of `rlhf rm`"),
        ("optim: {lr: '${nowhere.at_all}'}\n", "cannot be composed"),
    ],
)
def test_a_broken_file_is_one_clear_message(tmp_path: Path, text: str, part: str) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"own\.yaml") as error:
        sft(f"conf={path}")
    assert part in str(error.value)


def test_an_unknown_recipe_lists_the_shipped_ones() -> None:
    with pytest.raises(ConfigError, match="did you mean shakespeare_bpe") as error:
        sft("conf=shakespeare_bp")
    assert "hh_rlhf_llama_7b" in str(error.value)


def test_what_does_not_fit_hides_no_other_problem() -> None:
    composed = sft("train.epochs=many", "optim.lrr=1", "lora=r16", "model.init=scratch", "model.path=1")
    assert {p.key for p in composed.problems} == {"train.epochs", "optim.lrr", "model.path"}
    assert {"lora.enabled", "data.path"} <= {p.key for p in composed.unmet}
    assert "model.path" not in {p.key for p in composed.unmet}, "once is enough"


def test_required_values_are_asked_for_only_when_a_run_starts() -> None:
    composed = sft()
    assert not composed.problems
    assert {p.key for p in composed.unmet} == {"model.path", "data.path"}


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["model.init=scratch", "model.path=x"], "model.path"),
        (["model.tokenizer.train=bpe"], "model.tokenizer.train"),
        (["lora=r16", "model.trainable.mode=lisa"], "model.trainable.mode"),
        (["model.quantization=nf4"], "model.quantization"),
        (["data.eval_path=x", "data.validation_split_percentage=5"], "data.eval_path"),
        (["train.early_stopping.patience=2"], "train.early_stopping.patience"),
        (["launch.launcher=deepspeed"], "launch.hostfile"),
        (["deepspeed.json.fp16.enabled=true"], "deepspeed.json.fp16"),
        (["data.format=labelled"], "data.format"),
        (["model=small_llama", "model.arch.hidden_size=100", "model.arch.num_heads=3"], "model.arch.num_heads"),
    ],
)
def test_impossible_combinations(words: list[str], key: str) -> None:
    assert key in {p.key for p in sft(*words).unmet}


def test_batch_arithmetic_states_the_three_numbers() -> None:
    assert grad_accum_steps(64, 8, 2) == 4
    problem = grad_accum_steps(60, 8, 2)
    assert isinstance(problem, Problem)
    assert all(number in problem.message for number in ("60", "8 x 2 = 16", "48 or 64"))


# --- files


def test_files_are_checked_before_the_start(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "plays.txt").write_text("To be")
    (tmp_path / "nothing").mkdir()
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "config.json").write_text("{}")
    (tmp_path / "pickled" / "pytorch_model.bin").touch()

    def found(**data: object) -> str:
        model = data.pop("model", "org/name")
        config = build(SftConfig, {"model": {"path": str(model)}, "data": {"path": str(tmp_path / "plays.txt")} | data})
        return "\n".join(str(p) for p in check_request(config, 1, has_gpu=False, weights_needed=True))

    assert not found()
    assert "is empty" in found(path=str(tmp_path / "empty.jsonl"))
    assert f"did you mean {tmp_path / 'plays.txt'}" in found(path=str(tmp_path / "play.txt"))
    assert "no file matches" in found(path=str(tmp_path / "*.csv"))
    assert "has no data file" in found(path=str(tmp_path / "nothing"))
    assert "neither a run directory" in found(model=tmp_path / "nothing")
    assert "pickled weights" in found(model=tmp_path / "pickled")
    assert "no such directory" in found(model=tmp_path / "missing" / "model")


@pytest.mark.parametrize(
    ("manifest", "part"),
    [
        ('{"stage": "sft", "status": "running"}', "not finished (status: running)"),
        ('{"stage": "rm", "status": "complete", "output": {"kind": "reward"}}', "a reward model"),
        ('{"stage": "sft", "status": "complete", "output": {"kind": "adapter"}}', "rlhf merge-lora"),
        ("{broken", "is damaged"),
    ],
)
def test_a_run_directory_must_hold_a_finished_policy(tmp_path: Path, manifest: str, part: str) -> None:
    (tmp_path / "manifest.json").write_text(manifest)
    (tmp_path / "a.txt").write_text("x")
    config = build(SftConfig, {"model": {"path": str(tmp_path)}, "data": {"path": str(tmp_path / "a.txt")}})
    (problem,) = check_request(config, 1, has_gpu=False, weights_needed=True)
    assert part in problem.message


# --- run directories


def test_standing_of_a_run_directory(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    values = to_dict(build(SftConfig, {"model": {"path": "m"}, "data": {"path": "d"}}))
    assert standing(run_dir, values, "auto").state == "new"
    freeze(run_dir, values)
    changed = values | {"run_dir": "elsewhere", "train": values["train"] | {"seed": 9}}
    assert standing(run_dir, changed, "auto").state == "new", (
        "no step was reached, so a corrected config may take its place"
    )
    (run_dir / "metrics.jsonl").write_text('{"step": 1}\n')
    assert standing(run_dir, values, "auto").state == "unfinished"
    (run_dir / "manifest.json").write_text('{"status": "complete"}')
    assert standing(run_dir, values, "auto").state == "finished"
    with pytest.raises(ConfigError, match="already holds a run"):
        standing(run_dir, values, "never")
    other = yaml.safe_load(yaml.safe_dump(values))
    other["deepspeed"]["json"] = {"zero_optimization": {"stage": 3}}
    other["train"]["micro_batch_size"] = 1
    other["launch"]["num_processes"] = 4
    assert standing(run_dir, other, "auto").state == "finished"
    other["train"]["epochs"] = 2.0
    with pytest.raises(ConfigError, match=r"train\.epochs: cannot grow: .* kept no checkpoint"):
        standing(run_dir, other, "auto")
    (run_dir / "checkpoints" / "step_00000001").mkdir(parents=True)
    grown = standing(run_dir, other, "auto")
    assert (grown.state, grown.notes) == ("unfinished", ["train.epochs grows from 1.0 to 2.0"])
    other["optim"]["lr"] = 1.0
    other["train"]["seed"] = 5
    with pytest.raises(ConfigError) as error:
        standing(run_dir, other, "auto")
    assert "optim.lr: was 2e-05 in this run, now 1.0" in str(error.value)
    assert "train.seed: was 0 in this run, now 5" in str(error.value)


def test_a_foreign_directory_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ConfigError, match=r"not empty \(thesis.tex"):
        standing(tmp_path, {}, "auto")


def test_two_runs_cannot_share_a_directory(tmp_path: Path) -> None:
    with lock(tmp_path), pytest.raises(ConfigError, match="in use by another rlhf process"):
        lock(tmp_path)
    lock(tmp_path).close()


def test_default_run_dir_has_stage_recipe_and_time() -> None:
    assert default_run_dir("sft", "hh").match("runs/sft/hh-????????-??????")


def test_every_option_says_what_it_means() -> None:
    for stage in STAGES.values():
        for key, field in known_keys(stage.config).items():
            assert len(field.metadata["help"]) > 4, key
