"""Packed rows do not see each other, in every model that packing is allowed for; the others are refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, FalconConfig, OPTConfig, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from rlhf_cli.data.collate import collate
from rlhf_cli.errors import ModelError
from rlhf_cli.models.head import enable_loss
from rlhf_cli.models.packing import KNOWN, check_packing
from rlhf_cli.schema import SftConfig, build
from rlhf_cli.stages.sft import dry_run
from tests.tiny_models import tiny_tokenizer

# Whatever an architecture calls its sizes.
SMALL = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "intermediate_size": 64, "max_position_embeddings": 128, "n_embd": 32, "n_layer": 2, "n_head": 4,
    "n_positions": 128, "rotary_dim": 4, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "num_layers": 2, "num_heads": 4,
    "attention_types": [[["global", "local"], 1]], "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LENGTHS = (9, 12, 7)


def small_config(kind: str, **more: Any) -> PretrainedConfig:
    made = CONFIG_MAPPING[kind]
    known = vars(made()).keys() | made.attribute_map.keys()
    fits = {name: value for name, value in SMALL.items() if name in known}
    window = {"sliding_window": 6} if getattr(made(), "sliding_window", None) else {}
    return made(**fits, **window, **more)


def loss_of_last(config: PretrainedConfig, first_row: int, packed: bool) -> float:
    """The loss of row 2 alone, behind rows `first_row` and 1 when packed."""
    draw = np.random.default_rng(0)
    ids = [draw.integers(5, 60, n).astype(np.int32) for n in (*LENGTHS, LENGTHS[0])]
    rows = [
        (one, np.arange(len(one)) > 0 if number == 2 else np.zeros(len(one), bool)) for number, one in enumerate(ids)
    ]
    batch = collate(SimpleNamespace(row=rows.__getitem__), [[first_row, 1, 2] if packed else [2]], 0, packed=packed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        for parameter in model.parameters():
            parameter.data.normal_(0, 0.3)
    enable_loss(model)
    with torch.no_grad():
        out = model(input_ids=batch.input_ids, position_ids=batch.position_ids, targets=batch.targets)
    return float(out.loss_sum)


@pytest.mark.parametrize("kind", KNOWN)
def test_rows_of_known_models_do_not_see_each_other(kind: str) -> None:
    config = small_config(kind)
    check_packing(config, "data.packing")
    alone = loss_of_last(config, 0, packed=False)
    assert loss_of_last(config, 0, packed=True) == pytest.approx(alone, rel=1e-4)
    assert loss_of_last(config, 3, packed=True) == pytest.approx(alone, rel=1e-4)


REFUSED = [
    OPTConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=64, word_embed_proj_dim=32,
        max_position_embeddings=64,
    ),
    BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4),
    FalconConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4),
]  # fmt: skip


@pytest.mark.parametrize("config", REFUSED, ids=lambda config: config.model_type)
def test_models_whose_rows_see_each_other_are_refused(config: PretrainedConfig) -> None:
    with pytest.raises(ModelError, match=rf"^data\.packing: {config.model_type} models .*set data\.packing=false$"):
        check_packing(config, "data.packing")


def test_models_with_code_of_their_own_are_refused() -> None:
    config = small_config("llama", auto_map={"AutoModelForCausalLM": "modeling.Mine"})
    with pytest.raises(ModelError, match=r"^ppo\.ptx\.data\.packing: models with code of their own"):
        check_packing(config, "ppo.ptx.data.packing")


def test_a_dry_run_with_packing_is_refused_for_such_a_model(tmp_path: Path) -> None:
    REFUSED[0].save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(
        json.dumps(json.loads((tmp_path / "config.json").read_text()) | {"architectures": ["OPTForCausalLM"]})
    )
    tiny_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "x.jsonl").write_text('{"text": "a floor"}\n' * 4)
    data = {"path": str(tmp_path / "x.jsonl"), "packing": True, "max_length": 16, "cache_dir": str(tmp_path / "cache")}
    config = build(SftConfig, {"model": {"path": str(tmp_path)}, "data": data})
    with pytest.raises(ModelError, match=r"^data\.packing: opt"):
        dry_run(config, 1)
    config.data.packing = False
    dry_run(config, 1)
