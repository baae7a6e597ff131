"""`rlhf score` inside the ranks of a test pool, with stops and kills at a chosen moment."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import torch

from rlhf_cli.config.compose import compose_stage
from rlhf_cli.config.freeze import freeze
from rlhf_cli.reward.combine import Rewards
from rlhf_cli.runtime.distributed import Ranks, barrier
from rlhf_cli.schema import ScoreConfig
from rlhf_cli.stages import score
from tests.stage_cases import quiet_process


def words(data: Path, *sources: str, **more: Any) -> list[str]:
    """more: option=value, `__` for the dot."""
    base = {"data.path": data, "reward.sources": f"[{','.join(sources)}]", "reward.batch_size": 2}
    base |= {"logging.progress": "none"} | {key.replace("__", "."): value for key, value in more.items()}
    return [f"{key}={value}" for key, value in base.items()]


def run_score(ranks: Ranks, run_dir: str, overrides: list[str]) -> dict[str, float]:
    """What a rank of `rlhf score *overrides run_dir=...` does; returns the figures."""
    composed = compose_stage("score", overrides)
    assert not composed.problems + composed.unmet, composed.problems + composed.unmet
    config: ScoreConfig = composed.config
    where = Path(run_dir)
    if ranks.is_main:
        freeze(where, composed.values | {"run_dir": run_dir})
    barrier()
    torch.set_num_threads(1)
    return score.score_file(config, where, quiet_process(ranks, where), ranks)


def run_score_counting(ranks: Ranks, run_dir: str, overrides: list[str]) -> tuple[dict[str, float], int]:
    """Also how many texts this rank has scored."""
    scored = 0
    real = Rewards.score

    def counted(self: Rewards, texts: Any, progress: Any) -> Any:
        nonlocal scored
        scored += len(texts)
        return real(self, texts, progress)

    with mock.patch.object(Rewards, "score", counted):
        return run_score(ranks, run_dir, overrides), scored


def run_score_stopping(ranks: Ranks, run_dir: str, overrides: list[str], part: int) -> dict[str, float]:
    """Rank 0 is asked to stop while it scores its part number `part` (0 is the first)."""
    real, begun = Rewards.score, 0
    opened = score.open_run

    def stopping(self: Rewards, texts: Any, progress: Any) -> Any:
        nonlocal begun
        if ranks.is_main and begun == part:
            watch._requested = 15
        begun += 1
        return real(self, texts, progress)

    def remember(*args: Any) -> Any:
        nonlocal watch
        run = opened(*args)
        watch = run.process.watch
        return run

    watch: Any = None
    with mock.patch.object(Rewards, "score", stopping), mock.patch.object(score, "open_run", remember):
        return run_score(ranks, run_dir, overrides)
