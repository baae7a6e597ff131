"""What tests/test_loss_sharded.py runs on each rank: the fused loss under DeepSpeed against logits in one process."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf_cli.models.head import IGNORE, enable_loss
from rlhf_cli.models.load import enable_gradient_checkpointing, load_policy
from rlhf_cli.models.lora import add_lora, plain_model
from rlhf_cli.runtime.distributed import Ranks
from rlhf_cli.runtime.engine import gathered_state_dict, make_engine, param_groups, sharded_loading
from rlhf_cli.runtime.engine_fragments import ensure_moments, whole
from rlhf_cli.schema import DeepspeedConfig, LoraConfig, ModelConfig, OptimConfig
from tests.tiny_models import tiny_model

FP32 = torch.float32


class LogitsWatch(TorchDispatchMode):
    """Notes the most rows of logits that any operation inside makes. vocab, width: of the model; the head's weight has
    as many columns as the model is wide, and is none of them."""

    def __init__(self, vocab: int, width: int) -> None:
        super().__init__()
        self.vocab, self.width, self.largest = vocab, width, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.shape[-1:] == (self.vocab,) and out.shape[0] != self.width:
            self.largest = max(self.largest, out.numel() // self.vocab)
        return out


def stage_config(stage: int) -> DeepspeedConfig:
    return DeepspeedConfig(name=f"zero{stage}", json={"zero_optimization": {"stage": stage}})


def build(kind: str) -> nn.Module:
    arch = "gpt2" if "gpt2" in kind else "gpt_neox" if "gpt_neox" in kind else "llama"
    model = tiny_model(arch, tie="tied" in kind)
    if "checkpointing" in kind:
        enable_gradient_checkpointing(model)
    if "lora" not in kind:
        return model.train()
    targets: str | list[str] = ["q_proj", "lm_head"] if "head" in kind else "all-linear"
    lora = LoraConfig(enabled=True, r=4, target_modules=targets)
    wrapped = add_lora(model, lora, train_embeddings="embeddings" in kind)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return wrapped.train()


def micro_batches(rank: int, vocab: int) -> list[tuple[Tensor, Tensor]]:
    """Two (ids, targets) per rank, of other lengths on each rank; rank 1's second one trains nothing."""
    generator = torch.Generator().manual_seed(10 + rank)
    batches = []
    for i in range(2):
        ids = torch.randint(3, vocab, (2, 6 + 3 * rank + i), generator=generator)
        targets = torch.where(torch.rand(ids[:, 1:].shape, generator=generator) < 0.6, ids[:, 1:], IGNORE)
        if (rank, i) == (1, 1):
            targets = torch.full_like(targets, IGNORE)
        batches.append((ids[:, :-1], targets))
    return batches


def fused_against_logits(ranks: Ranks, stage: int, kind: str) -> tuple[float, float, int]:
    """(difference of the losses, largest difference of a gradient relative to its norm, gradients compared)."""
    reference, model = build(kind), build(kind)
    vocab = plain_model(model).config.vocab_size
    everything = [b for r in range(ranks.world_size) for b in micro_batches(r, vocab)]
    count = sum(int((t != IGNORE).sum()) for _, t in everything)
    expected = []
    for ids, targets in everything:
        logits = reference(input_ids=ids, use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")
        (loss / count).backward()
        expected.append(loss.item())
    enable_loss(model)
    optim = OptimConfig(lr=1e-3, max_grad_norm=0.0)
    engine = make_engine(model, param_groups(model, 0.0), optim, stage_config(stage), FP32, ranks)
    found = []
    ensure_moments(engine)
    for ids, targets in micro_batches(ranks.rank, vocab):
        out = engine.forward(input_ids=ids, targets=targets)
        engine.backward(out.loss_sum / count)
        found.append(out.loss_sum.item())
    engine.step(1e-3)
    loss_error = max(abs(a - b) for a, b in zip(found, expected[2 * ranks.rank :], strict=False))
    grads = {n: p.grad for n, p in reference.named_parameters() if p.grad is not None}
    # After one step Adam's first moment is (1 − 0.9) times the gradient.
    moments = {n: whole(engine, p, "exp_avg") for n, p in engine.module.named_parameters() if p.requires_grad}
    assert set(moments) == set(grads)
    scale = max(float(g.norm()) for g in grads.values())
    grad_error = max(float((10 * moments[n].view_as(g) - g).norm()) / scale for n, g in grads.items())
    engine.destroy()
    return loss_error, grad_error, len(grads)


def sharded_load_and_grow(ranks: Ranks, path: str, num_tokens: int, norm: str) -> tuple[float, dict[str, list[float]]]:
    """Loss after a sharded load with new tokens, and the weights as rank 0 gathers them (none elsewhere)."""
    with sharded_loading(stage_config(3), FP32):
        model = load_policy(ModelConfig(path=path), path, FP32, num_tokens=num_tokens)
    assert hasattr(model.get_decoder().get_parameter(norm), "ds_id")
    plan = enable_loss(model)
    assert plan.path == "fused"
    engine = make_engine(model, param_groups(model, 0.0), OptimConfig(), stage_config(3), FP32, ranks)
    ids, targets = micro_batches(0, 20)[0]
    loss = engine.forward(input_ids=ids, targets=targets).loss_sum
    engine.backward(loss)
    weights = {n: t.flatten().tolist() for n, t in gathered_state_dict(engine).items()}
    engine.destroy()
    return loss.item(), weights
