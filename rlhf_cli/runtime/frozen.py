"""Models that are only read, the reference and reward models: where their weights are between uses.

keep: whole on every device. shard: every rank holds 1/N of the bytes. offload: likewise, but in the machine's memory.
`with held.whole() as module:` has all of the weights on the device, after one collective that all ranks take part in;
inside, ranks may call the module as often as each likes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rlhf_cli.runtime.distributed import Ranks
from rlhf_cli.runtime.engine import gathered, move_buffers

Home = Literal["keep", "shard", "offload"]
ALIGNMENT = 16  # bytes; a multiple of every dtype's size, so that any tensor can be viewed at its place


class Slot(NamedTuple):
    """A parameter, and where its bytes begin in the flat vector."""

    parameter: nn.Parameter
    shape: torch.Size
    start: int


class Frozen:
    """A model with weights of its own. module: on the CPU, the same on every rank; it belongs to this object from now
    on, its weights are empty outside of `whole` (unless they are kept)."""

    def __init__(self, module: nn.Module, home: Home, ranks: Ranks):
        self.module = module.requires_grad_(False).eval()
        self.home, self.ranks = home, ranks
        self._depth = 0
        if home == "keep":
            module.to(ranks.device)
            return
        move_buffers(module, ranks.device)
        self._slots, size = _layout(module)
        share = -(-size // (ranks.world_size * ALIGNMENT)) * ALIGNMENT
        where = torch.device("cpu") if home == "offload" else ranks.device
        pinned = home == "offload" and ranks.device.type == "cuda"  # pages that stay put are copied twice as fast
        self._share = torch.zeros(share, dtype=torch.uint8, device=where, pin_memory=pinned)
        for slot in self._slots:
            _keep_share(slot, self._share, ranks.rank * share)
            _let_go(slot)

    @property
    def held_bytes(self) -> int:
        """What this rank holds of the weights between uses, wherever that is."""
        if self.home == "keep":
            return sum(p.nbytes for p in self.module.parameters())
        return self._share.nbytes

    @contextmanager
    def whole(self) -> Iterator[nn.Module]:
        """The module with all of its weights on the device. They must not be changed. May be entered again inside."""
        if self.home == "keep" or self._depth:
            yield self.module
            return
        self._depth += 1
        flat = _gathered(self._share.to(self.ranks.device, non_blocking=True), self.ranks.world_size)
        for parameter, shape, start in self._slots:
            num_bytes = shape.numel() * parameter.dtype.itemsize
            parameter.data = flat[start : start + num_bytes].view(parameter.dtype).view(shape)
        del flat
        try:
            yield self.module
        finally:
            self._depth -= 1
            for slot in self._slots:
                _let_go(slot)


class SharedWeights:
    """Parameters that an engine trains or holds, and that other module trees read."""

    def __init__(self, parameters: Iterable[nn.Parameter]):
        self.parameters = list(parameters)
        self._depth = 0

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Under ZeRO-3 the weights are whole inside. The engine must not be called there: it gathers by itself."""
        if self._depth:
            yield
            return
        self._depth += 1
        try:
            with gathered(self.parameters):
                yield
        finally:
            self._depth -= 1


class Borrowed:
    """A model over the weights of an engine, in a module tree without the engine's hooks."""

    def __init__(self, module: nn.Module, weights: SharedWeights):
        self.module, self._weights = module.eval(), weights

    @contextmanager
    def whole(self) -> Iterator[nn.Module]:
        """As Frozen.whole."""
        with self._weights.gathered():
            yield self.module


def _layout(module: nn.Module) -> tuple[list[Slot], int]:
    """A place for each parameter (tied ones have one), and the bytes of all."""
    slots, end = [], 0
    for parameter in module.parameters():
        slots.append(Slot(parameter, parameter.shape, end))
        end += -(-parameter.nbytes // ALIGNMENT) * ALIGNMENT
    return slots, end


def _keep_share(slot: Slot, share: Tensor, begin: int) -> None:
    """Copy what of a parameter lies in bytes [begin, begin + len(share)) of the flat vector."""
    data = slot.parameter.detach().contiguous().view(-1).view(torch.uint8)
    first, last = max(slot.start, begin), min(slot.start + len(data), begin + len(share))
    if first < last:
        share[first - begin : last - begin] = data[first - slot.start : last - slot.start]


def _let_go(slot: Slot) -> None:
    slot.parameter.data = torch.empty(0, dtype=slot.parameter.dtype, device=slot.parameter.device)


def _gathered(share: Tensor, world_size: int) -> Tensor:
    """All ranks' shares one after the other, (world_size x len(share),) bytes. Of one rank it is the share itself."""
    if world_size == 1:
        return share
    whole = torch.empty(world_size * len(share), dtype=torch.uint8, device=share.device)
    dist.all_gather_into_tensor(whole, share)
    return whole
