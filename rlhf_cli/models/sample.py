"""A few texts from fixed prompts, to see what a model has learned."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from rlhf_cli.schema import GenerationConfig


@torch.no_grad()
def sample_texts(
    model: nn.Module,
    tokenizer: Any,
    prompts: list[list[int]],
    generation: GenerationConfig,
    stop: tuple[str, ...],
    seed: int,
) -> list[str]:
    """Continue token prompts; one text each, up to EOS or a stop string, which are left out.

    model: a causal LM in evaluation mode with whole weights. The caller's RNG is left as it was.
    """
    if not prompts:
        return []
    device = next(model.parameters()).device
    longest = max(len(p) for p in prompts)
    pad = tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts], device=device)
    keep = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    stops = [*stop, *generation.stop]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        out = model.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=keep,
            max_new_tokens=generation.max_new_tokens,
            do_sample=generation.temperature > 0,
            temperature=generation.temperature or None,
            top_k=generation.top_k,
            top_p=generation.top_p,
            use_cache=True,
            pad_token_id=pad,
            eos_token_id=tokenizer.eos_token_id,
            **({"stop_strings": stops, "tokenizer": tokenizer} if stops else {}),
        )
    return [_until(tokenizer, row, stops) for row in out[:, longest:].tolist()]


def _until(tokenizer: Any, ids: list[int], stops: list[str]) -> str:
    eos = tokenizer.eos_token_id
    ids = ids[: ids.index(eos)] if eos in ids else ids
    text = str(tokenizer.decode([i for i in ids if i != tokenizer.pad_token_id]))
    for stop in stops:
        text = text.split(stop)[0]
    return text
