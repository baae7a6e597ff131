"""The model: where it comes from, its tokenizer, which of its parameters train."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from rlhf_cli.errors import Problem
from rlhf_cli.schema.fields import opt, section


@dataclass
class ArchConfig:
    """Architecture of a model from scratch (model.init=scratch)."""

    type: Literal["llama", "gpt2", "gpt_neox", "qwen3"] = opt("llama", "model family")
    hidden_size: int = opt(256, "width of the residual stream", ge=8)
    num_layers: int = opt(4, "transformer blocks", ge=1)
    num_heads: int = opt(4, "attention heads; divides hidden_size", ge=1)
    num_kv_heads: int | None = opt(None, "key/value heads (llama, qwen3); null = num_heads", ge=1)
    intermediate_size: int | None = opt(None, "width of the MLP; null = 4 x hidden_size, or 8/3 x for gated ones", ge=8)
    max_positions: int | None = opt(None, "longest sequence; null = data.max_length, at least 1024", ge=8)
    tie_embeddings: bool = opt(False, "input and output embeddings are one matrix")
    dropout: float = opt(0.0, "dropout while training (gpt2, gpt_neox; attention only in llama, qwen3)", ge=0, lt=1)

    def check(self) -> Iterator[Problem]:
        if self.hidden_size % self.num_heads:
            yield Problem("num_heads", f"{self.num_heads} does not divide arch.hidden_size = {self.hidden_size}")
        elif self.hidden_size // self.num_heads % 2:
            yield Problem("num_heads", f"hidden_size / num_heads = {self.hidden_size // self.num_heads} must be even")
        if self.num_kv_heads is not None:
            if self.type not in ("llama", "qwen3"):
                yield Problem("num_kv_heads", f"is for llama and qwen3 only, arch.type is {self.type}")
            elif self.num_heads % self.num_kv_heads:
                yield Problem("num_kv_heads", f"{self.num_kv_heads} does not divide arch.num_heads = {self.num_heads}")


@dataclass
class TokenizerConfig:
    """Which tokenizer a model uses."""

    path: str | None = opt(None, "run directory, local directory or hub id; null = the model's own")
    train: Literal["none", "bpe", "word", "char"] = opt(
        "none", "train one on the data (model.init=scratch): byte-level BPE, words with their spaces, or characters"
    )
    vocab_size: int = opt(4096, "largest vocabulary of a trained tokenizer", ge=16)
    extra_tokens: list[str] = opt([], "tokens to add, such as runs of whitespace for code; embeddings are resized")


@dataclass
class TrainableConfig:
    """Which parameters of the model are trained (without LoRA)."""

    mode: Literal["all", "last_layers", "patterns", "lisa"] = opt(
        "all", "all; the last blocks + final norm; names that match patterns; or LISA (arXiv 2403.17919)"
    )
    last_layers: int = opt(1, "mode last_layers: how many of the last blocks", ge=0)
    patterns: list[str] = opt([], "mode patterns: regular expressions searched in parameter names")
    lisa_layers: int = opt(2, "mode lisa: middle blocks trained at a time; embeddings and head always are", ge=1)
    lisa_interval: int = opt(20, "mode lisa: steps between two draws of the blocks", ge=1)

    def check(self) -> Iterator[Problem]:
        if self.mode == "patterns" and not self.patterns:
            yield Problem("patterns", "is empty; name at least one pattern such as 'layers\\.3\\.'")


@dataclass
class LoadedModelConfig:
    """A model that exists, and what of it is trained."""

    path: str | None = opt(None, "run directory, local HF directory, or hub id")
    revision: str | None = opt(None, "branch, tag or commit of a hub id")
    dtype: Literal["auto", "bf16", "fp32", "fp16"] = opt(
        "auto", "precision of weights and matrix products; auto = bf16 on a GPU (fp16 where it lacks that), fp32 on CPU"
    )
    attn_implementation: Literal["auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3"] = opt(
        "auto", "attention kernel; auto = what transformers picks"
    )
    gradient_checkpointing: bool = opt(False, "recompute activations in the backward pass: less memory, 1/3 slower")
    trust_remote_code: bool = opt(False, "run Python code that comes with a model; only for sources you trust")
    quantization: Literal["none", "nf4"] = opt("none", "nf4: 4-bit frozen weights under LoRA (QLoRA); GPU only")
    trainable: TrainableConfig = section(TrainableConfig, "which parameters are trained")

    def check(self) -> Iterator[Problem]:
        if not self.path:
            yield Problem("path", "is required: a run directory, a local HF directory or a hub id")


@dataclass
class ModelConfig(LoadedModelConfig):
    """The model to start from: one that exists, or a new one."""

    init: Literal["pretrained", "scratch"] = opt("pretrained", "load weights, or make random ones from model.arch")
    arch: ArchConfig = section(ArchConfig, "architecture of a model from scratch")
    tokenizer: TokenizerConfig = section(TokenizerConfig, "tokenizer")

    def check(self) -> Iterator[Problem]:
        if self.init == "pretrained":
            if not self.path:
                yield Problem(
                    "path",
                    "is required: a run directory, a local HF directory or a hub id"
                    " (or model.init=scratch for a new model)",
                )
            if self.tokenizer.train != "none":
                yield Problem(
                    "tokenizer.train",
                    f"{self.tokenizer.train} needs model.init=scratch: a pretrained model comes with its tokenizer",
                )
        else:
            if self.path:
                yield Problem("path", "contradicts model.init=scratch; drop one of the two")
            if self.tokenizer.train == "none" and not self.tokenizer.path:
                yield Problem(
                    "tokenizer",
                    "a model from scratch needs model.tokenizer.train=bpe|word|char or model.tokenizer.path",
                )
            if self.quantization != "none":
                yield Problem("quantization", "nf4 needs pretrained weights")
        if self.tokenizer.train != "none" and self.tokenizer.path:
            yield Problem("tokenizer.path", "contradicts model.tokenizer.train; drop one of the two")


@dataclass
class LoraConfig:
    """Low-rank adapters (arXiv 2106.09685)."""

    enabled: bool = opt(False, "train an adapter instead of the model")
    r: int = opt(16, "rank of the adapter matrices", ge=1)
    alpha: float = opt(32.0, "scale is alpha / r", gt=0)
    dropout: float = opt(0.0, "dropout in front of the adapter", ge=0, lt=1)
    target_modules: str | list[str] = opt("all-linear", "module names, or all-linear (every linear layer but the head)")


@dataclass
class MergeConfig:
    """Which adapter is merged, into what, and how the result is written."""

    adapter: str | None = opt(None, "run directory of a LoRA run, or a folder in PEFT's layout")
    base: str | None = opt(
        None, "run directory, local HF directory or hub id; null = the one named by the manifest or adapter_config.json"
    )
    base_revision: str | None = opt(None, "branch, tag or commit of a hub id")
    output_dtype: Literal["auto", "bf16", "fp32", "fp16"] = opt(
        "auto", "precision of the written weights; auto = that of the base. The arithmetic is fp32"
    )
    max_shard_size: str = opt("5GB", "largest file of weights, e.g. 500MB or 2GiB")
    verify: Literal["auto", "always", "never"] = opt(
        "auto", "compare the result with base + adapter on a few inputs; auto = when two models fit into memory"
    )
    allow_pickle: bool = opt(False, "read adapter_model.bin, a pickle (tensors only); for sources you trust")
    trust_remote_code: bool = opt(False, "run Python code that comes with the base; only for sources you trust")

    def check(self) -> Iterator[Problem]:
        if not self.adapter:
            yield Problem("adapter", "is required: a run directory of a LoRA run, or a folder in PEFT's layout")
        size = re.fullmatch(r"(\d+(\.\d+)?)\s*([KMGT]i?)?B", self.max_shard_size, re.IGNORECASE)
        if size is None or float(size[1]) == 0:
            yield Problem("max_shard_size", f"got {self.max_shard_size!r}; allowed: a size such as 500MB, 5GB or 2GiB")
