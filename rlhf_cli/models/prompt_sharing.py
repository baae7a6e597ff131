"""Several answers to one prompt in one row: the prompt's tokens are computed once (as in tree attention).

    row        prompt  answer 1  answer 2  ...  padding
    segments     0        1         2             -1
    positions  0 .. p-1  p ..      p ..

An answer sees the prompt and itself, so with positions that go on from the prompt's end its hidden states are those of
prompt + answer alone. Shapes: N rows, T positions.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PretrainedConfig

# Attention of these looks at the mask and at position_ids and at nothing else. Others add biases by distance in the row
# (Bloom), or look through a window of it (GPT-Neo, Gemma 3).
KNOWN = ("llama", "mistral", "qwen2", "qwen3", "gpt2", "gpt_neox", "opt")
ATTENTION = ("sdpa", "eager")  # flash attention takes no mask of our own


def why_not_shared(config: PretrainedConfig) -> str | None:
    """Why a model cannot take prompt-sharing rows; None when it can."""
    if getattr(config, "auto_map", None):
        return "the model comes with code of its own"
    if config.model_type not in KNOWN:
        return f"{config.model_type} is not known to look at masks and positions alone"
    if config._attn_implementation not in ATTENTION:
        return f"{config._attn_implementation} takes no mask"
    layers = getattr(config, "layer_types", None) or []
    # Qwen's configs name a window that is not used.
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if window or any(kind != "full_attention" for kind in layers):
        return "its attention looks through a window"
    return None


def sharing_mask(segments: Tensor, config: PretrainedConfig, dtype: torch.dtype) -> Tensor:
    """segments (N, T) -> attention mask (N, 1, T, T): what is earlier, and of the prompt or of one's own segment."""
    earlier = torch.ones(segments.shape[1], segments.shape[1], dtype=torch.bool, device=segments.device).tril()
    query, key = segments[:, :, None], segments[:, None, :]
    seen = (earlier & ((key == 0) | (key == query)))[:, None]  # padding sees padding: no row of the mask is empty
    if config._attn_implementation != "eager":
        return seen
    return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
