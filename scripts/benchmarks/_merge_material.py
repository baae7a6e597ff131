"""A random Llama in several files and a random adapter of all its linear layers, for the comparison of merging."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from _probe import job_from_argv
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def main(job: dict[str, Any]) -> None:
    torch.manual_seed(job["seed"])
    out = Path(job["out"])
    words = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, job["vocab"])}
    plain = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", eos_token="<eos>")
    config = LlamaConfig(
        vocab_size=job["vocab"], hidden_size=job["hidden"], intermediate_size=8 * job["hidden"] // 3 // 64 * 64,
        num_hidden_layers=job["layers"], num_attention_heads=job["hidden"] // 64, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16 if job["dtype"] == "bf16" else torch.float32)
    model = LlamaForCausalLM(config)
    for place in (out / "base", out / "adapter"):
        tokenizer.save_pretrained(place)
    model.save_pretrained(out / "base", max_shard_size=job["shard"])
    lora = LoraConfig(r=job["rank"], lora_alpha=2 * job["rank"], target_modules="all-linear", init_lora_weights=False)
    wrapped = get_peft_model(model, lora)
    wrapped.peft_config["default"].init_lora_weights = True
    wrapped.peft_config["default"].base_model_name_or_path = str(out / "base")
    wrapped.save_pretrained(out / "adapter", save_embedding_layers=False)


if __name__ == "__main__":
    main(job_from_argv())
