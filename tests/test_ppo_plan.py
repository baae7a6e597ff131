"""The dry run's bytes: by hand for 7B on eight GPUs, and against what tiny processes really hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from rlhf_cli.align.plan import Plan, describe_memory
from rlhf_cli.assemble import Text
from rlhf_cli.data.templates import TEMPLATES
from rlhf_cli.errors import ModelError
from rlhf_cli.ppo.plan import describe_rhythm, plan_run
from rlhf_cli.schema import PpoConfig
from tests.ppo_models import ppo_config, write_policy_run, write_reward_run
from tests.tiny_models import tiny_tokenizer

BLOCK = 4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096
EDGE = 32000 * 4096
PARAMS = 32 * BLOCK + 2 * EDGE + 4096  # LLaMA-7B
BACKBONE = PARAMS - EDGE
ADAPTER = 32 * 16 * (4 * 8192 + 3 * (4096 + 11008))  # rank 16 on the seven matrices of each block
GB = 10**9
TEXT = Text(tiny_tokenizer(), TEMPLATES["none"], 0)


def config_only(folder: Path, architecture: str = "LlamaForCausalLM", labels: int = 1) -> Path:
    """A directory with LLaMA-7B's config.json and nothing else."""
    folder.mkdir(parents=True)
    LlamaConfig(architectures=[architecture], num_labels=labels, pad_token_id=0).save_pretrained(folder)
    return folder


def adapter_only(folder: Path, base: Path) -> Path:
    """A reward adapter of rank 16 on `base`, of whose weights the head is enough for a plan."""
    folder.mkdir()
    settings = {
        "task_type": "SEQ_CLS", "peft_type": "LORA", "r": 16, "lora_alpha": 32, "base_model_name_or_path": str(base),
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file({"base_model.model.score.weight": torch.zeros(1, 4096)}, folder / "adapter_model.safetensors")
    return folder


def config_7b(policy: Path, reward: Path, stage: int = 3, **more: Any) -> PpoConfig:
    settings: dict[str, Any] = {
        "model": {"dtype": "bf16", "gradient_checkpointing": True},
        "data": {"max_prompt_length": 256},
        "generation": {"max_new_tokens": 128, "batch_size": 64},
        "train": {"micro_batch_size": 4},
        "rollout_batch_size": 512,
        **more,
    }
    return ppo_config(policy, [{"path": str(reward)}], stage, **settings)


def plan(config: PpoConfig, world_size: int = 8) -> Plan:
    return plan_run(config, TEXT, 256, world_size, for_gpu=True)


def test_hydra_7b_on_eight_gpus_by_hand(tmp_path: Path) -> None:
    base = config_only(tmp_path / "llama")
    reward = adapter_only(tmp_path / "rm", base)
    lora = {"enabled": True, "r": 16}
    found = plan(config_7b(base, reward, lora=lora, sharing="hydra", critic="policy"))
    critic = ADAPTER + 4096
    share = lambda n: -(-n // 8)
    assert found.rest == {
        "policy": share(2 * (PARAMS + ADAPTER)),
        "optimizers": share(12 * ADAPTER) + share(12 * critic),
        "critic": share(2 * critic),
        "gradients": share(4 * ADAPTER) + share(4 * critic),
        "buckets": 2 * (ADAPTER + critic),
        "frozen": 2 * critic,  # the reward adapter, whole on every rank; the base is counted with the policy
    }
    # Keys and values: 2 x 32 blocks x 4096 x 2 bytes = half a MiB a token, of 64 sequences of 384 tokens and half as
    # many columns more, so that others can begin while they run.
    assert found.phases["generate"] == {
        "gathered": 2 * (PARAMS + ADAPTER), "keys and values": 2**19 * 64 * (384 + 192), "logits": 12 * 64 * 32000,
    }  # fmt: skip
    assert found.phases["score"]["gathered"] == 2 * (PARAMS + ADAPTER)
    assert found.phases["train"]["gathered"] == 2 * (2 * BLOCK + EDGE)
    assert found.most < 40 * GB
    assert found.most == found.total("generate")
    # Optimizers of the two adapters; nothing of the base.
    assert found.checkpoint == 12 * (ADAPTER + critic)
    assert found.host == 0


def test_four_separate_7b_models_by_hand(tmp_path: Path) -> None:
    base, reward = config_only(tmp_path / "llama"), config_only(tmp_path / "rm", "LlamaForSequenceClassification")
    critic = BACKBONE + 4096
    found = plan(config_7b(base, reward, ema=0.99))
    share = lambda n: -(-n // 8)
    assert found.rest == {
        "policy": share(2 * PARAMS), "optimizers": share(12 * PARAMS) + share(12 * critic), "critic": share(2 * critic),
        "gradients": share(4 * PARAMS) + share(4 * critic), "buckets": 2 * 2 * 500_000_000,
        "average": share(4 * PARAMS), "frozen": share(2 * PARAMS) + share(2 * critic),
    }  # fmt: skip
    assert found.phases["generate"]["gathered"] == 2 * PARAMS
    assert 2 * critic <= found.phases["score"]["gathered"] <= 2 * PARAMS  # one of the two at a time
    assert found.checkpoint == 12 * (PARAMS + critic) + 4 * PARAMS
    assert found.most > 40 * GB
    offloaded = plan(config_7b(base, reward, frozen="offload"))
    assert "frozen" not in {name for name, size in offloaded.rest.items() if size}
    assert offloaded.host == share(2 * PARAMS) + share(2 * critic)
    assert offloaded.whole == found.whole == 2 * PARAMS  # each is opened whole, one after the other
    assert "host at start" in dict(describe_memory(offloaded, config_7b(base, reward)))
    kept = plan(config_7b(base, reward, frozen="keep"))
    assert kept.rest["frozen"] == 2 * (PARAMS + critic)
    assert kept.whole == 0
    assert "host at start" not in dict(describe_memory(kept, config_7b(base, reward)))
    two = plan(config_7b(base, reward, stage=2))
    assert two.rest["policy"] == 2 * PARAMS
    assert two.phases["generate"]["gathered"] == 0
    assert two.phases["train"]["gradients"] == found.rest["gradients"]
    assert two.rest["frozen"] == 2 * (PARAMS + critic)


def test_refilling_takes_half_as_many_columns_more(tmp_path: Path) -> None:
    base = config_only(tmp_path / "llama")
    reward = adapter_only(tmp_path / "rm", base)
    more: dict[str, Any] = {"lora": {"enabled": True, "r": 16}, "sharing": "hydra", "critic": "policy"}
    generation = {"max_new_tokens": 128, "batch_size": 64}
    refilled, usual = (
        plan(config_7b(base, reward, generation=generation | {"refill": refill}, **more)) for refill in (True, False)
    )
    columns = lambda found: found.phases["generate"]["keys and values"] // 2**19 // 64
    assert [columns(usual), columns(refilled)] == [384, 384 + 192]
    assert refilled.total("train") == usual.total("train")


def test_a_table_for_people(tmp_path: Path) -> None:
    policy, reward = write_policy_run(tmp_path / "sft"), write_reward_run(tmp_path / "rm")
    config = ppo_config(policy, [{"path": str(reward)}], rollout_batch_size=32, num_mini_batches=2, num_iterations=3)
    found = plan_run(config, TEXT, 9, 2, for_gpu=False)
    rows = dict(describe_rhythm(config, 2))
    assert rows["steps"].startswith("8 an iteration, 24 in all")
    assert rows["batch"] == "16 responses a step = 2 x 2 ranks x 4 accumulation"
    assert rows["rollouts"].startswith("3 of 32 responses (32 prompts x 1)")
    told = dict(describe_memory(found, config))
    assert {"at rest", "generate", "score", "train", "memory per rank", "one checkpoint"} <= set(told)
    assert "trained" in dict(found.models)["policy"]
    assert "the reward model" in dict(found.models)["critic"]
    assert found.most == max(found.total(phase) for phase in ("generate", "score", "train"))


def test_refuses_what_opening_would_refuse(tmp_path: Path) -> None:
    policy, reward = write_policy_run(tmp_path / "sft"), write_reward_run(tmp_path / "rm")
    config = ppo_config(policy, [{"path": str(policy)}])
    with pytest.raises(ModelError, match="a reward model is needed here"):
        plan_run(config, TEXT, 9, 1, for_gpu=False)
    config = ppo_config(policy, [{"path": str(reward)}], generation={"max_new_tokens": 1020})
    with pytest.raises(ModelError, match="1036 is more than the 1024 positions"):
        plan_run(config, TEXT, 9, 1, for_gpu=False)
    text = {"coef": 1.0, "data": {"path": "text.txt", "max_length": 1025}}
    config = ppo_config(policy, [{"path": str(reward)}], ptx=text)
    with pytest.raises(ModelError, match="1025 is more than the 1024 positions of the policy"):
        plan_run(config, TEXT, 9, 1, for_gpu=False)
