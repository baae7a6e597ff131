"""Run directories of tiny policies and reward models that a PPO run starts from, and the opening of one in a rank."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlhf_cli.assemble import pretrained_text
from rlhf_cli.files import digest_tree
from rlhf_cli.models.lora import add_lora, save_adapter
from rlhf_cli.models.reward import load_reward_model, new_reward_model
from rlhf_cli.models.save import save_model
from rlhf_cli.ppo.models import Models, open_models
from rlhf_cli.run import Run, open_run
from rlhf_cli.runtime.distributed import Ranks
from rlhf_cli.runtime.process import RankProcess
from rlhf_cli.runtime.stop import StopWatch
from rlhf_cli.schema import LoadedModelConfig, LoraConfig, PpoConfig
from rlhf_cli.schema.build import build
from tests.tiny_models import noisy, tiny_config, tiny_model, tiny_tokenizer


def write_manifest(run_dir: Path, **output: Any) -> Path:
    kind = {"kind": "policy", "task": "causal_lm", "path": "model", "format": "hf"} | output
    manifest = {"stage": "rm", "status": "complete", "output": kind, "template": "none", "reward": None}
    (run_dir / "manifest.json").write_text(json.dumps(manifest))
    return run_dir


def write_policy_run(
    run_dir: Path, arch: str = "llama", dropout: float = 0.0, seed: int = 0, tie: bool = False, model: Any = None
) -> Path:
    model = tiny_model(arch, tie, seed=seed) if model is None else model
    for name in ("resid_pdrop", "attn_pdrop", "embd_pdrop", "attention_dropout", "hidden_dropout"):
        if hasattr(model.config, name):
            setattr(model.config, name, dropout)
    save_model(model.config, dict(model.state_dict()), run_dir / "model", tiny_tokenizer())
    return write_manifest(run_dir)


def write_reward_run(
    run_dir: Path, arch: str = "llama", labels: list[str] | None = None, seed: int = 5, config: Any = None
) -> Path:
    """A full reward model."""
    model = noisy(new_reward_model(tiny_config(arch) if config is None else config, labels, torch.float32, seed), seed)
    save_model(model.config, dict(model.state_dict()), run_dir / "model", tiny_tokenizer())
    return write_manifest(run_dir, kind="reward", task="sequence_classification")


def write_adapter_run(run_dir: Path, policy: Path, labels: list[str] | None = None, dropout: float = 0.0) -> Path:
    """An unmerged reward model on the policy of a run."""
    base = policy / "model"
    model = load_reward_model(LoadedModelConfig(), base, torch.float32, labels, seed=3)
    wrapped = add_lora(model, LoraConfig(enabled=True, r=3, alpha=6.0, dropout=dropout), "SEQ_CLS", seed=4)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    trained = {n: p.detach().clone() for n, p in wrapped.named_parameters() if p.requires_grad}
    save_adapter(wrapped, trained, run_dir / "model", tiny_tokenizer(), str(base.resolve()))
    write_manifest(run_dir, kind="adapter", task="sequence_classification", format="peft")
    return change_manifest(run_dir, base_digest=digest_tree(base))


def change_manifest(run_dir: Path, **entries: Any) -> Path:
    manifest = json.loads((run_dir / "manifest.json").read_text()) | entries
    (run_dir / "manifest.json").write_text(json.dumps(manifest))
    return run_dir


def ppo_config(policy: Path, sources: list[dict[str, Any]], stage: int = 2, **more: Any) -> PpoConfig:
    """more: sections as dicts, or ppo options by name."""
    sections = ("lora", "model", "data", "generation", "optim", "train", "reward")
    values: dict[str, Any] = {
        "model": {"path": str(policy), "dtype": "fp32"} | more.get("model", {}),
        "data": {"path": "none.jsonl", "template": "none", "max_prompt_length": 16} | more.get("data", {}),
        "generation": {"max_new_tokens": 16} | more.get("generation", {}),
        "lora": more.get("lora", {}),
        "optim": {"lr": 1e-2, "eps": 1e-5, "max_grad_norm": 1.0} | more.get("optim", {}),
        "train": {"micro_batch_size": 2} | more.get("train", {}),
        "reward": {"sources": sources} | more.get("reward", {}),
        "ppo": {name: value for name, value in more.items() if name not in sections},
        "deepspeed": {
            "name": f"zero{stage}",
            "json": {"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 20}},
        },
        "logging": {"progress": "none", "tensorboard": False},
    }
    if stage != 3:
        del values["deepspeed"]["json"]["zero_optimization"]["stage3_param_persistence_threshold"]
    config: PpoConfig = build(PpoConfig, values)
    return config


def opened(ranks: Ranks, run_dir: str, config: PpoConfig, checkpoint: Path | None = None) -> tuple[Models, Run]:
    """What a rank of `rlhf ppo` opens. The run directory gets a manifest."""
    Path(run_dir).mkdir(parents=True, exist_ok=True)
    process = RankProcess(
        ranks.rank, ranks.local_rank, ranks.world_size, io.StringIO(), StopWatch(Path(run_dir), ranks.rank)
    )
    run = open_run(config, Path(run_dir), process, ranks)
    text = pretrained_text(config.model, config.data.template)
    return open_models(config, text, run, checkpoint), run


def random_texts(count: int = 6, seed: int = 0) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Ragged prompts and responses in tokens of tiny_tokenizer."""
    draw = np.random.default_rng(seed)
    row = lambda low, high: draw.integers(3, 20, size=int(draw.integers(low, high))).astype(np.int32)
    return [row(1, 9) for _ in range(count)], [row(1, 9) for _ in range(count)]
