"""Training mode without dropout, for architectures that keep theirs in different places."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf_cli.models.dropout import turn_off_dropout
from rlhf_cli.models.load import enable_gradient_checkpointing
from rlhf_cli.models.lora import add_lora
from rlhf_cli.schema import LoraConfig
from tests.tiny_models import tiny_model

SHAPE = {"vocab_size": 33, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
MLP = {"intermediate_size": 24, "num_key_value_heads": 2}
POSITIONS = {"max_position_embeddings": 32}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {**SHAPE, **MLP, **POSITIONS, "attention_dropout": 0.5},
    "mistral": {**SHAPE, **MLP, **POSITIONS, "attention_dropout": 0.5},
    "gpt2": {
        "vocab_size": 33, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32,
        "resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5,
    },
    "gpt_neox": {**SHAPE, **POSITIONS, "intermediate_size": 24, "hidden_dropout": 0.5, "attention_dropout": 0.5},
    "opt": {
        **SHAPE, **POSITIONS, "ffn_dim": 24, "word_embed_proj_dim": 16, "dropout": 0.5, "attention_dropout": 0.5,
        "layerdrop": 0.5,
    },
    "bloom": {
        "vocab_size": 33, "hidden_size": 16, "n_layer": 2, "n_head": 2, "hidden_dropout": 0.5,
        "attention_dropout": 0.5,
    },
    "falcon": {**SHAPE, "hidden_dropout": 0.5, "attention_dropout": 0.5},
    "phi": {
        **SHAPE, **POSITIONS, "intermediate_size": 24, "resid_pdrop": 0.5, "embd_pdrop": 0.5,
        "attention_dropout": 0.5,
    },
    "mixtral": {
        **SHAPE, **MLP, **POSITIONS, "num_local_experts": 2, "attention_dropout": 0.5, "router_jitter_noise": 0.5,
    },
}  # fmt: skip


# Attention kernels take their dropout from elsewhere than the eager code does; bloom has no other.
@pytest.mark.parametrize(
    ("kind", "attention"), [(kind, a) for kind in KINDS for a in ("eager", "sdpa") if (kind, a) != ("bloom", "sdpa")]
)
def test_two_training_passes_are_equal(kind: str, attention: str) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **KINDS[kind], pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).train()
    ids = torch.arange(3, 15)[None]
    passes = lambda: [model(input_ids=ids, use_cache=False).logits for _ in range(3)]
    assert not all(torch.equal(logits, passes()[0]) for logits in passes()), "nothing is random to begin with"
    before = turn_off_dropout(model)
    expected = model.eval()(input_ids=ids, use_cache=False).logits
    model.train()
    assert all(torch.equal(logits, expected) for logits in passes())
    changed = [name for name in KINDS[kind] if "drop" in name or "jitter" in name]
    assert all(getattr(before, name) == 0.5 for name in changed)


def test_adapters_and_checkpointed_blocks() -> None:
    base = tiny_model("gpt2")
    enable_gradient_checkpointing(base)
    model = add_lora(base, LoraConfig(enabled=True, r=2, dropout=0.5)).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    turn_off_dropout(model)
    ids = torch.arange(3, 15)[None]
    grads = []
    for _ in range(2):
        model.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.requires_grad and p.grad is not None])
    assert grads[0]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
