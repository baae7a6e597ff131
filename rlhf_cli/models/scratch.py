"""Models from random weights (model.init=scratch)."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen3Config,
)

from rlhf_cli.models.load import auto_class
from rlhf_cli.schema import ArchConfig


def make_config(arch: ArchConfig, tokenizer: PreTrainedTokenizerBase, max_length: int) -> PretrainedConfig:
    """The transformers config of a new model. max_length: longest training sequence (data.max_length).

    qwen3 stands for the Qwen family: transformers gives any qwen2 directory Qwen2's own pre-tokenizer, whatever
    tokenizer.json says, so a tokenizer trained for it would load as another one.
    """
    positions = arch.max_positions or max(1024, max_length)
    special = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "tie_word_embeddings": arch.tie_embeddings,
    }
    return {"llama": _llama, "qwen3": _qwen3, "gpt2": _gpt2, "gpt_neox": _gpt_neox}[arch.type](arch, positions, special)


def new_model(
    config: PretrainedConfig, dtype: torch.dtype, seed: int, attn_implementation: str | None = None
) -> PreTrainedModel:
    """A causal LM, or the sequence classifier that the config names, with random weights that depend on config, dtype
    and seed only. Leaves the RNG as it was."""
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed: that seeds the GPUs too, and every rank would go on with the same dropout.
        torch.default_generator.manual_seed(seed)
        model: PreTrainedModel = auto_class(config).from_config(
            config, dtype=dtype, attn_implementation=attn_implementation
        )
    return model


def gated_width(hidden_size: int) -> int:
    """8/3 of the width, up to a multiple of 32: a gated MLP of three matrices then costs what 4x of two does
    (Shazeer, arXiv 2002.05202)."""
    return -(-8 * hidden_size // 3 // 32) * 32


def _gated(arch: ArchConfig, positions: int, special: dict[str, Any]) -> dict[str, Any]:
    return {
        "hidden_size": arch.hidden_size,
        "num_hidden_layers": arch.num_layers,
        "num_attention_heads": arch.num_heads,
        "num_key_value_heads": arch.num_kv_heads or arch.num_heads,
        "head_dim": arch.hidden_size // arch.num_heads,
        "intermediate_size": arch.intermediate_size or gated_width(arch.hidden_size),
        "max_position_embeddings": positions,
        "attention_dropout": arch.dropout,
        **special,
    }


def _llama(arch: ArchConfig, positions: int, special: dict[str, Any]) -> PretrainedConfig:
    return LlamaConfig(**_gated(arch, positions, special))


def _qwen3(arch: ArchConfig, positions: int, special: dict[str, Any]) -> PretrainedConfig:
    return Qwen3Config(**_gated(arch, positions, special))


def _gpt2(arch: ArchConfig, positions: int, special: dict[str, Any]) -> PretrainedConfig:
    return GPT2Config(
        n_embd=arch.hidden_size,
        n_layer=arch.num_layers,
        n_head=arch.num_heads,
        n_inner=arch.intermediate_size,
        n_positions=positions,
        resid_pdrop=arch.dropout,
        embd_pdrop=arch.dropout,
        attn_pdrop=arch.dropout,
        **special,
    )


def _gpt_neox(arch: ArchConfig, positions: int, special: dict[str, Any]) -> PretrainedConfig:
    return GPTNeoXConfig(
        hidden_size=arch.hidden_size,
        num_hidden_layers=arch.num_layers,
        num_attention_heads=arch.num_heads,
        intermediate_size=arch.intermediate_size or 4 * arch.hidden_size,
        max_position_embeddings=positions,
        hidden_dropout=arch.dropout,
        attention_dropout=arch.dropout,
        **special,
    )
