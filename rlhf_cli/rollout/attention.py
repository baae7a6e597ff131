"""Attention of one new token in low precision on a CPU without matrix tiles (AMX), as two small matrix products.

torch's fused kernel works on blocks of queries; without AMX it converts keys to fp32 block by block, which for a single
query costs several times the products themselves. Measured in bf16 for 32 rows, 4 heads of 64 and 128 columns: 1.9 ms
against 0.25 ms for the products on an AMD EPYC, 0.4 ms against 2.1 ms on an Intel Xeon with AMX. In fp32 both take the
same time, so fp32 keeps the fused kernel and its exact numbers.

Shapes: n rows, H heads, K key/value heads, Q queries, C columns, D width of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

QUICK_ATTENTION = "rlhf_single_query"
# What some models hand over beside the mask; the fused kernel's wrapper knows what to do with it, or refuses it.
EXTRAS = ("softcap", "position_bias", "cache", "s_aux")


def has_tiles() -> bool:
    """Whether this CPU multiplies bf16 matrices in tiles (Intel's AMX)."""
    return torch.cpu._is_amx_tile_supported()


@contextmanager
def quick_attention(model: Any) -> Iterator[None]:
    """Inside, steps of one token use `single_query_attention` where it is the faster one."""
    config, weight = model.config, next(model.parameters())
    is_slow = weight.device.type == "cpu" and weight.dtype in (torch.bfloat16, torch.float16) and not has_tiles()
    before = config._attn_implementation
    if not is_slow or before != "sdpa" or not model._supports_attention_backend:
        yield
        return
    AttentionInterface.register(QUICK_ATTENTION, single_query_attention)
    AttentionMaskInterface.register(QUICK_ATTENTION, sdpa_mask)
    config._attn_implementation = QUICK_ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = before


def single_query_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As transformers' attention functions: query (n, H, Q, D), key and value (n, K, C, D) -> (n, Q, H, D).

    attention_mask: (n, 1, Q, C), True = look, or None. The softmax is taken in fp32.
    """
    n, heads, num_queries, width = query.shape
    if num_queries != 1 or any(kwargs.get(name) is not None for name in EXTRAS):
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    groups = key.shape[1]
    scale = width**-0.5 if scaling is None else scaling
    query = (query * scale).view(n, groups, heads // groups, width)  # heads that share keys, as rows of one product
    scores = torch.matmul(query, key.transpose(2, 3)).float()
    if attention_mask is not None:
        scores.masked_fill_(~attention_mask, float("-inf"))
    output = torch.matmul(scores.softmax(-1).to(value.dtype), value)
    return output.reshape(n, 1, heads, value.shape[-1]), None
