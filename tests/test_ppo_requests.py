"""What is wrong with a ppo request is told before anything is loaded: the stage to run first, and without torch."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.config.freeze import MAY_DIFFER, MAY_GROW
from rlhf_cli.config.model_files import tokenizer_difference
from rlhf_cli.config.requests import check_request
from rlhf_cli.errors import ConfigError
from rlhf_cli.files import digest_tree
from rlhf_cli.schema import PpoConfig, build, known_keys
from tests.data_tokenizers import byte_bpe
from tests.reward_models import write_adapter, write_decoder, write_policy, write_run


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """sft, other: policies (of the same tokenizer); rm: a reward model; mood: one with labels; lora: a reward adapter
    on sft; elsewhere: one on other; tuned: a policy's adapter; foreign: a policy with other tokens."""
    root = tmp_path_factory.mktemp("made")
    for name in ("sft", "other", "foreign"):
        write_policy(root / name / "model")
        write_run(root / name, "policy", "causal_lm", stage="sft")
    byte_bpe(330).save_pretrained(root / "foreign" / "model")
    write_decoder(root / "rm" / "model")
    write_run(root / "rm", reward={"mean": 0.0, "std": 1.0})
    write_decoder(root / "mood" / "model", labels=["angry", "happy"])
    write_run(root / "mood", reward={"labels": ["angry", "happy"]})
    write_decoder(root / "alien" / "model", tokenizer=byte_bpe(330))
    write_run(root / "alien")
    write_adapter(root / "lora" / "model", root / "sft" / "model")
    write_run(root / "lora", "adapter")
    write_adapter(root / "elsewhere" / "model", root / "other" / "model")
    write_run(root / "elsewhere", "adapter")
    shutil.copytree(root / "lora" / "model", root / "tuned" / "model")
    settings = json.loads((root / "tuned" / "model" / "adapter_config.json").read_text())
    (root / "tuned" / "model" / "adapter_config.json").write_text(json.dumps(settings | {"task_type": "CAUSAL_LM"}))
    write_run(root / "tuned", "adapter", "causal_lm", stage="sft")
    (root / "p.jsonl").write_text('{"prompt": "a"}\n')
    (root / "plain.txt").write_text("a b c\n")
    (root / "f.py").write_text("")
    return root


def problems(made: Path, ranks: int = 1, gpu: bool = True, weights: bool = True, **options: Any) -> list[str]:
    """options: value, `__` for the dot; reward: a list of sources (default: the run rm)."""
    values: dict[str, Any] = {"stage": "ppo"}
    given = {
        "model__path": "sft", "data__path": "p.jsonl", "data__max_prompt_length": 30, "generation__max_new_tokens": 20,
    } | options  # fmt: skip
    sources = given.pop("reward", [{"path": "rm"}])
    for name, value in given.items():
        place = values
        *sections, leaf = name.split("__")
        for section in sections:
            place = place.setdefault(section, {})
        is_file = leaf in ("path", "eval_path", "tax_path", "ref", "critic") and (made / str(value)).exists()
        place[leaf] = str(made / value) if is_file else value
    at = lambda path: str(made / path) if (made / path).exists() else path
    sources = [source | ({"path": at(source["path"])} if "path" in source else {}) for source in sources]
    values.setdefault("reward", {})["sources"] = sources
    config = build(PpoConfig, values)
    return [str(problem).replace(f"{made}/", "") for problem in check_request(config, ranks, gpu, weights)]


def one(made: Path, **options: Any) -> str:
    (message,) = problems(made, **options)
    return message


HYDRA = {"ppo__sharing": "hydra", "lora__enabled": True}


def test_what_is_fine(made: Path) -> None:
    assert not problems(made)
    assert not problems(made, model__path="sft/model")
    assert not problems(made, model__path="someone/policy", ppo__ref="someone/policy", ppo__critic="someone/rm")
    assert not problems(made, reward=[{"path": "rm"}, {"path": "lora"}, {"type": "rouge"}])
    assert not problems(made, reward=[{"path": "rm"}], reward__normalize=True)
    assert not problems(made, reward=[{"path": "alien"}])  # another tokenizer: it reads text
    assert not problems(made, reward=[{"path": "lora"}], **HYDRA)
    assert not problems(made, reward=[{"path": "lora"}, {"type": "rouge"}], ppo__critic="reward", **HYDRA)
    assert not problems(made, reward=[{"type": "function", "path": "f.py", "function": "f"}], **HYDRA)
    assert not problems(made, reward=[{"path": "someone/adapter"}], **HYDRA)
    for critic in ("auto", "policy", "reward", "rm", "rm/model", "other"):
        assert not problems(made, ppo__critic=critic)
    assert not problems(made, ppo__ref="other", data__eval_path="p.jsonl", eval__tax_path="plain.txt")


def test_a_reward_model_as_the_policy(made: Path) -> None:
    assert one(made, model__path="rm") == (
        "model.path: rm holds a reward model, here a policy is needed: a run of `rlhf sft`;"
        " rewards go to reward.sources"
    )
    assert "rm/model holds a reward model, here a policy is needed" in one(made, model__path="rm/model")
    assert "ppo.ref: mood holds a reward model" in one(made, ppo__ref="mood")
    # merging it would not make it a policy
    assert "lora holds the adapter of a reward model, here a policy" in one(made, model__path="lora")
    assert "lora/model holds the adapter of a reward model" in one(made, model__path="lora/model")


def test_a_policy_as_the_reward(made: Path) -> None:
    assert "here a reward model is needed: a run of `rlhf rm`" in one(made, reward=[{"path": "other"}])
    assert "is a LlamaForCausalLM, no reward model" in one(made, reward=[{"path": "other/model"}])
    assert "holds the adapter of a policy" in one(made, reward=[{"path": "tuned"}])


def test_an_unmerged_adapter_as_the_policy(made: Path) -> None:
    assert "merge it into its base first: rlhf merge-lora merge.adapter=tuned" in one(made, model__path="tuned")
    assert "merge it into its base first: rlhf merge-lora" in one(made, model__path="tuned/model")
    assert "ppo.ref: tuned holds a LoRA adapter; merge" in one(made, ppo__ref="tuned")
    assert "ppo.critic: lora holds a LoRA adapter; merge" in one(made, ppo__critic="lora")


def test_an_adapter_whose_base_moved(made: Path, tmp_path: Path) -> None:
    base = write_policy(tmp_path / "base")
    write_adapter(tmp_path / "lora", base)
    base.rename(tmp_path / "moved")
    gone = {"reward": [{"path": str(tmp_path / "lora")}]}
    for options in (gone, gone | HYDRA, gone | {"ppo__critic": "reward"}):
        message = one(made, **options)
        assert "whose base is gone" in message
        assert "rlhf merge-lora merge.adapter=" in message


def test_unfinished_runs(made: Path, tmp_path: Path) -> None:
    for kind, key in (("policy", "model__path"), ("reward", "model__path"), ("policy", "ppo__ref")):
        run = write_run(tmp_path / "open", kind, status="running", output=None)
        assert "not finished (status: running); finish it first" in one(made, **{key: str(run)})


def test_tokenizers_that_must_match(made: Path) -> None:
    message = one(made, ppo__ref="foreign")
    assert message.startswith("ppo.ref: foreign has another tokenizer than the policy sft (")
    assert "(rlhf sft, rlhf rm)" in message
    assert "ppo.critic: alien has another tokenizer" in one(made, ppo__critic="alien")
    assert "ppo.critic: alien has another" in one(made, ppo__critic="reward", reward=[{"path": "alien"}])
    grpo = {"ppo__advantage": "grpo"}  # no critic
    assert not problems(made, ppo__critic="reward", reward=[{"path": "alien"}], **grpo)


def test_templates_that_must_match(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "made")
    made = tmp_path / "made"
    write_run(made / "other", "policy", "causal_lm", stage="sft", template="hh")
    write_run(made / "rm", template="hh")
    write_adapter(made / "lora" / "model", made / "sft" / "model")
    write_run(made / "lora", "adapter", template="hh")
    for options, key, stage in (
        ({"ppo__ref": "other"}, "ppo.ref: other", "sft"),
        ({"ppo__critic": "reward"}, "ppo.critic: rm", "rm"),
        ({"ppo__critic": "rm"}, "ppo.critic: rm", "rm"),
        (HYDRA | {"reward": [{"path": "lora"}]}, "reward.sources[0].path: lora", "rm"),
    ):
        assert not problems(made, **options)  # the policy's template is not known before the run
        message = one(made, data__template="alpaca", **options)
        assert message.startswith(f"{key} was trained with the template hh, and the policy writes alpaca")
        assert message.endswith(f"run `rlhf {stage}` with data.template=alpaca first")
        assert not problems(made, data__template="hh", **options)
    write_run(made / "sft", "policy", "causal_lm", stage="sft", template="alpaca")
    assert "the policy writes alpaca" in one(made, ppo__ref="other")
    assert not problems(made)  # a reward model that only scores reads text


def test_how_tokenizers_differ(made: Path, tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    for folder in (a, b):
        folder.mkdir()
    write = lambda folder, vocab, added: (folder / "tokenizer.json").write_text(
        json.dumps({"model": {"vocab": vocab}, "added_tokens": [{"content": t, "id": i} for t, i in added.items()]})
    )
    write(a, {"x": 0, "y": 1}, {})
    assert tokenizer_difference(a, b) is None  # b does not tell
    write(b, [["x", -1.5], ["y", -2.0]], {})  # Unigram lists its tokens
    assert tokenizer_difference(a, b) is None
    write(b, {"x": 0, "y": 1}, {"<pad>": 2})
    assert tokenizer_difference(a, b) == "2 and 3 tokens; '<pad>' is none in one and 2 in the other"
    write(b, {"x": 1, "y": 0}, {})
    assert tokenizer_difference(a, b) == "2 and 2 tokens; 'x' is 0 in one and 1 in the other"
    (b / "tokenizer.json").unlink()
    (b / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(made / "sft" / "model")}))
    assert tokenizer_difference(made / "sft" / "model", b) is None  # an adapter's tokenizer may be its base's
    assert tokenizer_difference(a, b) is not None


def test_a_critic_of_a_reward_model(made: Path) -> None:
    assert "merge it into its base first: rlhf merge-lora merge.adapter=lora" in one(
        made, ppo__critic="reward", reward=[{"path": "lora"}]
    )
    labelled = {"path": "mood", "label": "happy"}
    assert "mood has the labels angry, happy, a critic needs one score" in one(
        made, ppo__critic="reward", reward=[labelled]
    )
    assert "ppo.critic: mood has the labels" in one(made, ppo__critic="mood")
    mood = labelled | {"type": "classifier"}
    for source in ({"type": "rouge"}, mood):
        assert "no source in reward.sources is of type model" in one(made, ppo__critic="reward", reward=[source])
    assert not problems(made, ppo__critic="reward", reward=[{"type": "rouge"}, {"path": "rm"}, mood])
    running = {"reward__normalize": True, "reward__moments": "running"}
    assert "use policy, or reward.moments=manifest" in one(made, ppo__critic="reward", **running)
    assert not problems(made, ppo__critic="auto", **running)
    assert not problems(made, ppo__critic="reward", reward=[mood, {"path": "rm"}])
    assert "ppo.critic: no such directory: runs/nowhere" in one(made, ppo__critic="runs/nowhere")


def test_a_critic_takes_the_first_reward_model_that_fits(made: Path) -> None:
    lora, alien, rm = {"path": "lora"}, {"path": "alien"}, {"path": "rm"}
    assert not problems(made, ppo__critic="reward", reward=[lora], lora__enabled=True)  # goes on with the adapter
    assert not problems(made, ppo__critic="reward", reward=[lora, rm])
    assert not problems(made, ppo__critic="reward", reward=[alien, rm])
    found = problems(made, ppo__critic="reward", reward=[alien, lora])
    assert ["another tokenizer" in found[0], "is an adapter; merge it" in found[1], len(found)] == [True, True, 2]
    assert not problems(made, ppo__critic="reward", reward=[rm, lora], **HYDRA)
    found = problems(made, ppo__critic="reward", reward=[rm], **HYDRA)
    assert [message.split(":")[0] for message in found] == ["reward.sources[0].path", "ppo.critic"]
    assert "rm is a whole model, which ppo.sharing=hydra cannot share" in found[1]


def test_hydra_shares_one_base(made: Path, tmp_path: Path) -> None:
    assert "reward.sources[0].path: rm is a whole model, ppo.sharing=hydra needs an adapter on sft" in one(
        made, **HYDRA
    )
    assert "elsewhere was trained on other/model, with ppo.sharing=hydra it must be the policy's base sft" in one(
        made, reward=[{"path": "elsewhere"}], **HYDRA
    )
    assert "rlhf rm model.path=sft lora=r16" in one(made, reward=[{"path": "elsewhere"}], **HYDRA)
    two = [{"path": "lora"}, {"path": "elsewhere"}, {"type": "rouge"}]
    assert "reward.sources[1].path: elsewhere was trained on other/model" in one(made, reward=two, **HYDRA)
    gold = {"path": "rm", "weight": 0, "name": "gold"}
    assert not problems(made, reward=[{"path": "lora"}, gold], **HYDRA)
    assert not problems(made, reward=[gold, {"path": "lora"}], **HYDRA)
    assert not problems(made, reward=[gold, {"path": "someone/adapter"}], **HYDRA)
    assert "reward.sources: rm and alien are whole models, ppo.sharing=hydra needs an adapter on sft" in one(
        made, reward=[gold, {"path": "alien"}], **HYDRA
    )
    shutil.copytree(made / "lora", tmp_path / "changed")
    byte_bpe(330).save_pretrained(tmp_path / "changed" / "model")
    assert "has another tokenizer than the policy sft" in one(
        made, reward=[{"path": str(tmp_path / "changed")}], **HYDRA
    )


def test_hydra_knows_a_copied_base_by_its_content(made: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(made / "sft", copy)
    lora = tmp_path / "lora"
    shutil.copytree(made / "lora", lora)
    options = {"model__path": str(copy), "reward": [{"path": str(lora)}]} | HYDRA
    assert "must be the policy's base" in one(made, **options)  # nothing tells that it is the same
    write_run(lora, "adapter", base_digest=digest_tree(made / "sft" / "model"))
    assert not problems(made, **options)


def test_arithmetic_lengths_and_data(made: Path) -> None:
    assert one(made, ranks=3) == (
        "ppo.rollout_batch_size: 128 / num_mini_batches 1 = 128 is not a multiple of train.micro_batch_size x number of"
        " ranks = 8 x 3 = 24"
    )
    found = problems(
        made, data__path="q.jsonl", data__eval_path="r.jsonl", eval__tax_path="s.txt",
        ppo__ptx__coef=1.0, ppo__ptx__data__path="t.txt",
    )  # fmt: skip
    assert [message.split(":")[0] for message in found] == [
        "data.path", "data.eval_path", "eval.tax_path", "ppo.ptx.data.path"
    ]  # fmt: skip
    assert "30 + 1100 = 1130 is more than the 1024 positions of sft" in one(made, generation__max_new_tokens=1100)
    assert "data.prompt_tokens: 31 is more than data.max_prompt_length = 30" in one(
        made, data__path="plain.txt", data__prompt_tokens=31
    )
    assert not problems(made, data__path="plain.txt", data__prompt_tokens=30)
    assert not problems(made, data__prompt_tokens=31)  # nothing is cut
    text: dict[str, Any] = {"ppo__ptx__data__path": "plain.txt", "ppo__ptx__coef": 1.0}
    assert "ppo.ptx.data.max_length: 1025 is more than the 1024 positions of sft" in one(
        made, ppo__ptx__data__max_length=1025, **text
    )
    assert not problems(made, ppo__ptx__data__max_length=1024, **text)


HELD_OUT = {"data__validation_split_percentage": 10}


@pytest.mark.parametrize(
    ("option", "value", "reader", "with_it"),
    [
        ("ppo.lam", 0.9, "ppo.advantage=gae", {}),
        ("ppo.critic_lr", 1e-5, "ppo.advantage=gae", {}),
        ("ppo.value_coef", 0.5, "ppo.advantage=gae", {}),
        ("ppo.value_clip_range", 0.1, "ppo.advantage=gae", {}),
        ("ppo.kl_target", 5.0, "ppo.kl_controller=adaptive", {"ppo__kl_controller": "adaptive"}),
        ("ppo.kl_horizon", 5000, "ppo.kl_controller=adaptive", {"ppo__kl_controller": "adaptive"}),
        ("eval.temperature", 0.5, "data.validation_split_percentage or data.eval_path", HELD_OUT),
        ("eval.num_prompts", 8, "data.validation_split_percentage or data.eval_path", {"data__eval_path": "p.jsonl"}),
        ("eval.tax_rows", 8, "eval.tax_path", {"eval__tax_path": "plain.txt"}),
        ("train.eval_every", 8, "data.validation_split_percentage or data.eval_path, or eval.tax_path,", HELD_OUT),
        ("train.eval_every", 9, "or eval.tax_path,", {"eval__tax_path": "plain.txt"}),
        ("ppo.ptx.batch_size", 8, "ppo.ptx.coef > 0", {"ppo__ptx__coef": 1.0, "ppo__ptx__data__path": "plain.txt"}),
        ("ppo.ptx.reduction", "row_mean", "ppo.ptx.coef > 0", {"ppo__ptx__coef": 1, "ppo__ptx__data__path": "p.jsonl"}),
        ("ppo.ptx.data.packing", True, "ppo.ptx.coef > 0", {"ppo__ptx__coef": 1, "ppo__ptx__data__path": "p.jsonl"}),
    ],
)
def test_options_that_nothing_would_read(
    made: Path, option: str, value: Any, reader: str, with_it: dict[str, Any]
) -> None:
    given = {option.replace(".", "__"): value}
    without = {"ppo__advantage": "rloo"} if "gae" in reader else {}
    with pytest.raises(ConfigError) as told:
        problems(made, **given, **without)
    (problem,) = told.value.problems
    assert problem.key == option
    assert f"{reader} only; set that, or leave it at " in problem.message
    assert not problems(made, **given, **with_it)


def test_how_an_unread_option_is_told(made: Path) -> None:
    def told(**options: Any) -> str:
        with pytest.raises(ConfigError) as error:
            problems(made, **options)
        (problem,) = error.value.problems
        return problem.message

    gae = "is read with ppo.advantage=gae only; set that, or leave it at"
    assert told(ppo__advantage="grpo", ppo__critic_lr=1e-5) == f"{gae} null"
    assert told(ppo__advantage="grpo", ppo__lam=1) == f"{gae} 0.95"
    assert told(ppo__ptx__data__packing=True).endswith("leave it at false")
    assert told(ppo__ptx__reduction="row_mean").endswith("leave it at token_mean")
    assert told(ppo__ptx__data__filters__drop_generated=True).endswith("set that, or drop it")
    assert not problems(made, ppo__advantage="grpo", ppo__critic="policy")  # the recipes set it


@pytest.mark.parametrize("option", ["template", "eval_path", "validation_split_percentage"])
def test_text_beside_the_prompts_has_no_options_that_it_does_not_read(made: Path, option: str) -> None:
    key = f"ppo.ptx.data.{option}"
    assert key not in known_keys(PpoConfig)
    with pytest.raises(ConfigError, match=f"{key}: is not an option"):
        problems(made, **{key.replace(".", "__"): "p.jsonl"})


def test_moments_rules_and_the_machine(made: Path) -> None:
    bare = [{"path": "lora"}]
    assert "lora has no mean and std" in one(made, reward=bare, reward__normalize=True)
    assert not problems(made, reward=bare, reward__normalize=True, reward__moments="running")
    rules = [{"pattern": "#", "name": "x"}, {"repeat": 3, "name": "x"}]
    assert one(made, reward__rules=rules) == "reward.rules: has a name twice: x"
    assert "fp16 needs a GPU" in one(made, gpu=False, model__dtype="fp16")
    assert not problems(made, gpu=False, weights=False, model__dtype="fp16")
    if not any((Path(p) / "wandb").is_dir() for p in sys.path):
        assert "logging.wandb: needs a package" in one(made, logging__wandb=True)


def test_several_problems_come_together(made: Path) -> None:
    found = problems(made, model__path="rm", reward=[{"path": "other"}], data__path="q.jsonl", ppo__critic="reward")
    assert [message.split(":")[0] for message in found] == ["data.path", "model.path", "reward.sources[0].path"]


def test_what_may_change_when_a_run_goes_on() -> None:
    known = known_keys(PpoConfig)
    for key in ("generation.batch_size", "generation.refill", "ppo.frozen", "train.micro_batch_size"):
        assert key in known
        assert key.startswith(MAY_DIFFER)
    assert "ppo.num_iterations" in known
    assert "ppo.num_iterations" in MAY_GROW
    for key in ("ppo.kl_coef", "generation.top_k", "train.seed", "reward.clip", "ppo.rollout_batch_size"):
        assert key in known
        assert not key.startswith(MAY_DIFFER)


def test_no_torch() -> None:
    program = "import sys, rlhf_cli.config.requests; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
