"""Bytes that a run will need per rank, from a config alone: nothing is loaded.

P parameters, T of them trained, N ranks, w bytes of a weight (2 in bf16 and fp16, 4 in fp32).

    weights     w·P, a share of 1/N under ZeRO-3
    gathered    ZeRO-3: w·(two blocks + the larger of embeddings and head), whole while they are used
    gradients   4·T (summed in fp32), 1/N from ZeRO-2 on
    optimizer   12·T/N: fp32 master weights and Adam's two moments (DeepSpeed keeps masters in fp32 training too)
    buckets     w·min(T, reduce_bucket_size), gradients on their way
    activations per position and block: 6h of norms and residuals, (2·heads + 2·kv)·d of attention, and for the MLP of
                width I: 4·I when gated, 5·I with gelu_new (computed in five steps), else 2·I; eager attention adds
                3·heads·length. Counted on what autograd saves; right to about 20 %. With gradient checkpointing h per
                block, and all of that for one block.
    head        logits of one chunk three times in fp32, hidden states of the trained positions twice, and the fp32
                gradient of the head's weight if it is trained; of a reward model (whose micro-batch is one of
                sequences) the hidden states and their gradient alone, the rest is a few rows

Without a backward: `reading_bytes` (one block's activations, and what the head makes), `cache_bytes` (keys and values,
2·blocks·kv·d·w of a token), `logit_bytes` (of one token a sequence).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from rlhf_cli.models.load import auto_class, is_classifier
from rlhf_cli.models.lora import linear_modules, lora_targets
from rlhf_cli.models.trainable import apply_trainable, count_parameters, find_blocks
from rlhf_cli.ops.logprobs import chunk_rows
from rlhf_cli.schema import DeepspeedConfig, LoadedModelConfig, LoraConfig

DEFAULT_BUCKET = 500_000_000  # DeepSpeed's reduce_bucket_size, in elements
NF4_BYTES = 4.127 / 8  # per weight of a linear layer, with double quantisation (arXiv 2305.14314, section 3)


@dataclass(frozen=True)
class MemoryEstimate:
    """Parameters, and bytes of one rank by purpose; `host` is what offloading puts into the machine's memory."""

    total_params: int
    trainable_params: int
    weights: int
    gathered: int
    gradients: int
    optimizer: int
    buckets: int
    activations: int
    head: int
    host: int

    @property
    def device(self) -> int:
        """Bytes on the training device."""
        return (
            self.weights + self.gathered + self.gradients + self.optimizer + self.buckets + self.activations + self.head
        )


def meta_model(config: PretrainedConfig, attn_implementation: str | None = None) -> PreTrainedModel:
    """The causal LM or sequence classifier of a config with shapes and names, without storage."""
    with torch.device("meta"):
        model: PreTrainedModel = auto_class(config).from_config(config, attn_implementation=attn_implementation)
    return model


def estimate_memory(
    config: PretrainedConfig,
    model: LoadedModelConfig,
    lora: LoraConfig,
    deepspeed: DeepspeedConfig,
    dtype: torch.dtype,
    world_size: int,
    micro_batch_size: int,
    length: int,
    on_cpu: bool,
) -> MemoryEstimate:
    """What one rank needs for micro-batches of (micro_batch_size, length) tokens; formulas at the top of this file."""
    shell = meta_model(config, None if model.attn_implementation == "auto" else model.attn_implementation)
    total, trained = _count(shell, model, lora)
    w = torch.finfo(dtype).bits // 8
    zero = deepspeed.json.get("zero_optimization") or {}
    stage = max(1, deepspeed.zero_stage)  # zero0 is run as stage 1
    share = lambda n: -(-n // world_size)
    weights = w * total
    if model.quantization == "nf4":
        weights -= round((w - NF4_BYTES) * _linear_params(shell))
    sizes = {
        "weights": share(weights) if stage == 3 else weights,
        "gathered": w * _largest_live(shell) if stage == 3 and world_size > 1 else 0,
        "gradients": share(4 * trained) if stage >= 2 else 4 * trained,
        "optimizer": share(12 * trained),
        "buckets": w * min(trained, _bucket(zero)),
        "activations": w * _activations(shell, model.gradient_checkpointing, micro_batch_size, length),
        "head": _head(shell, w, micro_batch_size * length, on_cpu, not lora.enabled),
    }
    host = 0
    if _device(zero, "offload_optimizer") != "none":
        host += sizes["optimizer"] + sizes["gradients"]
        sizes |= {"optimizer": 0, "gradients": 0}
    if _device(zero, "offload_param") != "none":
        host += sizes["weights"]
        sizes["weights"] = 0
    return MemoryEstimate(total, trained, host=host, **sizes)


def _count(shell: PreTrainedModel, model: LoadedModelConfig, lora: LoraConfig) -> tuple[int, int]:
    """(total, trained) parameters."""
    if not lora.enabled:
        apply_trainable(shell, model.trainable)
        trained, total = count_parameters(shell)
        return total, trained
    adapter = _adapter(shell, lora)
    return count_parameters(shell).total + adapter, adapter


def _adapter(shell: PreTrainedModel, lora: LoraConfig) -> int:
    modules = dict(shell.named_modules())
    # A (r, in) and B (out, r)
    adapter = sum(lora.r * sum(modules[name].weight.shape) for name in lora_targets(shell, lora))
    if is_classifier(shell.config):
        adapter += shell.score.weight.numel()  # the trained copy of the head
    return adapter


def cache_bytes(config: PretrainedConfig, dtype: torch.dtype, sequences: int, length: int) -> int:
    """Keys and values of so many sequences of `length` tokens while they are being written."""
    settings = config.get_text_config()
    heads = settings.num_attention_heads
    kv = getattr(settings, "num_key_value_heads", None) or heads
    head_dim = getattr(settings, "head_dim", None) or settings.hidden_size // heads
    return 2 * settings.num_hidden_layers * kv * head_dim * dtype.itemsize * sequences * length


def logit_bytes(config: PretrainedConfig, sequences: int) -> int:
    """Logits of the next token, what sampling makes of them, and its noise, all in fp32."""
    return 3 * 4 * sequences * config.get_text_config().vocab_size


def reading_bytes(config: PretrainedConfig, dtype: torch.dtype, sequences: int, length: int, on_cpu: bool) -> int:
    """A forward pass that nothing is kept of: one block's activations, and log-probabilities or scores."""
    shell, w = meta_model(config), dtype.itemsize
    block = _per_position(shell, length) + 2 * shell.config.get_text_config().hidden_size
    return sequences * length * w * block + _head(shell, w, sequences * length, on_cpu, False)


def adapter_params(config: PretrainedConfig, lora: LoraConfig) -> int:
    """Parameters of an adapter on the model of a config; of a classifier with the copy of the head."""
    return _adapter(meta_model(config), lora)


def largest_live(config: PretrainedConfig) -> int:
    """Parameters that ZeRO-3 gathers at a time in a forward or backward pass."""
    return _largest_live(meta_model(config))


def _activations(shell: PreTrainedModel, checkpointing: bool, micro_batch_size: int, length: int) -> int:
    """Elements that the blocks keep for the backward."""
    per_position, blocks = _per_position(shell, length), len(find_blocks(shell))
    hidden = shell.config.get_text_config().hidden_size
    elements = blocks * hidden + per_position if checkpointing else blocks * per_position
    return micro_batch_size * length * elements


def _per_position(shell: PreTrainedModel, length: int) -> int:
    """Elements that a block makes of one position of a sequence of `length`."""
    config = shell.config.get_text_config()
    hidden, heads = config.hidden_size, config.num_attention_heads
    kv = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    names = {name.rsplit(".", 1)[-1] for name, _ in find_blocks(shell).named_modules()}
    if names & {"gate_proj", "gate_up_proj"}:
        mlp_factor = 4
    else:
        mlp_factor = 5 if "gelu_new" in str(getattr(config, "activation_function", "")) else 2
    intermediate = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * hidden
    per_position = 6 * hidden + (2 * heads + 2 * kv) * head_dim + mlp_factor * intermediate
    if config._attn_implementation == "eager":
        per_position += 3 * heads * length
    return per_position


def _head(shell: PreTrainedModel, w: int, positions: int, on_cpu: bool, full: bool) -> int:
    """Bytes of the fused loss or of scores; full: the model's own weights train, as far as their requires_grad says."""
    config = shell.config.get_text_config()
    if is_classifier(shell.config):
        return 2 * w * positions * config.hidden_size
    rows = min(positions, chunk_rows(config.vocab_size, on_cpu))
    head = shell.get_output_embeddings()
    trained = full and head is not None and head.weight.requires_grad
    gradient = 4 * config.vocab_size * config.hidden_size if trained else 0
    return 3 * 4 * rows * config.vocab_size + 2 * w * positions * config.hidden_size + gradient


def _linear_params(shell: PreTrainedModel) -> int:
    modules = dict(shell.named_modules())
    return sum(modules[name].weight.numel() for name in linear_modules(shell))


def _largest_live(shell: PreTrainedModel) -> int:
    blocks = find_blocks(shell)
    edges = [m for m in (shell.get_input_embeddings(), shell.get_output_embeddings()) if m is not None]
    return 2 * max(count_parameters(b).total for b in blocks) + max(count_parameters(m).total for m in edges)


def _bucket(zero: dict[str, Any]) -> int:
    size = zero.get("reduce_bucket_size", DEFAULT_BUCKET)
    return int(size) if isinstance(size, int | float) else DEFAULT_BUCKET


def _device(zero: dict[str, Any], key: str) -> str:
    return str((zero.get(key) or {}).get("device", "none"))
