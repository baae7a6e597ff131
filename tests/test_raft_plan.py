"""The dry run of raft: the article's recipe on eight GPUs by hand, and what an iteration is made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.align.plan import describe_memory
from rlhf_cli.assemble import Text
from rlhf_cli.config.compose import compose_stage
from rlhf_cli.data.templates import TEMPLATES
from rlhf_cli.errors import ModelError
from rlhf_cli.raft.plan import describe_rhythm, plan_run
from rlhf_cli.schema import RaftConfig, build
from tests.ppo_models import write_policy_run, write_reward_run
from tests.test_ppo_plan import BACKBONE, BLOCK, EDGE, GB, PARAMS, adapter_only, config_only
from tests.tiny_models import tiny_tokenizer

TEXT = Text(tiny_tokenizer(), TEMPLATES["none"], 0)


def article(policy: Path, reward: Path, *words: str) -> RaftConfig:
    """The shipped recipe with LLaMA-7B's configs."""
    sources = f"reward.sources=[{{type: model, path: {reward}}}]"
    given = ["conf=hh_rlhf_llama_7b", f"model.path={policy}", "data.path=pairs.jsonl", sources, *words]
    composed = compose_stage("raft", given)
    assert not composed.problems + composed.unmet
    assert isinstance(composed.config, RaftConfig)
    return composed.config


def test_the_articles_recipe_on_eight_gpus_by_hand(tmp_path: Path) -> None:
    base, reward = config_only(tmp_path / "llama"), config_only(tmp_path / "rm", "LlamaForSequenceClassification")
    found = plan_run(article(base, reward), TEXT, 256, 8, for_gpu=True)
    share = lambda n: -(-n // 8)
    assert found.rest == {
        "policy": share(2 * PARAMS), "optimizers": share(12 * PARAMS), "gradients": share(4 * PARAMS),
        "buckets": 2 * 500_000_000, "frozen": share(2 * PARAMS) + share(2 * (BACKBONE + 4096)),
    }  # fmt: skip
    # Keys and values: 2 x 32 blocks x 4096 x 2 bytes = half a MiB a token, of 16 sequences of 256 + 128 tokens.
    assert found.phases["generate"] == {
        "gathered": 2 * PARAMS, "keys and values": 2**19 * 16 * 384, "logits": 12 * 16 * 32000
    }  # fmt: skip
    assert found.phases["train"]["gathered"] == 2 * (2 * BLOCK + EDGE)
    assert found.checkpoint == 12 * PARAMS
    assert 30 * GB < found.most < 40 * GB, "the article's machine"


def test_the_articles_recipe_with_one_base_fits_as_well(tmp_path: Path) -> None:
    base = config_only(tmp_path / "llama")
    reward = adapter_only(tmp_path / "rm", base)
    config = article(base, reward, "lora=r16", "deepspeed=zero2", "raft.sharing=hydra")
    found = plan_run(config, TEXT, 256, 8, for_gpu=True)
    assert dict(found.models)["reference"] == "on the policy's base"
    assert found.rest["policy"] >= 2 * PARAMS, "whole on each rank"
    assert 2 * PARAMS < found.most < 24 * GB


def test_the_articles_rhythm(tmp_path: Path) -> None:
    config = article(tmp_path / "llama", tmp_path / "rm")
    rows = dict(describe_rhythm(config, 10240, 8))
    # 20 x 8192 = 163,840 responses; x 128 = 20,971,520 tokens; 20 x 1024 / 10240 = 2 times through the prompts
    assert rows["responses"] == (
        "20 x 8,192 (1,024 prompts x 8), at most 128 tokens each; 163,840 responses, 20,971,520 tokens in all;"
        " 2.0 times through the prompts"
    )
    assert rows["ranked by"] == "reward"
    assert rows["selected"] == (
        "1,024 an iteration, the best 1 in 8 of those to the same prompt (KL to it: 1.20 nats at most), 4 times each"
    )
    # 4 epochs x 1024 / 64 = 64; 20 x 64 = 1280
    assert rows["steps"].startswith("64 an iteration, 1,280 in all, 0 of each iteration warm-up;")
    assert rows["batch"] == "64 responses a step = 4 x 8 ranks x 2 accumulation"


@pytest.mark.parametrize(
    ("raft", "row", "told"),
    [
        ({"strategy": "top"}, "responses",
         "3 x 40 (40 prompts x 1), at most 9 tokens each; 120 responses, 1,080 tokens"),
        ({"strategy": "top"}, "selected", "10 an iteration, the best 1 in 4 of all of an iteration"),
        ({"soft_temperature": 0.5}, "selected",
         "all, each weighted by softmax(reward / 0.5) among those to the same prompt"),
        # 40 / 4 = 10 steps an epoch; 30 % of 3 x 10 = 9
        ({"soft_temperature": 0.5, "optimizer": "continue"}, "steps",
         "10 an iteration, 30 in all, 9 of them warm-up;"),
        # 10 / 4 = 2 full steps and one of 2 responses, in each of 2 passes; 30 % of 6 = 1.8
        ({"epochs": 2}, "steps", "6 an iteration, 18 in all, 2 of each iteration warm-up;"),
        ({"kl_coef": 0.1}, "ranked by",
         "the policy's own mean log-probability of a token - 0.1 x log(policy / reference)"),
    ],
)  # fmt: skip
def test_what_an_iteration_is_made_of(raft: dict[str, Any], row: str, told: str) -> None:
    values = {
        "stage": "raft", "model": {"path": "m"}, "data": {"path": "p.jsonl"}, "generation": {"max_new_tokens": 9},
        "optim": {"warmup_ratio": 0.3, "min_warmup_steps": 1}, "train": {"global_batch_size": 4, "micro_batch_size": 2},
        "raft": {"num_iterations": 3, "batch_size": 10, "top_fraction": 0.25} | raft,
    }  # fmt: skip
    assert told in dict(describe_rhythm(build(RaftConfig, values), 100, 2))[row]


def test_a_plan_needs_no_reward_and_refuses_what_opening_would_refuse(tmp_path: Path) -> None:
    policy, reward = write_policy_run(tmp_path / "sft"), write_reward_run(tmp_path / "rm")

    def planned(**more: Any) -> list[str]:
        values = {"stage": "raft", "model": {"path": str(policy)}, "data": {"path": "p.jsonl", "max_prompt_length": 16}}
        config = build(RaftConfig, values | more)
        found = plan_run(config, TEXT, 9, 2, for_gpu=False)
        assert {"at rest", "generate", "score", "train", "memory per rank"} <= set(dict(describe_memory(found, config)))
        assert found.most == max(found.total(phase) for phase in ("generate", "score", "train"))
        return [name for name, _ in found.models]

    assert planned() == ["policy", "reference"]
    sources = [{"path": str(reward)}, {"type": "rouge", "weight": 0.5}]
    assert planned(reward={"sources": sources}) == ["policy", "reference", "reward model", "reward rouge"]
    with pytest.raises(ModelError, match="a reward model is needed here"):
        planned(reward={"sources": [{"path": str(policy)}]})
    with pytest.raises(ModelError, match="positions of the models"):
        planned(generation={"max_new_tokens": 1020})
