"""Figures and samples at their edges: work per token, random streams of GPUs, the last position of a model."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rlhf_cli.models.lora import add_lora
from rlhf_cli.models.trainable import apply_trainable, multiplied_parameters
from rlhf_cli.rollout.sampler import Request, generate
from rlhf_cli.runtime.flops import flops_per_token
from rlhf_cli.schema import LoraConfig, RolloutConfig, TrainableConfig
from tests.tiny_models import tiny_model, tiny_tokenizer


def test_work_per_token() -> None:
    """Forward 2, activations' gradient 2, weights' gradient 2 where trained: 4 x 10 + 2 x 3."""
    assert flops_per_token(3, 10) == 46


@pytest.mark.parametrize("tie", [False, True])
def test_embeddings_that_are_the_head_too_are_multiplied(tie: bool) -> None:
    model = tiny_model(tie=tie)
    matrix = model.get_input_embeddings().weight.numel()
    everything = sum(p.numel() for p in model.parameters())  # a tied matrix stands once
    expected = everything if tie else everything - matrix
    assert multiplied_parameters(model) == (expected, expected)
    apply_trainable(model, TrainableConfig(mode="last_layers", last_layers=1))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert multiplied_parameters(model) == (trained, expected), "frozen embeddings take nothing from what is trained"


def test_random_weights_leave_the_gpus_generators_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank's GPU draws its own dropout; a model made with the same seed everywhere must not make them alike."""
    touched: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", touched.append)
    torch.manual_seed(1)
    assert touched == [1], "canary: torch.manual_seed goes through here"
    state = torch.get_rng_state()
    add_lora(tiny_model(), LoraConfig(enabled=True, r=2), seed=3)
    assert touched == [1]
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
@pytest.mark.parametrize(("prompt_length", "new_tokens"), [(3, 6), (1022, 2), (1500, 1)])
def test_samples_end_at_the_models_last_position(arch: str, prompt_length: int, new_tokens: int) -> None:
    """1024 positions: GPT-2 has no embedding for another one."""
    model, tokenizer = tiny_model(arch, seed=2), tiny_tokenizer()
    endless = RolloutConfig(max_new_tokens=6, min_new_tokens=6)
    request = Request(np.full(prompt_length, 20, np.int32), sample=0, max_new_tokens=6)
    (response,) = generate(model, tokenizer, [request], endless, (), seed=0)
    assert len(response.token_ids) == new_tokens
    assert response.ending == "length"
