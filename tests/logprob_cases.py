"""What tests/test_logprobs_call.py runs on each rank: model(logprobs=True) under DeepSpeed against plain logits."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rlhf_cli.models.head import IGNORE, enable_loss
from rlhf_cli.models.lora import plain_model
from rlhf_cli.runtime.distributed import Ranks
from rlhf_cli.runtime.engine import make_engine, param_groups
from rlhf_cli.runtime.engine_fragments import ensure_moments, whole
from rlhf_cli.schema import OptimConfig
from tests.loss_cases import FP32, build, micro_batches, stage_config


def naive_logprobs(model: nn.Module, ids: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(log-probabilities, entropies) (N,) of the positions with a target, from the model's own logits."""
    kept = targets != IGNORE
    log_p = torch.log_softmax(model(input_ids=ids, use_cache=False).logits.float()[kept] / temperature, -1)
    return log_p.gather(-1, targets[kept, None]).squeeze(-1), -(log_p.exp() * log_p).sum(-1)


def coefficients(count: int) -> Tensor:
    """(N,): what the gradient of each log-probability is multiplied with; of both signs."""
    return torch.linspace(-1, 2, max(count, 1))[:count]


def under_deepspeed(ranks: Ranks, stage: int, kind: str) -> tuple[float, float, int]:
    """(largest difference of a log-probability or entropy, of a gradient relative to their norm, gradients compared).

    Temperature 0.7; the loss is Σ coefficient · log p over the micro-batches of all ranks.
    """
    reference, model = build(kind), build(kind)
    vocab = plain_model(model).config.vocab_size
    expected = []
    for rank in range(ranks.world_size):
        for ids, targets in micro_batches(rank, vocab):
            logprobs, entropies = naive_logprobs(reference, ids, targets, 0.7)
            (logprobs * coefficients(len(logprobs))).sum().backward()
            expected.append(torch.stack([logprobs, entropies]).detach())
    enable_loss(model)
    optim = OptimConfig(lr=1e-3, max_grad_norm=0.0)
    engine = make_engine(model, param_groups(model, 0.0), optim, stage_config(stage), FP32, ranks)
    ensure_moments(engine)
    found = []
    for ids, targets in micro_batches(ranks.rank, vocab):
        inputs = {"input_ids": ids, "targets": targets, "logprobs": True, "temperature": 0.7}
        with torch.no_grad():
            before = engine.forward(**inputs)
        out = engine.forward(**inputs)
        assert torch.equal(before.logprobs, out.logprobs)
        engine.backward((out.logprobs * coefficients(len(out.logprobs))).sum())
        found.append(torch.stack([out.logprobs, out.entropy]).detach())
    engine.step(1e-3)
    error = max(
        float((a - b).abs().max()) if a.numel() else 0.0
        for a, b in zip(found, expected[2 * ranks.rank :], strict=False)
    )
    grads = {n: p.grad for n, p in reference.named_parameters() if p.grad is not None}
    # After one step Adam's first moment is (1 − 0.9) times the gradient.
    moments = {n: whole(engine, p, "exp_avg") for n, p in engine.module.named_parameters() if p.requires_grad}
    assert set(moments) == set(grads)
    scale = max(float(g.norm()) for g in grads.values())
    grad_error = max(float((10 * moments[n].view_as(g) - g).norm()) / scale for n, g in grads.items())
    engine.destroy()
    return error, grad_error, len(grads)
