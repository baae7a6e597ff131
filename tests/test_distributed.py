"""What ranks say to each other, and the pool of ranks that the tests use."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_cli.errors import RunFailed
from rlhf_cli.runtime import distributed
from rlhf_cli.runtime.distributed import Ranks
from tests.ranks import Pools, RankFailed

pytestmark = pytest.mark.distributed
ROOT = Path(__file__).resolve().parent.parent


def talk(ranks: Ranks) -> dict[str, Any]:
    mine = torch.tensor([1.0, 10.0]) * (ranks.rank + 1)
    total = distributed.sum_over_ranks(mine)
    result = {
        "total": total.tolist(),
        "mine": mine.tolist(),
        "any": distributed.any_rank(ranks.rank == 1),
        "none": distributed.any_rank(False),
        "from_0": distributed.broadcast_object({"rank": ranks.rank}),
        "from_1": distributed.broadcast_object({"rank": ranks.rank}, source=1),
        "all": distributed.gather_objects(ranks.rank * 10),
        "main": ranks.is_main,
        "place": (ranks.rank, ranks.world_size, ranks.local_rank, str(ranks.device)),
    }
    distributed.barrier()
    return result


def test_collectives(run_on_ranks: Any) -> None:
    for rank, result in enumerate(run_on_ranks(2, "tests.test_distributed:talk")):
        assert result["total"] == [3.0, 30.0]  # 1 + 2, 10 + 20
        assert result["mine"] == [rank + 1.0, 10.0 * (rank + 1)]  # the argument is left alone
        assert (result["any"], result["none"]) == (True, False)
        assert (result["from_0"], result["from_1"]) == ({"rank": 0}, {"rank": 1})
        assert result["all"] == [0, 10]
        assert result["main"] == (rank == 0)
        assert result["place"] == (rank, 2, rank, "cpu")


def in_turn(ranks: Ranks, directory: str) -> bool:
    """Whether this rank found the file that the first one takes its time to write."""
    path = Path(directory) / "cache"
    with distributed.local_first(ranks):
        there = path.exists()
        if not there:
            time.sleep(0.3)
            path.touch()
    return there


def first_fails(ranks: Ranks) -> str:
    try:
        with distributed.local_first(ranks):
            if ranks.rank == 0:
                raise ValueError("no such file")
            return "ran the body"
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"


def test_local_first(run_on_ranks: Any, tmp_path: Path) -> None:
    assert run_on_ranks(2, "tests.test_distributed:in_turn", directory=str(tmp_path)) == [False, True]
    assert run_on_ranks(2, "tests.test_distributed:first_fails") == [
        "ValueError: no such file",
        "RuntimeError: local rank 0 failed: ValueError: no such file",
    ]


def test_one_process_without_a_launcher(tmp_path: Path) -> None:
    program = (
        "from rlhf_cli.runtime import distributed as d\n"
        "ranks = d.init(30.0)\n"
        "import torch, torch.distributed as t\n"
        "assert t.is_initialized()\n"
        "print(ranks.rank, ranks.world_size, d.gather_objects('x'), d.sum_over_ranks(torch.ones(1)).item())\n"
        "d.shutdown()\n"
        "assert not t.is_initialized()\n"
    )
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (0, "0 1 ['x'] 1.0\n"), done.stderr


def test_gpus_that_torch_cannot_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert distributed.own_device(1) == torch.device("cpu")
    monkeypatch.setenv("RLHF_COUNTED_GPUS", "8")
    monkeypatch.setattr(torch, "__version__", "2.13.0+cu130")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    said = r"torch 2\.13\.0\+cu130 \(CUDA 13\.0\) cannot use the GPUs .*\(8\).* empty CUDA_VISIBLE_DEVICES=$"
    with pytest.raises(RunFailed, match=said):
        distributed.own_device(1)


@pytest.mark.parametrize(("visible", "index"), [(8, 3), (1, 0)])  # all of the machine's, or one bound by Slurm
def test_the_gpu_of_a_rank(visible: int, index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", calls.append)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert distributed.own_device(3) == torch.device("cuda", index)
    assert calls == [torch.device("cuda", index), False]
    assert os.environ["LOCAL_RANK"] == str(index), "DeepSpeed's number of the device"


def one_raises(ranks: Ranks) -> None:
    if ranks.rank == 1:
        raise KeyError("lost")
    distributed.barrier()


def one_sleeps(ranks: Ranks) -> int:
    if ranks.rank == 1:
        time.sleep(60)
    return os.getpid()


def one_dies(ranks: Ranks) -> None:
    if ranks.rank == 1:
        os._exit(7)


def test_pool_tells_what_went_wrong_and_starts_again() -> None:
    pools = Pools()
    try:
        for case, said in (("one_raises", "KeyError: 'lost'"), ("one_dies", "the process died")):
            start = time.monotonic()
            with pytest.raises(RankFailed, match=said) as caught:
                pools.run(2, f"tests.test_distributed:{case}")
            assert f"rank 1: tests.test_distributed:{case}" in str(caught.value)
            assert time.monotonic() - start < 60
        with pytest.raises(RankFailed, match="no answer"):
            pools.run(1, "tests.test_distributed:one_sleeps", timeout=0.0)
        assert len(pools.run(1, "tests.test_distributed:one_sleeps")) == 1
    finally:
        pools.close()
