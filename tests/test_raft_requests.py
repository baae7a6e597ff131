"""What is wrong with a raft request is told before anything is loaded: each refusal by its key and its words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.config.freeze import MAY_DIFFER, MAY_GROW
from rlhf_cli.config.requests import check_request
from rlhf_cli.errors import ConfigError
from rlhf_cli.schema import RaftConfig, build, known_keys
from tests.data_tokenizers import byte_bpe
from tests.reward_models import write_adapter, write_decoder, write_policy, write_run

HELD_OUT = {"data.validation_split_percentage": 10}
LORA = {"lora.enabled": True}
HYDRA = {"raft.sharing": "hydra"} | LORA


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """sft, other: policies; foreign: one with other tokens; rm: a reward model; lora: a reward adapter on sft."""
    root = tmp_path_factory.mktemp("made")
    for name in ("sft", "other", "foreign"):
        write_policy(root / name / "model")
        write_run(root / name, "policy", "causal_lm", stage="sft")
    byte_bpe(330).save_pretrained(root / "foreign" / "model")
    write_decoder(root / "rm" / "model")
    write_run(root / "rm", reward={"mean": 0.0, "std": 1.0})
    write_adapter(root / "lora" / "model", root / "sft" / "model")
    write_run(root / "lora", "adapter")
    write_adapter(root / "elsewhere" / "model", root / "other" / "model")
    write_run(root / "elsewhere", "adapter")
    (root / "p.jsonl").write_text('{"prompt": "a"}\n')
    (root / "plain.txt").write_text("a b c\n")
    return root


def problems(made: Path, options: dict[str, Any], ranks: int = 1, gpu: bool = True) -> list[str]:
    """options: dotted keys; names of what is in `made` become paths. Raises ConfigError for what the schema refuses."""
    given = {
        "model.path": "sft", "data.path": "p.jsonl", "data.max_prompt_length": 30, "generation.max_new_tokens": 20,
        "reward.sources": [{"path": "rm"}],
    } | options  # fmt: skip
    at = lambda value: str(made / value) if isinstance(value, str) and (made / value).exists() else value
    values: dict[str, Any] = {"stage": "raft"}
    for key, value in given.items():
        *sections, leaf = key.split(".")
        place = values
        for section in sections:
            place = place.setdefault(section, {})
        sources = key == "reward.sources"
        place[leaf] = [{name: at(v) for name, v in source.items()} for source in value] if sources else at(value)
    config = build(RaftConfig, values)
    return [str(problem).replace(f"{made}/", "") for problem in check_request(config, ranks, gpu, True)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"raft.ref": "other", "data.eval_path": "p.jsonl", "eval.tax_path": "plain.txt", "eval.temperature": 0},
        {"reward.sources": []},  # by the policy's own log-probability
        {"reward.sources": [], "reward.rules": [{"pattern": "#"}], "raft.kl_coef": 0.1},
        {"reward.sources": [{"path": "rm"}, {"path": "lora", "weight": 0, "name": "gold"}]},
        {"reward.sources": [{"path": "lora"}]} | HYDRA,
        {"reward.sources": []} | HYDRA,
        {"reward.normalize": True, "reward.clip": 5},
        {"reward.rules": [{"pattern": "#"}, {"min_tokens": 5, "action": "score", "score": -2}]},
        {"raft.alarms.action": "stop", "raft.result": "last"} | HELD_OUT,
        {"raft.strategy": "top", "raft.soft_temperature": 0.5, "raft.optimizer": "continue"},
        {"generation.max_new_tokens": 994},  # 30 + 994 = 1024 positions
    ],
)
def test_what_is_fine(made: Path, options: dict[str, Any]) -> None:
    assert problems(made, options) == []


@pytest.mark.parametrize("top_fraction", [1, 0.5, 0.125, 1 / 3, 0.333333, 0.142857, 0.076923, 0.01])
def test_a_share_that_is_one_of_a_whole_number(made: Path, top_fraction: float) -> None:
    assert problems(made, {"raft.top_fraction": top_fraction}) == []


# Found in the config alone, before a file is looked at.
@pytest.mark.parametrize(
    ("options", "key", "message"),
    [
        # 1 / 0.3 = 3.33; 1/3 and 1/4 are the shares next to it
        ({"raft.top_fraction": 0.3}, "raft.top_fraction",
         "1 / 0.3 = 3.333333 responses are no whole number; allowed: 1/K, e.g. 0.3333333333 (K = 3) or 0.25 (K = 4)"),
        ({"raft.top_fraction": 0.3333}, "raft.top_fraction", "1 / 0.3333 = 3.0003 responses are no whole number"),
        ({"raft.top_fraction": 0.7}, "raft.top_fraction", "e.g. 1 (K = 1) or 0.5 (K = 2)"),
        ({"raft.strategy": "global"}, "raft.strategy", "local, top"),
        ({"raft.soft_temperature": 0}, "raft.soft_temperature", "> 0"),
        ({"lora.dropout": 0.1} | LORA, "lora.dropout", "must be 0: a policy writes and learns without dropout"),
        ({"generation.temperature": 0}, "generation.temperature", "must be > 0"),
        ({"generation.min_new_tokens": 21}, "generation.min_new_tokens", "21 is more than the shortest limit, 20"),
        ({"model.trainable.mode": "lisa"}, "model.trainable.mode", "use all, last_layers or patterns"),
        ({"raft.alarms.action": "stop"}, "raft.alarms.action", "hold prompts out"),
        ({"raft.alarms.action": "stop", "reward.sources": []} | HELD_OUT, "raft.alarms.action", "none is best"),
        ({"raft.alarms.action": "stop", "train.eval_every": 0} | HELD_OUT, "raft.alarms.action",
         "set train.eval_every"),
        ({"raft.result": "last"}, "raft.result", "data.validation_split_percentage or data.eval_path, only; set that"),
        ({"train.eval_every": 2}, "train.eval_every", "or eval.tax_path, only; set that, or leave it at 1"),
        ({"eval.temperature": 0.5}, "eval.temperature", "only; set that, or leave it at 0.3"),
        ({"eval.num_prompts": 8}, "eval.num_prompts", "only; set that, or leave it at 64"),
        ({"eval.tax_rows": 8}, "eval.tax_rows", "is read with eval.tax_path only"),
        ({"raft.sharing": "hydra"}, "raft.sharing", "hydra trains adapters on one frozen base; set lora.enabled=true"),
        ({"raft.ref": "other"} | HYDRA, "raft.ref", "with raft.sharing=hydra the reference is the base itself"),
        ({"reward.sources": [], "reward.normalize": True}, "reward.normalize",
         "is read with reward.sources only; set that, or leave it at false"),
        ({"reward.sources": [], "reward.clip": 5}, "reward.clip", "is read with reward.sources only"),
        ({"reward.sources": [], "reward.batch_size": 4}, "reward.batch_size", "only; set that, or leave it at 16"),
        ({"reward.sources": [{"path": "rm", "weight": 0}]}, "reward.sources", "no response is better"),
        ({"reward.normalize": True, "reward.moments": "running"}, "reward.moments", "leave it at manifest"),
        ({"reward.rules": [{"pattern": "#", "score": -2}]}, "reward.rules[0].score",
         "is read with action: score only; set that, or leave it at -1.0"),
        ({"reward.rules": [{}]}, "reward.rules[0].pattern", "name one of pattern, repeat, min_tokens"),
    ],
)  # fmt: skip
def test_what_the_config_rules_out(made: Path, options: dict[str, Any], key: str, message: str) -> None:
    with pytest.raises(ConfigError) as told:
        problems(made, options)
    (problem,) = told.value.problems
    assert problem.key == key
    assert message in problem.message


# Found in the files that the config names, and in the number of ranks.
@pytest.mark.parametrize(
    ("options", "ranks", "message"),
    [
        ({}, 3, "train.global_batch_size: 64 is not a multiple of train.micro_batch_size x number of ranks = 8 x 3 ="
                " 24; allowed: 48 or 72, or another train.micro_batch_size"),
        ({"model.path": "rm"}, 1, "model.path: rm holds a reward model, here a policy is needed: a run of `rlhf sft`"),
        ({"model.path": "runs/nowhere"}, 1, "model.path: no such directory: runs/nowhere"),
        ({"data.path": "q.jsonl"}, 1, "data.path: no such file or directory: q.jsonl"),
        ({"data.eval_path": "q.jsonl"}, 1, "data.eval_path: no such file or directory: q.jsonl"),
        ({"eval.tax_path": "q.txt"}, 1, "eval.tax_path: no such file or directory: q.txt"),
        ({"data.path": "plain.txt", "data.prompt_tokens": 31}, 1, "data.prompt_tokens: 31 is more than"),
        ({"generation.max_new_tokens": 995}, 1, "30 + 995 = 1025 is more than the 1024 positions of sft; lower one"),
        ({"raft.ref": "rm"}, 1, "raft.ref: rm holds a reward model"),
        ({"raft.ref": "foreign"}, 1, "raft.ref: foreign has another tokenizer than the policy sft ("),
        ({"reward.sources": [{"path": "other"}]}, 1,
         "reward.sources[0].path: other holds a policy, here a reward model"),
        ({"reward.rules": [{"pattern": "#", "name": "x"}, {"repeat": 3, "name": "x"}]}, 1,
         "reward.rules: has a name twice: x"),
        ({"reward.sources": [{"path": "lora"}], "reward.normalize": True}, 1, "lora has no mean and std"),
        (HYDRA, 1, "rm is a whole model, raft.sharing=hydra needs an adapter on sft: a run of"
                   " `rlhf rm model.path=sft lora=r16` (not merged), or use raft.sharing=separate"),
        ({"reward.sources": [{"path": "elsewhere"}]} | HYDRA, 1,
         "with raft.sharing=hydra it must be the policy's base sft; train it there (rlhf rm model.path=sft lora=r16)"),
    ],
)  # fmt: skip
def test_what_the_files_and_ranks_rule_out(made: Path, options: dict[str, Any], ranks: int, message: str) -> None:
    (problem,) = problems(made, options, ranks)
    assert message in problem


def test_several_problems_come_together(made: Path) -> None:
    found = problems(made, {"model.path": "rm", "data.path": "q.jsonl", "model.dtype": "fp16"}, ranks=3, gpu=False)
    keys = [message.split(":")[0] for message in found]
    assert keys == ["train.global_batch_size", "data.path", "model.path", "model.dtype"]


def test_ppos_own_options_are_not_rafts() -> None:
    known = known_keys(RaftConfig)
    assert not [key for key in known if key.startswith("ppo.")]
    with pytest.raises(ConfigError, match=r"raft\.critic: is not an option"):
        build(RaftConfig, {"stage": "raft", "raft": {"critic": "reward"}})


def test_what_may_change_when_a_run_goes_on() -> None:
    known = known_keys(RaftConfig)
    for key in (
        "generation.batch_size",
        "raft.frozen",
        "raft.keep_models",
        "train.micro_batch_size",
        "train.save_every",
    ):
        assert key in known
        assert key.startswith(MAY_DIFFER)
    assert "raft.num_iterations" in known
    assert "raft.num_iterations" in MAY_GROW
    for key in ("raft.batch_size", "raft.top_fraction", "raft.epochs", "train.global_batch_size", "reward.clip"):
        assert key in known
        assert not key.startswith(MAY_DIFFER)
