"""A few texts from fixed prompts, to see what a model has learned."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from rlhf_cli.models.lora import plain_model
from rlhf_cli.schema import GenerationConfig

STOP_WINDOW = 32  # newest tokens in which a stop string is looked for; it may be spread over several


@torch.no_grad()
def sample_texts(
    model: nn.Module,
    tokenizer: Any,
    prompts: list[list[int]],
    generation: GenerationConfig,
    stop: tuple[str, ...],
    seed: int,
) -> list[str]:
    """Continue token prompts; one text each, up to EOS, a stop string (both left out) or the model's last position.

    A prompt that leaves no position for a new token loses its beginning.

    model: a causal LM in evaluation mode with whole weights. Draws from a generator of its own.
    """
    if not prompts:
        return []
    device = next(model.parameters()).device
    draw = torch.Generator(device).manual_seed(seed)
    num_positions = getattr(plain_model(model).config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
    prompts = [p[-(num_positions - 1) :] for p in prompts]
    longest = max(len(p) for p in prompts)
    pad, stops = tokenizer.pad_token_id, [*stop, *generation.stop]
    ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts], device=device)  # (B, T), left-padded
    keep = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    out: list[list[int]] = [[] for _ in prompts]
    running = [True] * len(prompts)
    cache: Any = None
    positions = (keep.cumsum(-1) - 1).clamp(min=0)
    for _ in range(min(generation.max_new_tokens, num_positions - longest)):
        step = model(
            input_ids=ids, attention_mask=keep, position_ids=positions, past_key_values=cache, use_cache=True,
            logits_to_keep=1,
        )  # fmt: skip
        cache = step.past_key_values
        tokens = next_tokens(step.logits[:, -1].float(), generation, draw)
        for i, token in enumerate(tokens.tolist()):
            if running[i] and token != tokenizer.eos_token_id:
                out[i].append(token)
                tail = tokenizer.decode(out[i][-STOP_WINDOW:])
                running[i] = not any(s in tail for s in stops)
            else:
                running[i] = False
        if not any(running):
            break
        ids, positions = tokens[:, None], positions[:, -1:] + 1
        keep = torch.cat([keep, keep.new_ones(len(prompts), 1)], 1)
    return [_until_stop(tokenizer.decode(row), stops) for row in out]


def next_tokens(logits: torch.Tensor, generation: GenerationConfig, draw: torch.Generator) -> torch.Tensor:
    """One token per row of logits (B, V) -> (B,): the likeliest at temperature 0, else drawn after the filters."""
    if generation.temperature == 0:
        return logits.argmax(-1)
    logits = logits / generation.temperature
    if generation.top_k:
        kept = logits.topk(min(generation.top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kept, float("-inf"))
    if generation.top_p < 1:
        ordered, order = logits.sort(descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)  # the token that crosses top_p stays
        dropped = torch.zeros_like(logits, dtype=torch.bool).scatter(1, order, before >= generation.top_p)
        logits = logits.masked_fill(dropped, float("-inf"))
    return torch.multinomial(logits.softmax(-1), 1, generator=draw)[:, 0]


def _until_stop(text: str, stops: list[str]) -> str:
    for stop in stops:
        text = text.split(stop)[0]
    return text
