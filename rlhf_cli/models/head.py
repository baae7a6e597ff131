"""The training forward of a causal LM: token losses or log-probabilities without logits, from inside its own modules.

`enable_loss(model)` teaches a model two more calls, and leaves every other as it was:

    loss_sum, num_targets = model(input_ids=..., position_ids=..., attention_mask=..., targets=...)
    logprobs, entropy = model(input_ids=..., position_ids=..., targets=..., logprobs=True, temperature=τ)

Shapes: B sequences, T positions, N positions with a target, H width, V vocabulary. targets (B, T) are shifted already:
targets[b, t] is the token that position t must predict, IGNORE where none is.

Both are computed in the head module's own call, so that hooks which bring its weights (ZeRO-3) run as for logits.
Everything is kept as bound methods on instances: a deep copy of the model gets its own.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from types import MethodType
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rlhf_cli.models.logit_transform import find_transform
from rlhf_cli.models.lora import plain_model, wrapped_copies
from rlhf_cli.ops.logprobs import (
    IDENTITY,
    LogitTransform,
    chunk_rows,
    entropy_of,
    linear_cross_entropy,
    linear_logprobs,
)

IGNORE = -100
"""Target of a position that is not trained (the value of torch's and transformers' losses)."""

log = logging.getLogger(__name__)


class LossOutput(NamedTuple):
    """loss_sum: Σ of token losses, fp32 scalar; num_targets: how many tokens, int64 scalar."""

    loss_sum: Tensor
    num_targets: Tensor


class LogprobOutput(NamedTuple):
    """logprobs: log softmax(logits/τ)[target], with gradient; entropy: of softmax(logits/τ) in nats, without.

    Each (N,) fp32, for the positions with a target, row by row.
    """

    logprobs: Tensor
    entropy: Tensor


class LossPlan(NamedTuple):
    """How a model's loss and log-probabilities are computed.

    fused: in the head, chunk by chunk. module: through the head as it is (an adapter sits on
    it), recomputed in the backward. logits: through the model's whole forward, which does something to the logits that
    `transform` cannot say; holds (B, T, V).
    """

    path: Literal["fused", "module", "logits"]
    transform: LogitTransform


def enable_loss(model: nn.Module) -> LossPlan:
    """Teach a causal LM (plain or PEFT-wrapped) the calls with `targets`. Returns how they will be computed."""
    base = plain_model(model)
    head = base.get_output_embeddings()
    transform = find_transform(base, head) if head is not None and base.get_decoder() is not base else None
    if transform is None:
        plan = LossPlan("logits", IDENTITY)
        log.warning("%s: no way around full logits is known; they take B x T x V of memory", type(base).__name__)
    elif all(_is_plain_linear(m) for m in wrapped_copies(head)):
        plan = LossPlan("fused", transform)
        for linear in wrapped_copies(head):
            linear.forward = MethodType(_linear_forward, linear)
    else:
        plan = LossPlan("module", transform)
    model._rlhf_loss_plan = plan  # type: ignore[assignment]
    model.forward = MethodType(_forward_with_targets(type(model).forward), model)
    return plan


def _forward_with_targets(original: Callable[..., Any]) -> Callable[..., Any]:
    # wraps: generate() reads the signature to see which inputs a model takes.
    @functools.wraps(original)
    def forward(
        self: nn.Module,
        *args: Any,
        targets: Tensor | None = None,
        token_weights: Tensor | None = None,
        logprobs: bool = False,
        temperature: float = 1.0,
        **kwargs: Any,
    ) -> Any:
        if targets is None:
            return original(self, *args, **kwargs)
        if logprobs:
            return _logprobs(self, original, targets, temperature, kwargs)
        return _loss(self, original, targets, token_weights, kwargs)

    return forward


def _loss(
    model: Any, original: Callable[..., Any], targets: Tensor, token_weights: Tensor | None, inputs: dict[str, Any]
) -> LossOutput:
    """inputs: input_ids, position_ids, attention_mask, each (B, T); targets, token_weights (B, T)."""
    plan: LossPlan = model._rlhf_loss_plan
    kept = targets != IGNORE
    picked, weights = targets[kept], None if token_weights is None else token_weights[kept]
    # use_cache=False is part of the maths: with a cache, packed documents attend to each other.
    if plan.path == "logits":
        logits = original(model, **inputs, use_cache=False).logits[kept]
        return LossOutput(_dense_loss(logits, picked, weights, IDENTITY), kept.sum())
    base = plain_model(model)
    hidden = base.get_decoder()(**inputs, use_cache=False).last_hidden_state[kept]
    head = base.get_output_embeddings()
    if plan.path == "fused":
        loss = head(hidden, targets=picked, token_weights=weights, transform=plan.transform)
    else:
        loss = _loss_through(head, hidden, picked, weights, plan.transform, base.config.vocab_size)
    return LossOutput(loss, kept.sum())


def _logprobs(
    model: Any, original: Callable[..., Any], targets: Tensor, temperature: float, inputs: dict[str, Any]
) -> LogprobOutput:
    """inputs, targets as in _loss."""
    assert temperature > 0, temperature
    plan: LossPlan = model._rlhf_loss_plan
    kept = targets != IGNORE
    transform = plan.transform._replace(temperature=temperature)
    if plan.path == "logits":
        logits = original(model, **inputs, use_cache=False).logits[kept]
        return LogprobOutput(*_logprobs_through(nn.Identity(), logits, targets[kept], transform, logits.shape[-1]))
    base = plain_model(model)
    hidden = base.get_decoder()(**inputs, use_cache=False).last_hidden_state[kept]
    head = base.get_output_embeddings()
    if plan.path == "fused":
        return LogprobOutput(*head(hidden, targets=targets[kept], transform=transform, logprobs=True))
    return LogprobOutput(*_logprobs_through(head, hidden, targets[kept], transform, base.config.vocab_size))


def _linear_forward(
    self: nn.Linear,
    hidden: Tensor,
    targets: Tensor | None = None,
    token_weights: Tensor | None = None,
    transform: LogitTransform = IDENTITY,
    logprobs: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """A head's forward: logits (..., V) of hidden (..., H).

    With targets (N,) the summed loss of hidden (N, H), or log-probabilities and entropies, (N,) each.
    """
    if targets is None:
        return F.linear(hidden, self.weight, self.bias)
    if logprobs:
        return linear_logprobs(hidden, self.weight, self.bias, targets, transform=transform)
    return linear_cross_entropy(hidden, self.weight, self.bias, targets, token_weights, transform=transform)


def _loss_through(
    head: nn.Module,
    hidden: Tensor,
    targets: Tensor,
    token_weights: Tensor | None,
    transform: LogitTransform,
    vocab_size: int,
) -> Tensor:
    """Σ loss of hidden (N, H) through any head module; one chunk's logits at a time, made again in the backward."""

    def of_chunk(h: Tensor, t: Tensor, w: Tensor | None) -> Tensor:
        return _dense_loss(head(h), t, w, transform)

    parts = [
        checkpoint(
            of_chunk,
            hidden[rows],
            targets[rows],
            None if token_weights is None else token_weights[rows],
            use_reentrant=False,
        )
        for rows in _chunks(head, hidden, vocab_size)
    ]
    return torch.stack(parts).sum()


def _logprobs_through(
    head: nn.Module, hidden: Tensor, targets: Tensor, transform: LogitTransform, vocab_size: int
) -> tuple[Tensor, Tensor]:
    """(log-probabilities, entropies), (N,) each, of hidden (N, H) through any head module, as _loss_through."""

    def of_chunk(h: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        log_p = torch.log_softmax(_transformed(head(h), transform), -1)
        return log_p.gather(-1, t[:, None]).squeeze(-1), entropy_of(log_p.detach().clone())

    parts = [
        checkpoint(of_chunk, hidden[rows], targets[rows], use_reentrant=False)
        for rows in _chunks(head, hidden, vocab_size)
    ]
    logprobs, entropies = zip(*parts, strict=True)
    return torch.cat(logprobs), torch.cat(entropies)


def _chunks(head: nn.Module, hidden: Tensor, vocab_size: int) -> list[slice]:
    """The rows of hidden (N, H) that go through the head at a time; one empty chunk of none."""
    # Sharded weights are gathered by all ranks together at each call: the number of calls may not depend on N.
    sharded = any(hasattr(p, "ds_id") for p in head.parameters())
    rows = max(1, len(hidden)) if sharded else chunk_rows(vocab_size, hidden.device.type == "cpu")
    return [slice(start, start + rows) for start in range(0, max(1, len(hidden)), rows)]


def _dense_loss(logits: Tensor, targets: Tensor, token_weights: Tensor | None, transform: LogitTransform) -> Tensor:
    """Σ loss of the head's raw output (N, V)."""
    losses = F.cross_entropy(_transformed(logits, transform), targets, reduction="none")
    return (losses if token_weights is None else losses * token_weights).sum()


def _transformed(logits: Tensor, transform: LogitTransform) -> Tensor:
    """What the model makes of its head's raw output (N, V), in fp32."""
    logits = logits.float() * transform.scale
    if transform.softcap is not None:
        logits = torch.tanh(logits / transform.softcap) * transform.softcap
    return logits if transform.temperature == 1.0 else logits / transform.temperature


def _is_plain_linear(module: nn.Module) -> bool:
    # Not isinstance: quantised and adapted layers derive from Linear and compute something else.
    return type(module).forward is nn.Linear.forward
