"""Random numbers: seeding and restoring the generators of Python, NumPy and PyTorch."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def seed_everything(seed: int, *stream: int) -> None:
    """Seed every generator of this process from (seed, *stream).

    stream separates what must not be correlated: pass the rank, and after a resume the step too. The same numbers
    give the same state in any process, so weights are made under one stream on all ranks, e.g. (seed, 0).
    """
    # SeedSequence mixes all bits, so neighbouring seeds and ranks share nothing; torch and NumPy take 64 and 32 bits.
    words = np.random.SeedSequence([seed, *stream]).generate_state(4, np.uint64)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]) & 0xFFFFFFFF)
    torch.manual_seed(int(words[2]) >> 1)  # also seeds CUDA; >> 1: it takes signed 64-bit numbers


def rng_state() -> dict[str, Any]:
    """The state of every generator of this process, of JSON values only (so that a checkpoint holds no pickle)."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {
        "python": [version, list(internal), gauss],
        "numpy": [name, [int(k) for k in keys], int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
        "cuda": None if cuda is None else cuda.numpy().tobytes().hex(),
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Put every generator back to what rng_state returned. A CUDA state is put back where there is CUDA."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(_from_hex(state["torch"]))
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(_from_hex(state["cuda"]))


def _from_hex(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
