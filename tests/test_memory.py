"""Estimates against hand arithmetic (LLaMA-7B), and against what autograd really keeps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, PretrainedConfig

from rlhf_cli.models.lora import add_lora
from rlhf_cli.models.memory import MemoryEstimate, estimate_memory
from rlhf_cli.models.scratch import make_config, new_model
from rlhf_cli.models.trainable import count_parameters
from rlhf_cli.schema import ArchConfig, DeepspeedConfig, LoraConfig, ModelConfig, TrainableConfig
from tests.tiny_models import ARCHS, tiny_config, tiny_model, tiny_tokenizer

LLAMA_7B = LlamaConfig()
BLOCK = 4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096
EDGE = 32000 * 4096
PARAMS = 32 * BLOCK + 2 * EDGE + 4096  # 6,738,415,616, the published number


def estimate(
    config: PretrainedConfig = LLAMA_7B,
    model: ModelConfig | None = None,
    lora: LoraConfig | None = None,
    zero: dict[str, object] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    world_size: int = 8,
    micro_batch_size: int = 1,
    length: int = 512,
    on_cpu: bool = False,
) -> MemoryEstimate:
    return estimate_memory(
        config,
        model or ModelConfig(),
        lora or LoraConfig(),
        DeepspeedConfig(json={"zero_optimization": zero or {"stage": 3}}),
        dtype,
        world_size,
        micro_batch_size,
        length,
        on_cpu,
    )


def test_llama_7b_by_hand() -> None:
    assert PARAMS == 6_738_415_616
    found = estimate()
    assert (found.total_params, found.trainable_params) == (PARAMS, PARAMS)
    # ZeRO-3 on 8 ranks: (2 + 4 + 12) P / 8
    assert found.weights + found.gradients + found.optimizer == 18 * PARAMS // 8
    assert found.gathered == 2 * (2 * BLOCK + EDGE)
    assert found.buckets == 2 * 500_000_000  # DeepSpeed's reduce_bucket_size, less than P
    two = estimate(zero={"stage": 2, "reduce_bucket_size": 1000})
    assert (two.weights, two.gradients, two.optimizer) == (2 * PARAMS, 4 * PARAMS // 8, 12 * PARAMS // 8)
    assert (two.gathered, two.buckets) == (0, 2000)
    one = estimate(zero={"stage": 1})
    assert (one.gradients, one.optimizer, one.buckets) == (4 * PARAMS, 12 * PARAMS // 8, 2 * 500_000_000)
    # per position: 6h + (2 + 2) h + 4 I
    assert found.activations == 2 * 512 * 32 * (10 * 4096 + 4 * 11008)
    recomputed = estimate(model=ModelConfig(gradient_checkpointing=True))
    assert recomputed.activations == 2 * 512 * (32 * 4096 + 10 * 4096 + 4 * 11008)
    eager = estimate(model=ModelConfig(attn_implementation="eager"))
    assert eager.activations - found.activations == 2 * 512 * 32 * 3 * 32 * 512


def test_offload_moves_bytes_to_the_host() -> None:
    plain = estimate()
    optimizer = estimate(zero={"stage": 3, "offload_optimizer": {"device": "cpu"}})
    assert optimizer.host == plain.optimizer + plain.gradients
    assert optimizer.device == plain.device - optimizer.host
    everything = estimate(zero={"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}})
    assert everything.host == optimizer.host + plain.weights
    assert everything.device == plain.device - everything.host


def test_lora_and_nf4() -> None:
    lora = LoraConfig(enabled=True, r=8)
    found = estimate(lora=lora, zero={"stage": 2}, world_size=1)
    adapter = 32 * 8 * (4 * 8192 + 3 * (4096 + 11008))
    assert found.trainable_params == adapter
    assert found.weights == 2 * (PARAMS + adapter)
    assert found.gradients + found.optimizer == 16 * adapter
    quantised = estimate(model=ModelConfig(quantization="nf4"), lora=lora, zero={"stage": 2}, world_size=1)
    linear = 32 * (BLOCK - 2 * 4096)
    assert quantised.weights == pytest.approx(found.weights - linear * (2 - 4.127 / 8), abs=2)
    tiny = LoraConfig(enabled=True, r=4)
    counted = count_parameters(add_lora(tiny_model(), tiny)).trainable
    assert estimate(tiny_config(), lora=tiny).trainable_params == counted


def test_a_frozen_head_has_no_gradient_buffer() -> None:
    last = ModelConfig(trainable=TrainableConfig(mode="last_layers", last_layers=1))
    found = estimate(model=last)
    assert found.trainable_params == BLOCK + 4096
    assert estimate().head - found.head == 4 * EDGE
    # logits of a chunk three times, hidden states twice
    assert found.head == 12 * 512 * 32000 + 2 * 2 * 512 * 4096


@pytest.mark.parametrize("arch", ARCHS)
def test_activations_are_near_what_autograd_keeps(arch: str) -> None:
    shape = ArchConfig(type=arch, hidden_size=128, num_layers=3, num_heads=4)  # type: ignore[arg-type]
    config = make_config(shape, tiny_tokenizer(), 128)
    model = new_model(config, torch.float32, 0).train()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.randint(3, config.vocab_size, (2, 128))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    assert hidden.requires_grad
    measured = sum(t.untyped_storage().nbytes() for t in kept.values())
    found = estimate(config, dtype=torch.float32, world_size=1, micro_batch_size=2, length=128)
    assert 0.75 < found.activations / measured < 1.25
