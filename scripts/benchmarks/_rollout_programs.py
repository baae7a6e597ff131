"""The programs that the rollout benchmark compares, and what they all write: one model, one set of prompts."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from rlhf_cli.models.scratch import gated_width
from rlhf_cli.rollout.sampler import Request, generate
from rlhf_cli.schema import RolloutConfig

PAD, BLOCK = 0, 256  # token; tokens in a block of transformers' paged cache


@dataclass(frozen=True)
class Shape:
    """A Llama and what it is asked for. batch: rows at a time; new: longest response; mean: of ragged responses."""

    hidden: int = 256
    layers: int = 6
    heads: int = 4
    kv_heads: int = 4
    vocab: int = 4096
    batch: int = 32
    prompt: int = 64
    new: int = 64
    mean: float = 19.5
    ragged_prompts: int = 128

    @property
    def intermediate(self) -> int:
        """Width of the gated layers."""
        return gated_width(self.hidden)

    @property
    def matrix_parameters(self) -> int:
        """Weights that each token is multiplied with, the head included."""
        attention = 2 * self.hidden**2 * (1 + self.kv_heads / self.heads)
        return int(self.layers * (attention + 3 * self.hidden * self.intermediate) + self.vocab * self.hidden)


@dataclass(frozen=True)
class Task:
    """prompts: token ids; ends: end tokens, none = every response has `new` tokens."""

    prompts: list[np.ndarray]
    ends: list[int]
    new: int


def make_model(shape: Shape, dtype: torch.dtype, device: torch.device) -> LlamaForCausalLM:
    """Random weights; every token is about as likely as any other."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocab, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        max_position_embeddings=2 * (shape.prompt + shape.new), pad_token_id=PAD, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    with torch.device(device):
        return LlamaForCausalLM(config).to(dtype).eval()


def make_tokenizer(shape: Shape) -> PreTrainedTokenizerFast:
    """A word for each token; nothing is encoded with it."""
    words = {"<pad>": 0, "<end>": 1, **{f"w{i}": i for i in range(2, shape.vocab)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<end>"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")


def fixed_task(shape: Shape, seed: int) -> Task:
    """One batch; nothing ends before the limit."""
    return Task(_prompts(shape, shape.batch, seed), [], shape.new)


def ragged_task(shape: Shape, seed: int) -> Task:
    """So many end tokens that responses have `mean` tokens on average."""
    share = end_share(shape.mean, shape.new)
    return Task(
        _prompts(shape, shape.ragged_prompts, seed), list(range(1, 1 + max(1, round(share * shape.vocab)))), shape.new
    )


def end_share(mean: float, longest: int) -> float:
    """p for which min(geometric(p), longest) has this mean, (1 - (1 - p)^longest) / p; by halving the interval."""
    low, high = 1e-6, 1.0
    for _ in range(60):
        p = (low + high) / 2
        low, high = (p, high) if (1 - (1 - p) ** longest) / p > mean else (low, p)
    return low


def _prompts(shape: Shape, num: int, seed: int) -> list[np.ndarray]:
    """Between half of shape.prompt and all of it long."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(shape.prompt // 2, shape.prompt + 1, num)
    return [rng.integers(2, shape.vocab, n).astype(np.int32) for n in lengths]


Program = Callable[[Any, Any, Shape, Task, int], list[int]]


def ours(model: Any, tokenizer: Any, shape: Shape, task: Task, seed: int, refill: bool = False) -> list[int]:
    """Tokens of each response, by rlhf's sampler."""
    model.generation_config.eos_token_id = task.ends or None
    settings = RolloutConfig(
        max_new_tokens=task.new, batch_size=shape.batch, refill=refill, min_new_tokens=0 if task.ends else task.new
    )
    requests = [Request(p, i, task.new) for i, p in enumerate(task.prompts)]
    return [len(r.token_ids) for r in generate(model, tokenizer, requests, settings, [], seed)]


def ours_refilled(model: Any, tokenizer: Any, shape: Shape, task: Task, seed: int) -> list[int]:
    """The same with generation.refill."""
    return ours(model, tokenizer, shape, task, seed, refill=True)


def transformers_generate(model: Any, tokenizer: Any, shape: Shape, task: Task, seed: int) -> list[int]:
    """model.generate, batch by batch, left-padded."""
    torch.manual_seed(seed)
    found = []
    for start in range(0, len(task.prompts), shape.batch):
        prompts = task.prompts[start : start + shape.batch]
        longest = max(len(p) for p in prompts)
        ids = torch.tensor([[PAD] * (longest - len(p)) + p.tolist() for p in prompts], device=model.device)
        kept = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.device)
        output = model.generate(ids, attention_mask=kept, generation_config=_config(task))[:, longest:]
        found += [_length(row, task) for row in output.tolist()]
    return found


def continuous_batching(model: Any, tokenizer: Any, shape: Shape, task: Task, seed: int) -> list[int]:
    """model.generate_batch, with blocks for one batch."""
    blocks = shape.batch * -(-(shape.prompt + shape.new) // BLOCK)
    settings = ContinuousBatchingConfig(num_blocks=blocks, max_batch_tokens=shape.batch * shape.prompt, seed=seed)
    outputs = model.generate_batch(
        [p.tolist() for p in task.prompts],
        generation_config=_config(task),
        continuous_batching_config=settings,
        progress_bar=False,
    )
    if failed := [o.error for o in outputs.values() if o.error]:
        raise RuntimeError(failed[0])
    if len(outputs) != len(task.prompts):
        raise RuntimeError(f"{len(outputs)} of {len(task.prompts)} responses came back")
    return [_length(o.generated_tokens, task) for o in outputs.values()]


PROGRAMS: dict[str, Program] = {
    "ours": ours,
    "ours+refill": ours_refilled,
    "generate": transformers_generate,
    "continuous": continuous_batching,
}


def timed(program: Program, *arguments: Any, clock: Callable[[], float] = time.perf_counter) -> tuple[float, int]:
    """Seconds, and tokens of all responses, end tokens included."""
    began = clock()
    lengths = program(*arguments)
    return clock() - began, sum(lengths)


def _config(task: Task) -> GenerationConfig:
    return GenerationConfig(
        do_sample=True, top_k=0, top_p=1.0, max_new_tokens=task.new, pad_token_id=PAD, eos_token_id=task.ends or -1
    )


def _length(tokens: list[int], task: Task) -> int:
    """Up to the first end token."""
    ends = set(task.ends)
    return next((i + 1 for i, token in enumerate(tokens) if token in ends), len(tokens))
