"""No dropout: in reinforcement learning the same tokens must have the same log-probability in every pass.

Evaluation mode would do that too, but gradient checkpointing works in training mode only.
"""

from __future__ import annotations

import copy
import re

from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import PretrainedConfig

from rlhf_cli.models.lora import plain_model

# Floats that modules and configs hold: attention_dropout, resid_pdrop, attn_dropout_p, layerdrop, router_jitter_noise.
RANDOM = re.compile(r"drop|jitter")


def turn_off_dropout(model: nn.Module) -> PretrainedConfig:
    """Make training mode deterministic: dropout of layers, attention, adapters and whole blocks, and router noise.

    Returns a copy of the model's config as it was, which is what a saved model should say.
    """
    config: PretrainedConfig = plain_model(model).config
    before = copy.deepcopy(config)
    holders: list[object] = list(model.modules())
    # Some architectures read their config in the forward pass (Falcon's hidden_dropout).
    holders += {id(c): c for c in (config, config.get_text_config())}.values()
    for holder in holders:
        if isinstance(holder, _DropoutNd):
            holder.p = 0.0
        for name, value in list(vars(holder).items()):
            if isinstance(value, float) and RANDOM.search(name):
                setattr(holder, name, 0.0)
    return before
