"""The ranks of a job and what they say to each other."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from rlhf_cli.errors import RunFailed
from rlhf_cli.jobfiles import COUNTED_GPUS_VARIABLE

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among its peers. local_rank counts within the machine; device is this process's own."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which reports and writes what is written once."""
        return self.rank == 0


def init(timeout_seconds: float) -> Ranks:
    """Join the process group that RANK, WORLD_SIZE, LOCAL_RANK and MASTER_* describe: gloo on CPU, nccl on CUDA.

    Without RANK this process becomes a job of one, with a real process group, so that no code needs a second path.
    A collective that is not answered within timeout_seconds raises on the ranks that wait.
    Raises RunFailed where there are GPUs that torch cannot use.
    """
    assert not dist.is_initialized(), "init is called once per process"
    alone = "RANK" not in os.environ
    if alone:
        # DeepSpeed reads these by itself; the address is never dialled, because the group of one lives in this process.
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank = int(os.environ["LOCAL_RANK"])
    device = own_device(local_rank)
    dist.init_process_group(
        backend="nccl" if device.type == "cuda" else "gloo",
        timeout=timedelta(seconds=timeout_seconds),
        rank=rank,
        world_size=world_size,
        store=dist.HashStore() if alone else None,  # type: ignore[attr-defined]
    )
    return Ranks(rank=rank, world_size=world_size, local_rank=local_rank, device=device)


def own_device(local_rank: int) -> torch.device:
    """Choose this process's device and set it up: a GPU that torch can use, else the CPU."""
    counted = os.environ.get(COUNTED_GPUS_VARIABLE)
    if not torch.cuda.is_available():
        if counted:
            raise RunFailed(
                f"torch {torch.__version__} (CUDA {torch.version.cuda or 'none'}) cannot use the GPUs that are visible"
                f" here ({counted}); install a torch for the driver that nvidia-smi shows, or run on CPU on purpose"
                " with an empty CUDA_VISIBLE_DEVICES="
            )
        return torch.device("cpu")
    # Under Slurm's binding (--gpus-per-task=1) each process sees its own GPU alone, under the number 0.
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    os.environ["LOCAL_RANK"] = str(device.index)  # DeepSpeed takes it for the number of the device
    # It is torch's first choice on Hopper, and builds a graph, tens of milliseconds, for every new length of keys.
    torch.backends.cuda.enable_cudnn_sdp(False)
    return device


def barrier() -> None:
    """Wait until every rank is here."""
    if dist.get_backend() == "nccl":
        dist.barrier(device_ids=[torch.cuda.current_device()])
    else:
        dist.barrier()


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """The elementwise sum over all ranks, as a new tensor of the same shape; the same on every rank."""
    total = tensor.detach().clone()
    dist.all_reduce(total, op=dist.ReduceOp.SUM)
    return total


def any_rank(flag: bool) -> bool:
    """Whether flag is set on at least one rank; the same answer everywhere."""
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    flags = torch.tensor([int(flag)], device=device)
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return bool(flags.item())


def broadcast_object(value: T, source: int = 0) -> T:
    """The value that rank `source` passed, on every rank."""
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=source)
    return box[0]


def gather_objects(value: T) -> list[T]:
    """What each rank passed, in rank order, on every rank."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


@contextmanager
def local_first(ranks: Ranks) -> Iterator[None]:
    """Local rank 0 of each machine runs the body first, then the others (who find its files in the cache).

    If the body raises on local rank 0, the others raise too instead of waiting or of repeating the work.
    """
    failure: str | None = None
    if ranks.local_rank == 0:
        try:
            yield
        except BaseException as error:
            failure = f"{type(error).__name__}: {error}"
            raise
        finally:
            gather_objects(failure)
        return
    failures = [f for f in gather_objects(None) if f is not None]
    if failures:
        raise RuntimeError(f"local rank 0 failed: {failures[0]}")
    yield


def shutdown() -> None:
    """Leave together: wait for every rank, then close the group. A rank that exits earlier can abort the others.

    For the good end only. After an error a rank must not wait for its peers: let it exit with a non-zero status, and
    the launcher stops the rest.
    """
    barrier()
    dist.destroy_process_group()
