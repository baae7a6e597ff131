"""The fused loss under ZeRO on two ranks, each with other lengths: equal to the logits of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_cli.models.head import enable_loss
from rlhf_cli.models.load import load_policy
from rlhf_cli.models.save import save_model
from rlhf_cli.schema import ModelConfig
from tests.loss_cases import micro_batches
from tests.tiny_models import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.distributed

CASE = "tests.loss_cases:fused_against_logits"
KINDS = [
    "llama",
    "llama tied",
    "gpt2 tied",
    "gpt_neox",
    "llama checkpointing",
    "llama lora",
    "llama lora checkpointing",
    "llama lora embeddings",
    "llama tied lora embeddings",
    "llama lora head",
]


@pytest.mark.parametrize("kind", KINDS)
def test_zero3(run_on_ranks: Any, kind: str) -> None:
    for loss_error, grad_error, compared in run_on_ranks(2, CASE, stage=3, kind=kind):
        assert loss_error < 2e-5
        assert grad_error < 1e-6
        assert compared > 5


@pytest.mark.parametrize("kind", ["llama tied", "llama lora head"])
def test_zero2(run_on_ranks: Any, kind: str) -> None:
    for loss_error, grad_error, _ in run_on_ranks(2, CASE, stage=2, kind=kind):
        assert loss_error < 2e-5
        assert grad_error < 1e-6


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_a_sharded_load_grows_as_a_whole_one(run_on_ranks: Any, tmp_path: Path, arch: str) -> None:
    model, tokenizer = tiny_model(arch, tie=arch == "gpt2"), tiny_tokenizer()
    save_model(model.config, dict(model.state_dict()), tmp_path / "m", tokenizer)
    grown = len(tokenizer) + 3
    whole = load_policy(ModelConfig(), tmp_path / "m", torch.float32, num_tokens=grown)
    enable_loss(whole)
    ids, targets = micro_batches(0, 20)[0]
    case = {
        "path": str(tmp_path / "m"),
        "num_tokens": grown,
        "norm": "ln_f.weight" if arch == "gpt2" else "norm.weight",
    }
    loss, weights = run_on_ranks(2, "tests.loss_cases:sharded_load_and_grow", **case)[0]
    assert loss == pytest.approx(whole(input_ids=ids, targets=targets).loss_sum.item(), rel=1e-5)
    for name, tensor in whole.state_dict().items():
        assert weights[name] == tensor.flatten().tolist(), name
