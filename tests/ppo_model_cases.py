"""What tests/test_ppo_models.py runs on each rank: opening, reading, training, saving, resuming the models of PPO."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rlhf_cli.align.batch import collate_responses, share_of_rank
from rlhf_cli.align.forward import response_logprobs, response_values, token_values
from rlhf_cli.errors import RlhfError
from rlhf_cli.models.tokenizer import tokenizer_digest
from rlhf_cli.ppo.models import Models
from rlhf_cli.reward.source import ScoredText
from rlhf_cli.runtime import checkpoint
from rlhf_cli.runtime.distributed import Ranks, broadcast_object
from rlhf_cli.runtime.engine import gathered_for_generation, gathered_state_dict
from rlhf_cli.schema import PpoConfig
from tests.ppo_models import opened, random_texts

MICRO, RATE = 2, 1e-3
Named = dict[str, np.ndarray]


def policy_loss(logprobs: Tensor, response_rows: Tensor) -> Tensor:
    """Σ of a weight per response times its log-probabilities: as varied as advantages are."""
    return -(logprobs * torch.cos(1.0 + response_rows)).sum()


def value_loss(values: Tensor, response_columns: Tensor) -> Tensor:
    return ((values - 0.1 * response_columns) ** 2).sum()


def logprob_call(call: Callable[..., Any], batch: Any) -> Tensor:
    out: Tensor = call(
        input_ids=batch.input_ids, position_ids=batch.position_ids, targets=batch.targets, temperature=1.0,
        logprobs=True,
    ).logprobs  # fmt: skip
    return out


def train_steps(models: Models, ranks: Ranks, steps: int, skip_policy_at: int | None = None, first: int = 0) -> None:
    """Steps of policy and critic in turns, on texts that depend on the step."""
    pad = models.text.tokenizer.pad_token_id
    for step in range(first, first + steps):
        prompts, responses = random_texts(seed=10 + step)
        total = sum(len(r) for r in responses)
        shares = share_of_rank(prompts, responses, np.arange(len(prompts)), MICRO, ranks.rank, ranks.world_size)
        batches = [collate_responses(prompts, responses, rows, pad) for rows in shares]
        for engine, loss in ((models.policy, _of_policy), (models.critic, _of_critic)):
            if engine is None or (engine is models.policy and step == skip_policy_at):
                continue
            for batch in batches:
                engine.backward(loss(engine.forward, batch) / total)
            engine.step(RATE)
            if engine is models.policy:
                models.after_step()


def _of_policy(call: Callable[..., Any], batch: Any) -> Tensor:
    return policy_loss(logprob_call(call, batch), batch.response_rows)


def _of_critic(call: Callable[..., Any], batch: Any) -> Tensor:
    return value_loss(token_values(call, batch), batch.response_columns)


def train_plain(model: nn.Module, kind: str, steps: int, skip_at: int | None = None, decay: float = 0.0) -> Named:
    """The same on one process with torch's own AdamW; the trained weights at the end."""
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in trained.values() if p.ndim >= 2], "weight_decay": decay},
            {"params": [p for p in trained.values() if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=RATE,
        eps=1e-5,
    )
    for step in range(steps):
        if step == skip_at:
            continue
        prompts, responses = random_texts(seed=10 + step)
        for rows in share_of_rank(prompts, responses, np.arange(len(prompts)), MICRO, 0, 1):
            batch = collate_responses(prompts, responses, rows, 0)
            loss = _of_policy(model, batch) if kind == "policy" else _of_critic(model, batch)
            (loss / sum(len(r) for r in responses)).backward()
        torch.nn.utils.clip_grad_norm_(list(trained.values()), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return {n: p.detach().numpy().copy() for n, p in trained.items()}


def readings(models: Models, ranks: Ranks) -> dict[str, Any]:
    """Log-probabilities of policy and reference, values, scores of fixed texts; logits of the copy that generates."""
    prompts, responses = random_texts(seed=1)
    shared = (prompts, responses, models.text.tokenizer.pad_token_id, MICRO, ranks)
    found: dict[str, Any] = {"policy": response_logprobs(models.policy.forward, *shared, temperature=1.0).numpy()}
    with models.reference() as call:
        found["reference"] = response_logprobs(call, *shared, temperature=1.0).numpy()
    if models.critic is not None:
        found["values"] = response_values(models.critic.forward, *shared).numpy()
    texts = [
        ScoredText(None, models.text.tokenizer.decode(np.concatenate(pair)))
        for pair in zip(prompts, responses, strict=True)
    ]
    with models.scoring() as rewards, models.scoring():
        found["scores"] = rewards.score(texts[: 4 + ranks.rank]).total.numpy()[:4]
    with gathered_for_generation(models.policy) as module, torch.no_grad():
        for _ in range(1 + ranks.rank):  # ranks need not keep in step
            found["generating"] = module(input_ids=torch.arange(3, 12)[None]).logits.float().numpy()
    return found


def trained_weights(models: Models) -> dict[str, Named]:
    """Of policy and critic, on rank 0."""
    engines = {"policy": models.policy, "critic": models.critic}
    return {
        name: {n: t.numpy() for n, t in gathered_state_dict(e, only_trainable=True, dtype=torch.float32).items()}
        for name, e in engines.items()
        if e is not None
    }


def close(models: Models) -> None:
    models.policy.destroy()
    if models.critic is not None:
        models.critic.destroy()


def values_at_the_end(ranks: Ranks, run_dir: str, config: PpoConfig, save: bool = False) -> Any:
    """(values, scores that the policy learns from) of the same texts, read at the same EOS."""
    models, run = opened(ranks, run_dir, config)
    tokenizer, digest = models.text.tokenizer, tokenizer_digest(models.text.tokenizer)
    ids = [np.concatenate(pair) for pair in zip(*random_texts(seed=1), strict=True)]
    texts = [
        ScoredText(None, tokenizer.decode(one), token_ids=tuple(one.tolist()), tokenizer_digest=digest) for one in ids
    ]
    with models.scoring() as rewards:
        scores = rewards.score(texts).total.numpy()
    assert models.critic is not None
    ends = [np.full(2, tokenizer.eos_token_id, np.int32)] * len(ids)  # the value before the second is read at the first
    values = response_values(models.critic.forward, ids, ends, tokenizer.pad_token_id, MICRO, ranks)[:, 1].numpy()
    if save:
        models.save(run.run_dir)
    close(models)
    return values, scores


def open_train_read(
    ranks: Ranks, run_dir: str, config: PpoConfig, steps: int = 0, skip_policy_at: int | None = None
) -> Any:
    """(readings before training, trained weights after `steps`, readings then)."""
    models, _ = opened(ranks, run_dir, config)
    before = readings(models, ranks)
    train_steps(models, ranks, steps, skip_policy_at)
    weights = trained_weights(models)
    after = readings(models, ranks)
    close(models)
    return before, weights, after


def open_train_save(ranks: Ranks, run_dir: str, config: PpoConfig, steps: int = 3, best: bool = False) -> Any:
    """(trained weights, averages by name, readings, the manifest's output) of a run that is saved."""
    models, run = opened(ranks, run_dir, config)
    start = {n: torch.from_numpy(w.copy()) for n, w in trained_weights(models)["policy"].items()}
    train_steps(models, ranks, steps)
    output = models.save(run.run_dir, start if best else None)
    averages = {n: t.float().numpy() for n, t in models.ema.weights().items()} if models.ema is not None else {}
    result = trained_weights(models), averages, readings(models, ranks), output
    close(models)
    return result


def refused(ranks: Ranks, run_dir: str, config: PpoConfig) -> str:
    """What the user is told."""
    try:
        opened(ranks, run_dir, config)
    except RlhfError as error:
        return str(error)
    return "no error"


def train_and_checkpoint(ranks: Ranks, run_dir: str, config: PpoConfig) -> Any:
    """Two steps, a checkpoint, two more: (trained weights, averages)."""
    models, run = opened(ranks, run_dir, config)
    train_steps(models, ranks, 2)
    pieces = models.pieces()
    writers = {name: piece.write for name, piece in pieces.items()}
    needed = sum(piece.num_bytes for piece in pieces.values())
    path = checkpoint.save(run.run_dir, 2, ranks, writers, {}, 1, needed)
    stored = sum(f.stat().st_size for f in path.rglob("*.safetensors"))
    assert needed <= stored < 1.3 * needed + 200_000, (needed, stored)  # headers are large beside tiny weights
    train_steps(models, ranks, 2, first=2)
    result = _state(models)
    close(models)
    return result


def resume(ranks: Ranks, run_dir: str, config: PpoConfig) -> Any:
    """The last two steps of train_and_checkpoint, from its checkpoint."""
    path = broadcast_object(checkpoint.newest_valid(Path(run_dir), print) if ranks.is_main else None)
    models, _ = opened(ranks, run_dir, config, path)
    checkpoint.load(path, {name: piece.read for name, piece in models.pieces().items()}, ranks, 0)
    train_steps(models, ranks, 2, first=2)
    result = _state(models)
    close(models)
    return result


def _state(models: Models) -> Any:
    averages = {n: t.numpy() for n, t in models.ema.weights().items()} if models.ema is not None else {}
    return trained_weights(models), averages


def peaks(ranks: Ranks, run_dir: str, config: PpoConfig) -> dict[str, float]:
    """Most resident MiB, above what this rank had before opening, by phase; on top of each other as a run has them."""
    _tidy()
    before = _status_mib("VmRSS")
    found: dict[str, float] = {}

    @contextmanager
    def measured(phase: str) -> Iterator[None]:
        _tidy()
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): VmHWM starts again at what is resident now
        yield
        found[phase] = _status_mib("VmHWM") - before

    with measured("open"):
        models, _ = opened(ranks, run_dir, config)
    prompts, responses = [np.full(32, 5, np.int32)] * 4, [np.full(32, 7, np.int32)] * 4
    shared = (prompts, responses, models.text.tokenizer.pad_token_id, config.train.micro_batch_size, ranks)
    with measured("generate"), gathered_for_generation(models.policy) as module, torch.no_grad():
        module(input_ids=torch.full((4, 64), 5))
    with measured("score"):
        with models.scoring() as rewards:
            rewards.score([ScoredText(None, models.text.tokenizer.decode([5] * 64))] * 4)
        with models.reference() as call:
            response_logprobs(call, *shared, temperature=1.0)
    with measured("train"):
        batch = collate_responses(prompts[:2], responses[:2], range(2), 0)
        for engine, loss in ((models.policy, _of_policy), (models.critic, _of_critic)):
            assert engine is not None
            engine.backward(loss(engine.forward, batch) / 64)
            engine.step(1e-3)
    _tidy()
    found["at rest"] = _status_mib("VmRSS") - before
    close(models)
    return found


def _tidy() -> None:
    """Give back what Python and malloc keep of freed memory."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def _status_mib(field: str) -> float:
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    return int(status.split(f"{field}:")[1].split()[0]) / 1024
