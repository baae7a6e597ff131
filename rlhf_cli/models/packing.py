"""Which models keep packed rows apart (data.packing): several rows stand in one sequence, parted by position_ids alone.

Without a mask and a cache transformers reads the documents off position_ids that start again at 0, but only where the
model hands them to its mask. Others let rows see each other without a word: OPT, BLOOM, Falcon, MPT, XGLM, GPT-OSS, and
all that carry a state along the sequence (Mamba).
"""

from __future__ import annotations

from transformers import PretrainedConfig

from rlhf_cli.errors import ModelError

# Each is tried in tests/test_packing.py: a row's losses do not change with what stands before it.
KNOWN = (
    "llama", "mistral", "mixtral", "ministral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "gpt2", "gpt_neox",
    "gpt_neo", "gptj", "gpt_bigcode", "codegen", "phi", "phi3", "phimoe", "gemma", "gemma2", "gemma3_text", "olmo",
    "olmo2", "olmo3", "olmoe", "stablelm", "starcoder2", "granite", "granitemoe", "cohere", "cohere2", "smollm3",
    "nemotron", "glm", "glm4", "exaone4", "seed_oss", "arcee", "apertus",
)  # fmt: skip


def check_packing(config: PretrainedConfig, key: str) -> None:
    """Raise ModelError unless the model is known to keep packed rows apart. key: the option that asks for packing."""
    if config.model_type in KNOWN and not getattr(config, "auto_map", None):
        return
    what = f"{config.model_type} models are" if config.model_type not in KNOWN else "models with code of their own are"
    raise ModelError(
        f"{key}: {what} not known to keep the rows of a packed sequence apart, they would attend to each other; set"
        f" {key}=false"
    )
