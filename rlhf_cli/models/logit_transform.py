"""What a causal LM does to its logits beside the product with the head, seen from outside."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from rlhf_cli.ops.logprobs import LogitTransform

log = logging.getLogger(__name__)


def find_transform(base: Any, head: Any) -> LogitTransform | None:
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
