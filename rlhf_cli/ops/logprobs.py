"""Losses and log-probabilities straight from hidden states; the logits exist for one chunk of rows at a time.

Shapes: B sequences, T positions, N rows (any choice of positions), C rows of one chunk, H width, V vocabulary.
Every row i predicts targets[i]; which position that is (the shift by one) is the caller's business.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

MIB = 1 << 20


class LogitTransform(NamedTuple):
    """What a model does after its head: logits = cap·tanh(s·(h·Wᵀ + b)/cap)/τ.

    scale: s, Cohere's logit_scale or 1 / Granite's logits_scaling; softcap: cap, Gemma 2's final_logit_softcapping,
    None for none; temperature: τ.
    """

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0


IDENTITY = LogitTransform()


def chunk_rows(vocab_size: int, on_cpu: bool) -> int:
    """Rows per chunk (C).

    Measured on CPU: a chunk of fp32 logits that stays near the cache is fastest (16 MiB: V=4096, C=1024), but below
    some 500 rows the pass over the (V, H) weight gradient costs more than the product (V=32000). 64 MiB is the limit.
    A GPU needs larger chunks to be busy.
    """
    if on_cpu:
        row = 4 * vocab_size
        return max(1, 16 * MIB // row, min(512, 64 * MIB // row))
    return max(1, 512 * MIB // (4 * vocab_size))


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    token_weights: Tensor | None = None,
    chunk_size: int | None = None,
    transform: LogitTransform = IDENTITY,
) -> Tensor:
    """Σ_i w_i · −log softmax(hidden_i · Wᵀ + b)[targets_i], a scalar in fp32.

    hidden (N, H), weight (V, H), bias (V,) or None, targets (N,) in [0, V), token_weights (N,) or None for ones.
    The gradient is computed in the forward pass, when the chunk's logits are at hand, and only scaled in the
    backward: two matrix products are saved against recomputing (Liger-Kernel, arXiv 2410.10989, section 3.2).
    The weight's gradient is summed in fp32; it is skipped when the weight is frozen. Rows may be none: the loss is
    then a zero that still reaches hidden and weight in the backward. One backward per forward.
    """
    assert hidden.dim() == 2, hidden.shape
    assert targets.shape == hidden.shape[:1], (hidden.shape, targets.shape)
    rows = chunk_size or chunk_rows(weight.shape[0], hidden.device.type == "cpu")
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (hidden, weight, bias))
    if not needs_grad:
        return _CrossEntropy.run(hidden, weight, bias, targets, token_weights, rows, transform, (False,) * 3)[0]
    loss: Tensor = _CrossEntropy.apply(hidden, weight, bias, targets, token_weights, rows, transform)
    return loss


def gather_logprobs(
    hidden: Tensor,
    lm_head_weight: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    chunk_size: int | None = None,
    bias: Tensor | None = None,
    transform: LogitTransform = IDENTITY,
) -> Tensor:
    """log softmax(logits/τ)[targets], (B, T) in fp32, with gradients to hidden, weight and bias.

    hidden (B, T, H), lm_head_weight (V, H), targets (B, T) in [0, V); any leading shape works in place of (B, T).
    The backward computes each chunk's logits again from hidden and the saved log-normaliser.
    """
    assert targets.shape == hidden.shape[:-1], (hidden.shape, targets.shape)
    rows = chunk_size or chunk_rows(lm_head_weight.shape[0], hidden.device.type == "cpu")
    transform = transform._replace(temperature=temperature)
    flat, _ = _GatherLogprobs.apply(
        hidden.reshape(-1, hidden.shape[-1]), lm_head_weight, bias, targets.reshape(-1), rows, transform, False
    )
    return flat.view(targets.shape)


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    chunk_size: int | None = None,
    transform: LogitTransform = IDENTITY,
) -> tuple[Tensor, Tensor]:
    """(log softmax(logits)[targets], entropy of softmax(logits) in nats), each (N,) fp32; the second has no gradient.

    hidden (N, H), weight (V, H), bias (V,) or None, targets (N,) in [0, V). Both come from the same product; backward
    as for gather_logprobs. Rows may be none.
    """
    assert targets.shape == hidden.shape[:1], (hidden.shape, targets.shape)
    rows = chunk_size or chunk_rows(weight.shape[0], hidden.device.type == "cpu")
    logprobs, entropy = _GatherLogprobs.apply(hidden, weight, bias, targets, rows, transform, True)
    return logprobs, entropy


def entropy_of(log_p: Tensor) -> Tensor:
    """-Σ p log p of log-probabilities (C, V) -> (C,); overwrites log_p."""
    p = log_p.exp()
    # 0 · log 0 = 0: a logit of -inf, from a model that masks part of its vocabulary. torch.special.entr says the same,
    # but takes its logarithms again, at thrice the time.
    return p.mul_(log_p.clamp_(min=torch.finfo(log_p.dtype).min)).sum(-1).neg_()


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The softmax's type: fp32, but fp64 stays (gradient checks)."""
    return torch.promote_types(dtype, torch.float32)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, transform: LogitTransform) -> Tensor:
    """(C, H) -> (C, V) logits after the transform, in the weights' type, widened when the transform does work."""
    logits = hidden @ weight.T if bias is None else torch.addmm(bias, hidden, weight.T)
    if transform == IDENTITY:
        return logits
    logits = logits.to(_wide(logits.dtype))
    if transform.scale != 1.0:
        logits = logits.mul_(transform.scale)
    if transform.softcap is not None:
        logits = logits.div_(transform.softcap).tanh_().mul_(transform.softcap)
    if transform.temperature != 1.0:
        logits = logits.div_(transform.temperature)
    return logits


def _transform_backward(grad: Tensor, logits: Tensor, transform: LogitTransform) -> Tensor:
    """Gradient of the transformed logits -> of the head's raw output, in place; both (C, V)."""
    if transform.softcap is not None:
        # d(cap·tanh(x/cap))/dx = 1 − tanh², and tanh = logits·τ/cap
        grad.mul_(1 - (logits * (transform.temperature / transform.softcap)).square_())
    factor = transform.scale / transform.temperature
    return grad if factor == 1.0 else grad.mul_(factor)


class _Gradients:
    """Sums of a head's gradients over chunks. needs: for (hidden, weight, bias)."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: tuple[bool, ...]):
        self.of_weight = torch.zeros_like(weight, dtype=_wide(weight.dtype)) if needs[1] else None
        self.of_hidden = torch.empty_like(hidden) if needs[0] else None
        self.of_bias = torch.zeros_like(bias, dtype=_wide(bias.dtype)) if needs[2] and bias is not None else None

    def add(self, grad: Tensor, start: int, hidden: Tensor, weight: Tensor) -> None:
        """grad (C, V) of the raw logits of rows start..start+C of hidden (N, H)."""
        chunk = slice(start, start + len(grad))
        if self.of_bias is not None:
            self.of_bias += grad.sum(0)
        grad = grad.to(weight.dtype)
        if self.of_hidden is not None:
            self.of_hidden[chunk] = grad @ weight
        if self.of_weight is not None:
            if self.of_weight.dtype == weight.dtype:
                self.of_weight.addmm_(grad.T, hidden[chunk])
            else:
                self.of_weight += grad.T @ hidden[chunk]


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def run(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        token_weights: Tensor | None,
        rows: int,
        transform: LogitTransform,
        needs: tuple[bool, ...],
    ) -> tuple[Tensor, _Gradients]:
        wide = _wide(hidden.dtype)
        loss = torch.zeros((), dtype=wide, device=hidden.device)
        grads = _Gradients(hidden, weight, bias, needs)
        for start in range(0, len(hidden), rows):
            chunk = slice(start, start + rows)
            logits = _logits(hidden[chunk], weight, bias, transform)
            log_p = torch.log_softmax(logits, -1, dtype=wide)
            index = targets[chunk, None]
            picked = log_p.gather(-1, index)
            if token_weights is not None:
                picked = picked * token_weights[chunk, None]
            loss -= picked.sum()
            if not any(needs):
                continue
            grad = log_p.exp_().scatter_add_(-1, index, picked.new_full(index.shape, -1.0))
            if token_weights is not None:
                grad.mul_(token_weights[chunk, None])
            grads.add(_transform_backward(grad, logits, transform), start, hidden, weight)
        return loss, grads

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        token_weights: Tensor | None,
        rows: int,
        transform: LogitTransform,
    ) -> Tensor:
        loss, grads = _CrossEntropy.run(
            hidden, weight, bias, targets, token_weights, rows, transform, ctx.needs_input_grad[:3]
        )
        ctx.grads, ctx.dtypes = grads, (weight.dtype, bias.dtype if bias is not None else None)
        return loss

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        grads, ctx.grads = ctx.grads, None
        assert grads is not None, "linear_cross_entropy keeps its gradients for one backward only"
        (factor,) = upstream
        # In place: these can be the largest tensors of the step.
        of_hidden, of_weight, of_bias = (
            None if g is None else g.mul_(factor) for g in (grads.of_hidden, grads.of_weight, grads.of_bias)
        )
        weight_dtype, bias_dtype = ctx.dtypes
        return (
            of_hidden,
            None if of_weight is None else of_weight.to(weight_dtype),
            None if of_bias is None else of_bias.to(bias_dtype),
            *(None,) * 4,
        )


class _GatherLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        rows: int,
        transform: LogitTransform,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor | None]:
        wide = _wide(hidden.dtype)
        picked = torch.empty(len(hidden), dtype=wide, device=hidden.device)
        normaliser = torch.empty_like(picked)
        entropy = torch.empty_like(picked) if with_entropy else None
        for start in range(0, len(hidden), rows):
            chunk = slice(start, start + rows)
            logits = _logits(hidden[chunk], weight, bias, transform)
            index = targets[chunk, None]
            # From log_softmax, not from logit − logsumexp: the smaller rounding error of the two.
            log_p = torch.log_softmax(logits, -1, dtype=wide)
            picked[chunk] = log_p.gather(-1, index).squeeze(-1)
            normaliser[chunk] = logits.gather(-1, index).squeeze(-1).to(wide) - picked[chunk]
            if entropy is not None:
                entropy[chunk] = entropy_of(log_p)
        ctx.save_for_backward(hidden, weight, bias, targets, normaliser)
        ctx.rows, ctx.transform = rows, transform
        if entropy is not None:
            ctx.mark_non_differentiable(entropy)
        return picked, entropy

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        hidden, weight, bias, targets, normaliser = ctx.saved_tensors
        factor = upstream[0]
        grads = _Gradients(hidden, weight, bias, ctx.needs_input_grad[:3])
        for start in range(0, len(hidden), ctx.rows):
            chunk = slice(start, start + ctx.rows)
            logits = _logits(hidden[chunk], weight, bias, ctx.transform)
            # d log p[target] / d logits = onehot − p
            grad = (logits.to(normaliser.dtype) - normaliser[chunk, None]).exp_().neg_()
            index = targets[chunk, None]
            grad.scatter_add_(-1, index, grad.new_ones(index.shape)).mul_(factor[chunk, None])
            grads.add(_transform_backward(grad, logits, ctx.transform), start, hidden, weight)
        return (
            grads.of_hidden,
            None if grads.of_weight is None else grads.of_weight.to(weight.dtype),
            None if grads.of_bias is None else grads.of_bias.to(bias.dtype),
            *(None,) * 4,
        )
