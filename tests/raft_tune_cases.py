"""The fine-tuning of RAFT iterations: by the production code on a rank, and the slow way: one row at a time, full
logits, torch's own cross-entropy and AdamW."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from rlhf_cli.data.token_rows import TokenRows
from rlhf_cli.ops.schedule import learning_rate
from rlhf_cli.raft.state import RaftState
from rlhf_cli.raft.tune import fine_tune
from rlhf_cli.run import Run
from rlhf_cli.runtime.distributed import Ranks
from rlhf_cli.runtime.engine import gathered_state_dict
from rlhf_cli.runtime.process import RankProcess
from rlhf_cli.runtime.stop import StopWatch
from rlhf_cli.schema import RaftConfig, build
from tests.ppo_cases import PAD, engine_of, make_policy, ragged
from tests.ppo_reference import two_groups

ITERATIONS, EPOCHS, SIZE = 3, 2, 3
ROWS = (7, 4, 8)  # selected in each iteration; of eight, but for those that are discarded


def config_of(optimizer: str, soft: bool, micro: int) -> RaftConfig:
    values: dict[str, Any] = {
        "stage": "raft", "model": {"path": "m"}, "data": {"path": "p"},
        "optim": {"lr": 2e-3, "schedule": "linear", "min_lr_ratio": 0.1, "warmup_ratio": 0.25, "min_warmup_steps": 1,
                  "weight_decay": 0.1, "max_grad_norm": 0.5, "eps": 1e-5},
        "raft": {"num_iterations": ITERATIONS, "epochs": EPOCHS, "optimizer": optimizer, "top_fraction": 0.5,
                 "soft_temperature": 1.0 if soft else None, "batch_size": 4 if soft else 8},
        "train": {"global_batch_size": SIZE, "micro_batch_size": micro, "seed": 7},
    }  # fmt: skip
    return build(RaftConfig, values)


class Row(NamedTuple):
    """prompt (P,), response (T,) and what its tokens count."""

    prompt: np.ndarray
    response: np.ndarray
    weight: float


def rows_of(iteration: int, soft: bool) -> list[Row]:
    prompts, responses = ragged(ROWS[iteration], seed=iteration)
    weights = np.random.default_rng(iteration).uniform(0.05, 1, len(prompts)) if soft else np.ones(len(prompts))
    return [Row(*row) for row in zip(prompts, responses, weights.tolist(), strict=True)]


class Tuned(NamedTuple):
    """weights: at the end, on rank 0; figures: of each iteration."""

    weights: dict[str, np.ndarray]
    figures: list[dict[str, float]]


def tune(ranks: Ranks, stage: int, micro: int, kind: str, optimizer: str, soft: bool) -> Tuned:
    torch.set_num_threads(1)
    config = config_of(optimizer, soft, micro)
    engine = engine_of(make_policy(kind), config, stage, ranks)  # type: ignore[arg-type]  # of which it reads optim
    watch = StopWatch(Path("nowhere"), ranks.rank)
    process = RankProcess(ranks.rank, ranks.local_rank, ranks.world_size, io.StringIO(), watch)
    run = Run(config, Path("nowhere"), ranks, process, None)
    models: Any = SimpleNamespace(policy=engine, text=SimpleNamespace(tokenizer=SimpleNamespace(pad_token_id=PAD)))
    figures, state = [], RaftState("data")
    for state.iteration in range(ITERATIONS):
        rows = rows_of(state.iteration, soft)
        ids = [np.concatenate([row.prompt, row.response]).astype(np.int32) for row in rows]
        trained = [np.arange(len(i)) >= len(row.prompt) for i, row in zip(ids, rows, strict=True)]
        offsets = np.cumsum([0, *map(len, ids)])
        blank = np.zeros(len(rows), np.uint64), np.ones(len(rows), np.int64)
        token_rows = TokenRows(np.concatenate(ids), np.concatenate(trained), offsets, *blank)
        weights = torch.tensor([row.weight for row in rows], dtype=torch.float64) if soft else None
        figures.append(fine_tune(models, config, token_rows, weights, state, run))
        assert state.tuning is None
    weights_now = {name: t.float().numpy() for name, t in gathered_state_dict(engine).items()}
    engine.destroy()
    return Tuned(weights_now, figures)


def slow_tune(kind: str, optimizer: str, soft: bool) -> Tuned:
    config = config_of(optimizer, soft, 1)
    optim, model, adam = config.optim, make_policy(kind), None
    planned = EPOCHS * 3  # of eight rows, three at a time
    figures = []
    for iteration in range(ITERATIONS):
        rows, losses, norms, rate = rows_of(iteration, soft), [], [], 0.0
        if adam is None or optimizer == "fresh":
            adam = torch.optim.AdamW(two_groups(model, optim.weight_decay), betas=optim.betas, eps=optim.eps)
        orders = [
            np.random.default_rng([7 * 1_000_003 + iteration, epoch]).permutation(len(rows)) for epoch in range(EPOCHS)
        ]
        steps = [order[start : start + SIZE] for order in orders for start in range(0, len(rows), SIZE)]
        tokens = sum(len(row.response) for row in rows)
        mean_weight = sum(row.weight * len(row.response) for row in rows) / tokens
        for number, batch in enumerate(steps):
            total, count = torch.zeros(()), 0.0
            for row in [rows[i] for i in batch]:
                ids = torch.tensor([[*row.prompt, *row.response]])
                logits = model(input_ids=ids).logits[0, len(row.prompt) - 1 : -1]  # each position predicts the next
                total = total + row.weight * F.cross_entropy(logits, ids[0, len(row.prompt) :], reduction="sum")
                count += mean_weight * len(row.response)
            (total / count).backward()
            norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), optim.max_grad_norm)))
            losses.append((total / count).item())
            fresh = (number, len(steps))
            rate = learning_rate(
                optim, *(fresh if optimizer == "fresh" else (iteration * planned + number, ITERATIONS * planned))
            )
            for group in adam.param_groups:
                group["lr"] = rate
            adam.step()
            adam.zero_grad()
        figures.append(
            {"loss": np.mean(losses), "grad_norm": np.mean(norms), "learning_rate": rate, "steps": len(steps)}
        )
    return Tuned({name: t.detach().numpy() for name, t in model.state_dict().items()}, figures)
