"""Floating-point work: what a step costs, and what this device can do."""

from __future__ import annotations

import time

import torch


def flops_per_token(trainable: int, total: int) -> float:
    """Work of training on one token: 2 per parameter forward, 2 for the gradient of the activations, 2 for that of the
    trained parameters (Kaplan et al. 2001.08361, section 2.1). Attention itself is left out.

    Parameters that are multiplied: all but input embeddings, which are looked up (unless they are the head as well).
    """
    return 4.0 * total + 2.0 * trainable


def measured_peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product on this device in this precision, best of three."""
    size = 8192 if device.type == "cuda" else 768
    a = torch.full((size, size), 0.5, device=device, dtype=dtype)  # no random numbers: a resumed run continues them
    best = float("inf")
    for _ in range(4):  # the first one warms up
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2.0 * size**3 / best
