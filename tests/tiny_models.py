"""Tiny random models and tokenizers for tests."""

from __future__ import annotations

import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from rlhf_cli.models.scratch import make_config, new_model
from rlhf_cli.models.tokenizer import train_tokenizer
from rlhf_cli.schema import ArchConfig

PLAY = """First Citizen:
Before we proceed any further, hear me speak.

All:
Speak, speak.

First Citizen:
You are all resolved rather to die than to famish? Don't   stop!\tTell it: 12 crowns, ay.
"""
ARCHS = ["llama", "gpt2", "gpt_neox", "qwen3"]


def tiny_tokenizer(kind: str = "char", vocab_size: int = 300) -> PreTrainedTokenizerFast:
    return train_tokenizer(kind, [PLAY], vocab_size)  # type: ignore[arg-type]


def tiny_config(arch: str = "llama", tie: bool = False, layers: int = 2, dropout: float = 0.0) -> PretrainedConfig:
    kv = 2 if arch in ("llama", "qwen3") else None
    shape = ArchConfig(
        type=arch,  # type: ignore[arg-type]
        hidden_size=32,
        num_layers=layers,
        num_heads=4,
        num_kv_heads=kv,
        intermediate_size=48,
        tie_embeddings=tie,
        dropout=dropout,
    )
    return make_config(shape, tiny_tokenizer(), 64)


def tiny_model(arch: str = "llama", tie: bool = False, layers: int = 2, seed: int = 0) -> PreTrainedModel:
    """Random weights, biases and norms included (they start at 0 and 1, which would hide mistakes)."""
    model = new_model(tiny_config(arch, tie, layers), torch.float32, seed)
    return noisy(model, seed)


def noisy(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.eval()
