"""The training forward of a causal LM: token loss without logits, from inside the model's own modules.

`enable_loss(model)` teaches a model one more call, and leaves every other as it was:

    loss_sum, num_targets = model(input_ids=..., position_ids=..., attention_mask=..., targets=...)

Shapes: B sequences, T positions, N positions with a target, H width, V vocabulary. targets (B, T) are shifted already:
targets[b, t] is the token that position t must predict, IGNORE where none is.

The loss is computed in the head module's own call, so that hooks which bring its weights (ZeRO-3) run as for logits.
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
from transformers.modeling_outputs import BaseModelOutputWithPast

from rlhf_cli.models.lora import plain_model, wrapped_copies
from rlhf_cli.ops.logprobs import IDENTITY, LogitTransform, chunk_rows, linear_cross_entropy

IGNORE = -100
"""Target of a position that is not trained (the value of torch's and transformers' losses)."""

log = logging.getLogger(__name__)


class LossOutput(NamedTuple):
    """loss_sum: Σ of token losses, fp32 scalar; num_targets: how many tokens, int64 scalar."""

    loss_sum: Tensor
    num_targets: Tensor


class LossPlan(NamedTuple):
    """How a model's loss is computed.

    fused: in the head, chunk by chunk, gradient in the forward. module: through the head as it is (an adapter sits on
    it), recomputed in the backward. logits: through the model's whole forward, which does something to the logits that
    `transform` cannot say; holds (B, T, V).
    """

    path: Literal["fused", "module", "logits"]
    transform: LogitTransform


def enable_loss(model: nn.Module) -> LossPlan:
    """Teach a causal LM (plain or PEFT-wrapped) the call with `targets`. Returns how the loss will be computed."""
    base = plain_model(model)
    head = base.get_output_embeddings()
    transform = _find_transform(base, head) if head is not None and base.get_decoder() is not base else None
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
        self: nn.Module, *args: Any, targets: Tensor | None = None, token_weights: Tensor | None = None, **kwargs: Any
    ) -> Any:
        if targets is None:
            return original(self, *args, **kwargs)
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


def _linear_forward(
    self: nn.Linear,
    hidden: Tensor,
    targets: Tensor | None = None,
    token_weights: Tensor | None = None,
    transform: LogitTransform = IDENTITY,
) -> Tensor:
    """A head's forward: logits (..., V) of hidden (..., H), or with targets (N,) the summed loss of hidden (N, H)."""
    if targets is None:
        return F.linear(hidden, self.weight, self.bias)
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

    # Sharded weights are gathered by all ranks together at each call: the number of calls may not depend on N.
    sharded = any(hasattr(p, "ds_id") for p in head.parameters())
    rows = max(1, len(hidden)) if sharded else chunk_rows(vocab_size, hidden.device.type == "cpu")
    parts = [
        checkpoint(
            of_chunk,
            hidden[start : start + rows],
            targets[start : start + rows],
            None if token_weights is None else token_weights[start : start + rows],
            use_reentrant=False,
        )
        for start in range(0, max(1, len(hidden)), rows)
    ]
    return torch.stack(parts).sum()


def _dense_loss(logits: Tensor, targets: Tensor, token_weights: Tensor | None, transform: LogitTransform) -> Tensor:
    """Σ loss of the head's raw output (N, V)."""
    logits = logits.float() * transform.scale
    if transform.softcap is not None:
        logits = torch.tanh(logits / transform.softcap) * transform.softcap
    losses = F.cross_entropy(logits, targets, reduction="none")
    return (losses if token_weights is None else losses * token_weights).sum()


def _is_plain_linear(module: nn.Module) -> bool:
    # Not isinstance: quantised and adapted layers derive from Linear and compute something else.
    return type(module).forward is nn.Linear.forward


def _find_transform(base: Any, head: Any) -> LogitTransform | None:
    """What the model's forward does between backbone and head and after the head, observed rather than assumed.

    Backbone and head are replaced for one call by known values, so no weight is touched (they may be sharded).
    None: neither the identity, nor a factor, nor the config's softcap.
    """
    hidden, raw = torch.linspace(-3, 3, 8).view(1, 2, 4), torch.linspace(-40, 40, 10).view(1, 2, 5)
    seen: list[Tensor] = []

    def fake_head(h: Tensor) -> Tensor:
        seen.append(h.detach().float().cpu())
        return raw.clone()

    def fake_backbone(*_: Any, **__: Any) -> BackboneOutput:
        return BackboneOutput(last_hidden_state=hidden.clone())

    with torch.no_grad(), replaced(base.get_decoder(), fake_backbone), replaced(head, fake_head):
        try:
            out = type(base).forward(base, input_ids=torch.zeros(1, 2, dtype=torch.long), use_cache=False)
            logits = out.logits.float().cpu()
        except (AttributeError, TypeError, RuntimeError, LookupError) as error:
            log.warning("%s does not take the usual path to its logits: %s", type(base).__name__, error)
            return None
    if len(seen) != 1 or seen[0].shape != hidden.shape or logits.shape != raw.shape:
        return None
    before = _factor(hidden, seen[0])
    if before is None or (before != 1.0 and getattr(head, "bias", None) is not None):
        return None
    after = _factor(raw, logits)
    if after is not None:
        return LogitTransform(scale=before * after)
    cap = getattr(base.config, "final_logit_softcapping", None)
    if cap and torch.allclose(cap * torch.tanh(raw / cap), logits, atol=1e-5):
        return LogitTransform(scale=before, softcap=float(cap))
    return None


class BackboneOutput(BaseModelOutputWithPast):
    """Has every field that some backbone adds (router_logits, cross_attentions ...), as None."""

    def __getattr__(self, name: str) -> None:
        return None


class replaced:
    """Context in which a module's forward is another function."""

    def __init__(self, module: nn.Module, forward: Callable[..., Any]):
        self.module, self.forward = module, forward

    def __enter__(self) -> None:
        self.saved = self.module.__dict__.get("forward")
        self.module.forward = self.forward

    def __exit__(self, *_: object) -> None:
        del self.module.forward
        if self.saved is not None:
            self.module.forward = self.saved


def _factor(x: Tensor, y: Tensor) -> float | None:
    """The f with y = f·x, or None. 1.0 exactly when they agree."""
    if torch.allclose(x, y, rtol=1e-6, atol=0):
        return 1.0
    factor = float(y.flatten()[-1] / x.flatten()[-1])
    return factor if torch.allclose(x * factor, y, rtol=1e-5, atol=1e-6) else None
