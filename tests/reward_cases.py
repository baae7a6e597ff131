"""Tiny reward models, and what tests/test_reward_sharded.py runs on each rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_cli.models.load import enable_gradient_checkpointing
from rlhf_cli.models.lora import add_lora, plain_model, save_adapter
from rlhf_cli.models.reward import enable_scores, load_reward_model, new_reward_model
from rlhf_cli.models.save import save_model
from rlhf_cli.runtime.distributed import Ranks
from rlhf_cli.runtime.engine import gathered_state_dict, make_engine, param_groups, sharded_loading
from rlhf_cli.schema import LoraConfig, ModelConfig, OptimConfig
from tests.loss_cases import stage_config
from tests.tiny_models import noisy, tiny_config, tiny_tokenizer

FP32 = torch.float32


def tiny_reward(
    arch: str = "llama", labels: list[str] | None = None, tie: bool = False, layers: int = 2
) -> PreTrainedModel:
    """Random weights, biases and norms included."""
    model = noisy(new_reward_model(tiny_config(arch, tie, layers), labels, FP32, 0))
    # The tokens of a random model matter little; larger ones make a wrong position show.
    model.get_input_embeddings().weight.data.mul_(10)
    return model


def ragged(rows: list[list[int]], pad: int, left: bool = False) -> dict[str, Tensor]:
    """input_ids, position_ids (N, T) and last (N,) of padded rows; attention_mask for transformers' own forward."""
    width = max(map(len, rows))
    fill = [[pad] * (width - len(r)) for r in rows]
    ids = [f + r if left else r + f for r, f in zip(rows, fill, strict=True)]
    mask = [
        [0] * len(f) + [1] * len(r) if left else [1] * len(r) + [0] * len(f) for r, f in zip(rows, fill, strict=True)
    ]
    keep = torch.tensor(mask)
    positions = (keep.cumsum(1) - 1).clamp(min=0) if left else torch.arange(width).expand(len(rows), -1)
    last = torch.tensor([width - 1 if left else len(r) - 1 for r in rows])
    return {"input_ids": torch.tensor(ids), "position_ids": positions, "last": last, "attention_mask": keep}


def random_rows(seed: int, count: int = 5, vocab: int = 20) -> list[list[int]]:
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 12, (count,), generator=draw).tolist()
    return [torch.randint(3, vocab, (n,), generator=draw).tolist() for n in lengths]


def scores_of(model: Any, rows: list[list[int]]) -> Tensor:
    """(N, C) by the call that enable_scores teaches."""
    batch = ragged(rows, 0)
    del batch["attention_mask"]
    out: Tensor = model(**batch)
    return out


def train_pairs(ranks: Ranks, base: str, stage: int, kind: str, directory: str) -> Any:
    """(first scores of this rank, all trained weights after two steps, the head's largest change) of a reward model.

    base: a directory with a causal LM or a classifier. Rank 0 saves the result to `directory`.
    """
    with sharded_loading(stage_config(stage), FP32):
        model: nn.Module = load_reward_model(ModelConfig(path=base), base, FP32, None, 7, num_tokens=None)
    plain = plain_model(model)
    sharded = hasattr(plain.get_input_embeddings().weight, "ds_id")
    assert sharded == (stage == 3)
    if "checkpointing" in kind:
        enable_gradient_checkpointing(plain)
    if "lora" in kind:
        model = add_lora(plain, LoraConfig(enabled=True, r=4), "SEQ_CLS", "embeddings" in kind, seed=3)
    enable_scores(model)
    engine = make_engine(model, param_groups(model, 0.0), OptimConfig(), stage_config(stage), FP32, ranks)
    before = gathered_state_dict(engine, only_trainable=True)
    first = None
    for step in range(3):  # A has no gradient while B is zero
        chosen, rejected = random_rows(2 * step + ranks.rank), random_rows(50 + 2 * step + ranks.rank)
        scores = scores_of(engine.forward, chosen + rejected)[:, 0]
        loss = -F.logsigmoid(scores[:5] - scores[5:]).sum() / (5 * ranks.world_size)
        first = scores.detach() if first is None else first
        engine.backward(loss)
        engine.step(1e-2)
    weights = gathered_state_dict(engine, only_trainable="lora" in kind)
    if ranks.is_main:
        tokenizer = tiny_tokenizer()
        if "lora" in kind:
            save_adapter(model, weights, Path(directory), tokenizer, base)  # type: ignore[arg-type]
        else:
            save_model(plain.config, weights, Path(directory), tokenizer, reward={"mean": 0.5, "std": 2.0})
    engine.eval()
    final = scores_of(engine.forward, random_rows(99)).detach()
    engine.destroy()
    assert first is not None
    changed = {n: float((weights[n] - t).abs().max()) for n, t in before.items()}
    return first.tolist(), {n: t.tolist() for n, t in weights.items()}, changed, final.tolist()
