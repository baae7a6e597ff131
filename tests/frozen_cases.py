"""What tests/test_frozen.py runs on each rank."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from rlhf_cli.runtime.distributed import Ranks, barrier
from rlhf_cli.runtime.frozen import Frozen

WIDTH, LAYERS = 2048, 12  # 16 MiB a layer, 192 MiB in all


def resident_mib() -> float:
    gc.collect()
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


class Mixed(nn.Module):
    """Two dtypes, odd sizes, a scalar, a tied weight, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(3)
        self.a = nn.Parameter(torch.randn(7, 5, generator=draw))
        self.b = nn.Parameter(torch.randn(5, 3, generator=draw).to(torch.bfloat16))
        self.tied = self.a
        self.scale = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))
        self.register_buffer("shift", torch.arange(3.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = ((x @ self.a + x @ self.tied) @ self.b.float() + self.shift) * self.scale
        return out


def hold(ranks: Ranks, home: Literal["keep", "shard", "offload"]) -> Any:
    """(equal inside, still equal the second time and when entered twice, bytes held, elements left outside)."""
    model, x = Mixed(), torch.randn(2, 7, generator=torch.Generator().manual_seed(0))
    expected = model(x).detach()
    held = Frozen(model, home, ranks)
    equal = []
    for _ in range(2):
        with held.whole() as module, held.whole() as again:
            assert again is module
            assert not any(p.requires_grad for p in module.parameters())
            equal.append(torch.equal(module(x), expected))
    with held.whole() as module:
        with held.whole():
            pass
        for _ in range(1 + ranks.rank):  # ranks need not keep in step inside
            equal.append(torch.equal(module(x), expected))
    return all(equal), held.held_bytes, sum(p.numel() for p in model.parameters())


def memory(ranks: Ranks, home: Literal["keep", "shard"]) -> dict[str, float]:
    """Resident MiB of this rank above what it had before, by moment."""
    before = resident_mib()
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
    found = {"loaded": resident_mib() - before}
    held = Frozen(model, home, ranks)
    found["at rest"] = resident_mib() - before
    with held.whole() as module:
        total = float(sum(float(p.sum()) for p in module.parameters()))
        found["in use"] = resident_mib() - before
    found["after"] = resident_mib() - before
    assert total == total
    barrier()
    return found
