"""Drawing tokens: temperature, filters, and Gumbel noise that is a function of (seed, sample, position, token).

Adding Gumbel noise to logits and taking the largest draws from their softmax exactly. The noise is hashed, not taken
from a generator, so a text depends neither on what else is in the batch, nor on its order, nor on the number of ranks.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# Steele, Lea, Flood: Fast splittable pseudorandom number generators (2014): splitmix64.
GOLDEN_64 = np.uint64(0x9E3779B97F4A7C15)
MIX_64 = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
# lowbias32 of Chris Wellons' hash prospector (github.com/skeeto/hash-prospector), as signed 32-bit numbers.
MIX_32 = (0x7FEB352D, 0x846CA68B - (1 << 32))
GOLDEN_32 = 0x9E3779B9 - (1 << 32)

# 31 random bits k become (k + 1/2)·2⁻³¹ in (0, 1). The largest ones would round to 1 in fp32, hence a hair less.
UNIT = 2.0**-31 * (1 - 2.0**-24)
# Elements of the noise that are in work at a time on a CPU: three fp32 buffers of them stay in a core's cache.
CPU_CHUNK = 1 << 16


class Draw(NamedTuple):
    """temperature: 0 = the likeliest token; top_k: 0 = all; top_p: 1 = all."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


def row_keys(seed: int, samples: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Hash keys (B, 2) int32 of the noise of rows.

    samples (B,): 64-bit numbers, one for each response; positions (B,): index of the token within the response.
    """
    with np.errstate(over="ignore"):  # wrapping is the point
        keys = _mix_64(np.full(len(samples), seed & ((1 << 64) - 1), np.uint64) + GOLDEN_64)
        keys = _mix_64((keys ^ samples.astype(np.uint64)) + GOLDEN_64)
        keys = _mix_64((keys ^ positions.astype(np.uint64)) + GOLDEN_64)
    return keys.astype("<u8").view("<i4").reshape(-1, 2)


def token_hashes(vocab_size: int, device: torch.device) -> Tensor:
    """What the noise mixes with a row's key: (V,) int32, all different."""
    return _mix_32(torch.arange(vocab_size, dtype=torch.int32, device=device) * GOLDEN_32)


def gumbel_noise(keys: Tensor, tokens: Tensor) -> Tensor:
    """Gumbel noise (B, V) fp32, finite: between -2.9 and 22.2.

    keys (B, 2) int32: see row_keys; tokens (V,) int32: see token_hashes.
    """
    bits = _mix_32((tokens ^ keys[:, :1]).mul_(keys[:, 1:] | 1))
    unit = bits.bitwise_and_(0x7FFFFFFF).float().add_(0.5).mul_(-UNIT)
    # -log1p(-u) is exponential; small u, where fp32 is finest, make the large noise that lets rare tokens win.
    return unit.log1p_().neg_().log_().neg_()


def draw_tokens(logits: Tensor, keys: Tensor, tokens: Tensor, draw: Draw) -> Tensor:
    """One token for each row of logits (B, V) fp32, which are overwritten -> (B,) int64.

    keys (B, 2) and tokens (V,) as for gumbel_noise. Of equal logits the lowest token wins at temperature 0.
    """
    if draw.temperature == 0:
        return logits.argmax(-1)
    if draw.temperature != 1:
        logits.div_(draw.temperature)
    logits = filter_logits(logits, draw.top_k, draw.top_p)
    rows = len(logits) if logits.device.type != "cpu" else max(1, CPU_CHUNK // logits.shape[1])
    picked = [
        gumbel_noise(chunk_keys, tokens).add_(chunk).argmax(-1)
        for chunk, chunk_keys in zip(logits.split(rows), keys.split(rows), strict=True)
    ]
    return torch.cat(picked)


def filter_logits(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Logits (B, V) with -inf for the tokens that may not be drawn.

    top_k: the k largest stay, and all that equal the k-th. top_p: of those, the likeliest stay whose probabilities
    together first reach top_p, the one that crosses it included; of equal ones the lower token comes first
    (Holtzman et al., arXiv 1904.09751).
    """
    if 0 < top_k < logits.shape[-1]:
        smallest = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, float("-inf"))
    if top_p < 1:
        ordered, order = logits.sort(descending=True, stable=True)
        shares = ordered.softmax(-1)
        before = shares.cumsum(-1) - shares
        dropped = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, order, before >= top_p)
        logits = logits.masked_fill(dropped, float("-inf"))
    return logits


def _mix_64(x: np.ndarray) -> np.ndarray:
    """splitmix64's finisher of (B,) uint64."""
    x = (x ^ (x >> np.uint64(30))) * MIX_64[0]
    x = (x ^ (x >> np.uint64(27))) * MIX_64[1]
    return np.asarray(x ^ (x >> np.uint64(31)))


def _mix_32(x: Tensor) -> Tensor:
    """lowbias32 of an int32 tensor, in place. torch shifts the sign in, so the masks take it out again."""
    x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF)).mul_(MIX_32[0])
    x.bitwise_xor_((x >> 15).bitwise_and_(0x1FFFF)).mul_(MIX_32[1])
    return x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))
