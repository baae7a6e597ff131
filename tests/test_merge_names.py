"""Names in files -> names in models. Also the canary for what models/merge_names.py leans on in transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, MixtralConfig, PreTrainedModel

from rlhf_cli.errors import ModelError
from rlhf_cli.models.merge_names import Resolver
from tests.merge_cases import save_base
from tests.tiny_models import ARCHS, tiny_config


def shell(arch: str, classifier: bool = False) -> PreTrainedModel:
    auto = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    with torch.device("meta"):
        made: PreTrainedModel = auto.from_config(tiny_config(arch))
    return made


def names_in(directory: Path) -> list[str]:
    with safe_open(directory / "model.safetensors", framework="pt") as file:
        return list(file.keys())


@pytest.mark.parametrize("arch", ARCHS)
def test_every_name_of_a_saved_model_is_found_and_kept(arch: str, tmp_path: Path) -> None:
    save_base(tmp_path / "base", arch)
    model = shell(arch)
    resolver = Resolver(model)
    found = resolver.map(names_in(tmp_path / "base"))
    assert found.stored.keys() == model.state_dict().keys()
    assert not found.unknown + found.converted
    assert [resolver.file_name(name, stored) for name, stored in found.stored.items()] == list(found.stored.values())
    as_classifier = Resolver(shell(arch, classifier=True)).map(names_in(tmp_path / "base"))
    assert len(as_classifier.unknown) == 1, "the causal LM's head"
    assert shell(arch, classifier=True).state_dict().keys() - as_classifier.stored.keys() == {"score.weight"}


def test_gpt_neox_head_has_two_names(tmp_path: Path) -> None:
    save_base(tmp_path / "base", "gpt_neox")
    resolver = Resolver(shell("gpt_neox"))
    assert resolver.map(names_in(tmp_path / "base")).stored["lm_head.weight"] == "embed_out.weight"
    assert resolver.model_name("lm_head.weight") == ("lm_head.weight", False)
    assert "lm_head.weight" in resolver
    assert "embed_out.weight" not in resolver


def test_the_prefix_of_the_backbone_comes_and_goes() -> None:
    resolver = Resolver(shell("gpt2"))
    assert resolver.model_name("h.0.attn.c_attn.weight") == ("transformer.h.0.attn.c_attn.weight", False)
    # Such names get the model's: beside them a head of its own would not be found.
    name = "transformer.h.0.attn.c_attn.weight"
    assert resolver.file_name(name, "h.0.attn.c_attn.weight") == name
    assert resolver.file_name(name, name) == name
    with torch.device("meta"):
        backbone = AutoModelForCausalLM.from_config(tiny_config("gpt2")).transformer
    assert Resolver(backbone).model_name(name) == ("h.0.attn.c_attn.weight", False)


def test_fused_experts_are_recognised() -> None:
    config = MixtralConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_local_experts=2,
                           num_attention_heads=4, num_key_value_heads=2, vocab_size=40)  # fmt: skip
    with torch.device("meta"):
        resolver = Resolver(AutoModelForCausalLM.from_config(config))
    experts = [f"model.layers.0.block_sparse_moe.experts.{i}.w{j}.weight" for i in (0, 1) for j in (1, 2, 3)]
    found = resolver.map([*experts, "model.layers.0.block_sparse_moe.gate.weight"])
    assert found.converted == experts
    assert found.made == {f"model.layers.0.mlp.experts.{part}" for part in ("gate_up_proj", "down_proj")}
    assert list(found.stored) == ["model.layers.0.mlp.gate.weight"]


def test_two_tensors_for_one_place_are_refused() -> None:
    with pytest.raises(
        ModelError, match=r"transformer\.wte\.weight twice, as wte\.weight and transformer\.wte\.weight"
    ):
        Resolver(shell("gpt2")).map(["wte.weight", "transformer.wte.weight"])
