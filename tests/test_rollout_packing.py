"""Packed weights: the same logits and texts, which layers they are for, and nothing left behind."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from rlhf_cli.models.head import enable_loss
from rlhf_cli.models.lora import add_lora
from rlhf_cli.rollout import packing
from rlhf_cli.rollout.packing import packed_linears
from rlhf_cli.rollout.sampler import Request, generate
from rlhf_cli.schema import LoraConfig, RolloutConfig
from tests.tiny_models import ARCHS, noisy, tiny_model, tiny_tokenizer


@pytest.fixture
def packs_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny layers, too."""
    monkeypatch.setattr(packing, "SMALLEST", 1)


def packed(model: nn.Module) -> set[str]:
    """Names of the layers that are packed."""
    with packed_linears(model):
        return {name for name, m in model.named_modules() if "forward" in m.__dict__ and "packed" in str(m.forward)}


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=torch.arange(3, 24).view(3, 7)).logits


@pytest.mark.usefixtures("packs_all")
@pytest.mark.parametrize("kind", ARCHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_layers_compute_the_same(kind: str, dtype: torch.dtype) -> None:
    """All matrices but the embeddings: q k v o gate up down, GPT-2's qkv o up down, GPT-NeoX's the same; the head."""
    model = tiny_model(kind).to(dtype)
    wanted = logits(model)
    assert len(packed(model)) == 1 + 2 * {"llama": 7, "qwen3": 7, "gpt2": 4, "gpt_neox": 4}[kind]
    with packed_linears(model):
        found = logits(model)
    tolerance = 1e-5 if dtype == torch.float32 else 2**-6 * wanted.abs().max().item()
    assert (found - wanted).abs().max() < tolerance
    assert torch.equal(logits(model), wanted)


@pytest.mark.usefixtures("packs_all")
@pytest.mark.parametrize("batch_size", [1, 4])
def test_adapters_and_a_taught_head_write_the_same(batch_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = add_lora(tiny_model("llama"), LoraConfig(enabled=True, r=4), seed=0)
    noisy(model)
    enable_loss(model)
    asked = [Request(np.arange(3, 5 + i, dtype=np.int32), i, 12) for i in range(6)]
    texts = lambda: [
        r.token_ids.tolist()
        for r in generate(model, tiny_tokenizer(), asked, RolloutConfig(batch_size=batch_size), (), 1)
    ]
    names = packed(model)
    assert any(name.endswith("q_proj.base_layer") for name in names)
    assert any(name.endswith("q_proj.lora_A.default") for name in names)
    assert any(name.endswith("lm_head") for name in names)
    found = texts()
    monkeypatch.setattr(packing, "MOST_BYTES", 0)
    assert found == texts()


@pytest.mark.usefixtures("packs_all")
def test_layers_are_as_before_afterwards() -> None:
    model = tiny_model("llama")
    enable_loss(model)
    before = {name: dict(m.__dict__) for name, m in model.named_modules()}
    with pytest.raises(KeyError), packed_linears(model):
        raise KeyError
    assert {name: dict(m.__dict__) for name, m in model.named_modules()} == before
    assert "forward" in before["lm_head"]
    assert "forward" not in before["model.layers.0.mlp.up_proj"]


class Doubling(nn.Linear):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(hidden)


class Quantised(nn.Parameter):
    pass


def test_other_layers_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    width = int(packing.SMALLEST**0.5)
    linear = lambda: nn.Linear(width, width)
    hooked, sharded, quantised = linear(), linear(), linear()
    hooked.forward = hooked.forward  # type: ignore[method-assign]
    sharded.weight.data = torch.empty(0)
    quantised.weight = Quantised(quantised.weight.data)
    model = nn.ModuleDict(
        {
            "plain": linear(),
            "small": nn.Linear(width, width - 1),
            "fp16": linear().to(torch.float16),
            "doubling": Doubling(width, width),
            "hooked": hooked,
            "sharded": sharded,
            "quantised": quantised,
            "elsewhere": nn.Linear(width, width, device="meta"),
        }
    )
    assert packed(model) == {"plain"}
    monkeypatch.setattr(packing, "MOST_BYTES", 4 * width**2)
    assert packed(model) == {"plain"}
    monkeypatch.setattr(packing, "MOST_BYTES", 4 * width**2 - 1)
    assert packed(model) == set()
