"""Bases and adapters for the tests of merging, made with transformers and PEFT alone where it matters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerFast

from rlhf_cli.models.save import save_model
from tests.tiny_models import noisy, tiny_model, tiny_tokenizer

IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 2, 11]])
TARGETS = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "qwen3": ["q_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "c_fc"],
    "gpt_neox": ["query_key_value", "dense_4h_to_h"],
}


def save_base(
    directory: Path, arch: str = "llama", tie: bool = False, dtype: torch.dtype = torch.float32, size: str = "5GB"
) -> tuple[Path, PreTrainedTokenizerFast]:
    """A tiny random causal LM in HF layout."""
    model, tokenizer = tiny_model(arch, tie).to(dtype), tiny_tokenizer()
    save_model(model.config, dict(model.state_dict()), directory, tokenizer, "{{ x }}", max_shard_size=size)
    return directory, tokenizer


def save_peft(
    directory: Path,
    base: PreTrainedModel,
    arch: str = "llama",
    tokenizer: PreTrainedTokenizerFast | None = None,
    base_path: Path | None = None,
    save: dict[str, Any] | None = None,
    **settings: Any,
) -> PeftModel:
    """A random adapter in `directory`, by PEFT alone. Returns base + adapter in eval mode."""
    options: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS[arch]} | settings
    wrapped = get_peft_model(base, LoraConfig(init_lora_weights=False, **options))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:  # trained copies start as the base's values
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    if base_path is not None:
        wrapped.peft_config["default"].base_model_name_or_path = str(base_path)
    wrapped.peft_config["default"].init_lora_weights = True  # as if it had been trained from the usual start
    wrapped.save_pretrained(str(directory), **{"save_embedding_layers": False, **(save or {})})
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    return wrapped.eval()


def classifier_of(base: Path, num_labels: int = 1) -> PreTrainedModel:
    """A sequence classifier on the weights of a causal LM, its head random."""
    torch.manual_seed(3)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=num_labels, dtype=torch.float32)
    noisy(model.score, 5)
    model.config.pad_token_id = model.config.pad_token_id or 0
    return model.eval()


@torch.no_grad()
def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits.float()
