"""Words of a command line that are easy to get wrong: mappings, column names of all kinds, blanks around =."""

from pathlib import Path

import pytest

from rlhf_cli import api
from rlhf_cli.config.compose import compose_stage
from rlhf_cli.config.freeze import freeze, standing
from rlhf_cli.config.idle import SWITCHES
from rlhf_cli.errors import ConfigError
from rlhf_cli.schema import SftConfig, build, known_keys, to_dict
from rlhf_cli.sweep import run_sweep, split, table


@pytest.mark.parametrize(
    ("words", "columns"),
    [
        (["data.columns={prompt: Frage, response: Antwort}"], {"prompt": "Frage", "response": "Antwort"}),
        (["data.columns.prompt=Frage", "data.columns.response=Antwort"], {"prompt": "Frage", "response": "Antwort"}),
        (["data.columns.prompt=Größe"], {"prompt": "Größe"}),
        (["data.columns.prompt=My column (the first)"], {"prompt": "My column (the first)"}),
        (["data.columns.prompt=a=b {c}"], {"prompt": "a=b {c}"}),
    ],
)
def test_columns_are_named_on_the_command_line(words: list[str], columns: dict[str, str]) -> None:
    composed = compose_stage("sft", words)
    assert composed.problems == []
    assert composed.config is not None
    assert composed.config.data.columns == columns


def test_deepspeeds_json_is_merged_into_the_chosen_group() -> None:
    config = compose_stage("sft", ["deepspeed=zero3", "deepspeed.json.zero_optimization.sub_group_size=1000000"]).config
    assert config is not None
    assert config.deepspeed.json["zero_optimization"]["sub_group_size"] == 1000000
    assert config.deepspeed.zero_stage == 3


def test_blanks_around_the_sign_are_one_clear_remark() -> None:
    found = [str(p) for p in compose_stage("sft", ["optim.lr", "=", "3"]).problems]
    assert found == [
        "'optim.lr' is not of the form key=value",
        "'=' is not of the form key=value (no blanks around =)",
        "'3' is not of the form key=value",
    ]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("lora=zzz", "lora: has no option 'zzz'; allowed: none, qlora, r16"),
        ("lora=r17", "lora: has no option 'r17'; did you mean r16? allowed: none, qlora, r16"),
    ],
)
def test_an_unknown_choice_lists_the_known_ones(word: str, message: str) -> None:
    (problem,) = compose_stage("sft", [word]).problems
    assert str(problem) == message


def test_a_sweep_splits_what_has_several_values_and_leaves_the_rest_as_typed() -> None:
    fixed = ["data.row_format={Frage} {Antwort}", "data.path=[a.jsonl,b.csv]", "lora=r16"]
    runs = split(["optim.lr=1,2", *fixed, "train.seed=3,4"])
    assert runs == [
        [*fixed, "optim.lr=1", "train.seed=3"],
        [*fixed, "optim.lr=1", "train.seed=4"],
        [*fixed, "optim.lr=2", "train.seed=3"],
        [*fixed, "optim.lr=2", "train.seed=4"],
    ]
    assert split(fixed) == [fixed]


def test_columns_that_are_new_are_named_alone(tmp_path: Path) -> None:
    before = to_dict(build(SftConfig, {"model": {"path": "m"}, "data": {"path": "d"}}))
    freeze(tmp_path, before)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    after = {**before, "data": {**before["data"], "columns": {"prompt": "Frage"}}}
    with pytest.raises(ConfigError) as error:
        standing(tmp_path, after, "auto")
    assert str(error.value).splitlines()[1:] == ["  - data.columns.prompt: was None in this run, now 'Frage'"]


def test_one_mapping_where_a_list_of_them_belongs() -> None:
    (problem,) = compose_stage("score", ["data.path=a.jsonl", "reward.sources={path: runs/rm}"]).problems
    assert str(problem) == (
        "reward.sources: got one mapping; allowed: a list of them, in brackets: reward.sources=[{path: runs/rm}]"
    )


def test_a_label_may_be_a_number_without_quotes() -> None:
    composed = compose_stage("score", ["data.path=a.jsonl", "reward.sources=[{type: classifier, path: m, label: 0}]"])
    assert not composed.problems
    assert composed.config is not None
    assert composed.config.reward.sources[0].label == 0


def test_from_python_a_wrong_stage_is_told_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no stage 'merge'; stages: sft, rm, ppo, raft, merge-lora, score"):
        api.compose("merge", [])
    config = api.compose(
        "score", ["data.path=a.jsonl", "reward.sources=[{type: rouge}]", f"run_dir={tmp_path / 'run'}"]
    )
    with pytest.raises(ConfigError, match=r"`rlhf rm` takes a RmConfig, .*; got ScoreConfig"):
        api.rm(config)
    assert not (tmp_path / "run").exists()


def test_from_python_the_missing_may_be_set_on_the_config(tmp_path: Path) -> None:
    config = api.compose("merge_lora", [f"run_dir={tmp_path / 'run'}"])
    with pytest.raises(ConfigError, match=r"merge\.adapter: is required"):
        api.merge_lora(config)
    config.merge.adapter = str(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="nowhere"):
        api.merge_lora(config)
    with pytest.raises(ConfigError, match=r"^merge\.adaptor: is not an option"):
        api.compose("merge-lora", ["merge.adaptor=x"])


@pytest.mark.parametrize(
    ("words", "key", "setting"),
    [
        (["lora.r=64"], "lora.r", "lora.enabled=true (or lora=r16)"),
        (["model.arch.num_layers=2"], "model.arch.num_layers", "model.init=scratch"),
        (["model.tokenizer.vocab_size=99"], "model.tokenizer.vocab_size", "model.tokenizer.train=bpe, word or char"),
        (["model.trainable.last_layers=3"], "model.trainable.last_layers", "model.trainable.mode=last_layers"),
        (["model.trainable.patterns=[head]"], "model.trainable.patterns", "model.trainable.mode=patterns"),
        (["model.trainable.lisa_interval=3"], "model.trainable.lisa_interval", "model.trainable.mode=lisa"),
        (["optim=noam", "optim.min_lr_ratio=0.2"], "optim.min_lr_ratio", "optim.schedule=linear or cosine"),
        (["optim.warmup_ratio=0", "optim.min_warmup_steps=9"], "optim.min_warmup_steps", "optim.warmup_ratio > 0"),
        (["train.early_stopping.min_delta=1"], "train.early_stopping.min_delta", "train.early_stopping.patience > 0"),
        (["generation.prompts=[a]", "generation.num_prompts=2"], "generation.num_prompts", "generation.prompts=[]"),
        (["logging.wandb_project=x"], "logging.wandb_project", "logging.wandb=true"),
    ],
)  # fmt: skip
def test_a_typed_option_that_nothing_reads_is_refused(words: list[str], key: str, setting: str) -> None:
    (problem,) = compose_stage("sft", words).problems
    assert str(problem) == f"{key}: is read with {setting} only; set that, or drop it"


@pytest.mark.parametrize(
    "words",
    [
        ["lora=r16", "lora.r=64"],
        ["model=small_llama", "model.arch.num_layers=2", "model.tokenizer.vocab_size=99"],
        ["model.trainable.mode=lisa", "model.trainable.lisa_interval=3"],
        ["conf=alpaca_qlora", "lora=none"],  # what a recipe brings may lie idle
        ["logging.wandb=true", "logging.wandb_project=x"],
    ],
)
def test_an_option_whose_switch_is_on_is_read(words: list[str]) -> None:
    assert compose_stage("sft", words).problems == []


def test_every_switch_names_options_that_exist() -> None:
    known = known_keys(SftConfig)
    named = [option for switch in SWITCHES for option in switch.options]
    assert all(any(key.startswith(option) for key in known) for option in named)


def test_an_unknown_option_is_shown_with_its_value() -> None:
    (problem,) = compose_stage("sft", ["optim.lrr=3"]).problems
    assert str(problem) == "optim.lrr: is not an option of `rlhf sft`; did you mean optim.lr? (got 3)"


def test_a_sweep_names_the_problems_of_all_its_runs_once(tmp_path: Path) -> None:
    words = ["model.path=nowhere/a", "data.path=nowhere.jsonl", "optim.lr=1e-5,abc", f"run_dir={tmp_path / 'sweep'}"]
    with pytest.raises(ConfigError) as caught:
        run_sweep("sft", words, print)
    assert sorted(problem.key for problem in caught.value.problems) == ["data.path", "optim.lr"]
    assert not (tmp_path / "sweep").exists()


def test_the_table_of_a_sweep_has_the_figures_of_its_stage() -> None:
    rows = [
        {"run": "optim.lr=0.01", "metrics": {"loss": 0.5, "eval_accuracy": 0.75}, "exit_code": 0},
        {"run": "optim.lr=0.001", "metrics": {}, "exit_code": 1},
    ]
    head, first, second = table(rows).splitlines()
    assert head.split() == ["run", "loss", "eval_accuracy", "exit"]
    assert first.split() == ["optim.lr=0.01", "0.5000", "0.7500", "0"]
    assert second.split() == ["optim.lr=0.001", "-", "-", "1"]
