"""Adapters: what is adapted, what moves, and that a saved adapter on its base is the trained model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn

from rlhf_cli.errors import ModelError
from rlhf_cli.models.head import enable_loss
from rlhf_cli.models.load import grow_embeddings, load_policy
from rlhf_cli.models.lora import add_lora, lora_targets, save_adapter
from rlhf_cli.models.save import save_model
from rlhf_cli.models.trainable import count_parameters
from rlhf_cli.schema import LoraConfig, ModelConfig
from tests.tiny_models import ARCHS, tiny_model, tiny_tokenizer

IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])


def lora(targets: str | list[str] = "all-linear", dropout: float = 0.0) -> LoraConfig:
    return LoraConfig(enabled=True, r=4, alpha=8.0, dropout=dropout, target_modules=targets)


def trained(model: nn.Module) -> set[str]:
    """Take an AdamW step on everything trainable; the names that moved."""
    enable_loss(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(2):  # A has no gradient while B is zero
        optimizer.zero_grad()
        model(input_ids=IDS[:, :-1], targets=IDS[:, 1:]).loss_sum.backward()
        optimizer.step()
    return {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """As the engine gathers them: all trained names, tied ones with the same tensor."""
    return {n: p.detach().clone() for n, p in model.state_dict(keep_vars=True).items() if p.requires_grad}


@pytest.mark.parametrize("arch", ARCHS)
def test_adapter_starts_as_the_identity_and_only_it_moves(arch: str) -> None:
    model = tiny_model(arch)
    logits = model(IDS).logits
    wrapped = add_lora(model, lora())
    assert torch.equal(wrapped(IDS).logits, logits)
    names = {n for n, _ in wrapped.named_parameters() if "lora_" in n}
    linear_per_block = {"llama": 7, "qwen3": 7, "gpt2": 4, "gpt_neox": 4}[arch]
    assert len(names) == 2 * 2 * linear_per_block
    assert trained(wrapped) == names


def test_targets_by_name_end_and_pattern() -> None:
    model = tiny_model()
    both = [f"model.layers.{i}.self_attn.{n}_proj" for i in (0, 1) for n in ("q", "v")]
    assert sorted(lora_targets(model, lora(["q_proj", "v_proj"]))) == sorted(both)
    assert lora_targets(model, lora("layers.1.mlp.up_proj")) == ["model.layers.1.mlp.up_proj"]
    assert sorted(lora_targets(model, lora(r".*self_attn\.[qv]_proj"))) == sorted(both)
    assert len(lora_targets(model, lora())) == 14  # no lm_head
    assert lora_targets(model, lora("lm_head")) == ["lm_head"]
    with pytest.raises(ModelError, match=r"'query' is no linear layer of LlamaForCausalLM; allowed: all-linear, down_"):
        lora_targets(model, lora(["q_proj", "query"]))
    with pytest.raises(ModelError, match=r"'\('"):
        lora_targets(model, lora("("))


def test_only_the_named_block_is_adapted() -> None:
    wrapped = add_lora(tiny_model(), lora("layers.1.mlp.up_proj"))
    assert {n.split(".lora_")[0] for n, p in wrapped.named_parameters() if p.requires_grad} == {
        "base_model.model.model.layers.1.mlp.up_proj"
    }
    # rank 4 of a 32 -> 48 layer
    assert count_parameters(wrapped).trainable == 4 * (32 + 48)


def test_same_seed_same_adapter() -> None:
    torch.manual_seed(3)
    first = add_lora(tiny_model(), lora(), seed=1)
    torch.manual_seed(4)
    assert torch.equal(
        *(
            m.get_parameter("base_model.model.model.layers.0.mlp.up_proj.lora_A.default.weight")
            for m in (first, add_lora(tiny_model(), lora(), seed=1))
        )
    )


def test_adapter_has_the_models_dtype_and_dropout() -> None:
    wrapped = add_lora(tiny_model().to(torch.bfloat16), lora(dropout=0.3))
    assert {p.dtype for p in wrapped.parameters()} == {torch.bfloat16}
    assert {m.p for m in wrapped.modules() if isinstance(m, nn.Dropout)} == {0.3}


@pytest.mark.parametrize("arch", ARCHS)
def test_saved_adapter_on_its_base_is_the_trained_model(arch: str, tmp_path: Path) -> None:
    model, tokenizer = tiny_model(arch), tiny_tokenizer()
    save_model(model.config, dict(model.state_dict()), tmp_path / "base", tokenizer)
    wrapped = add_lora(load_policy(ModelConfig(), tmp_path / "base", torch.float32), lora())
    trained(wrapped)
    save_adapter(wrapped, trained_weights(wrapped), tmp_path / "model", tokenizer, str(tmp_path / "base"), "{{ x }}")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "model"]
    assert all(t.abs().sum() > 0 for t in load_file(tmp_path / "model" / "adapter_model.safetensors").values())
    config = json.loads((tmp_path / "model" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    assert config["inference_mode"]
    loaded = PeftModel.from_pretrained(
        load_policy(ModelConfig(), tmp_path / "base", torch.float32), str(tmp_path / "model")
    )
    assert torch.equal(loaded(IDS).logits, wrapped.eval()(IDS).logits)
    assert not torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert torch.equal(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "model")(IDS).logits, wrapped(IDS).logits)


@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT about tied embeddings, when it loads and merges
@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("arch", ARCHS)
def test_new_tokens_are_trained_and_saved_with_the_adapter(arch: str, tie: bool, tmp_path: Path) -> None:
    model, tokenizer = tiny_model(arch, tie), tiny_tokenizer()
    save_model(model.config, dict(model.state_dict()), tmp_path / "base", tokenizer)
    tokenizer.add_tokens(["    ", "\n\n"])
    base = lambda: load_policy(ModelConfig(), tmp_path / "base", torch.float32, num_tokens=len(tokenizer))
    wrapped = add_lora(base(), lora(), train_embeddings=True)
    moved = trained(wrapped)
    assert len([n for n in moved if "modules_to_save" in n]) == (1 if tie else 2)
    assert not [n for n in moved if "original_module" in n]
    save_adapter(wrapped, trained_weights(wrapped), tmp_path / "model", tokenizer, str(tmp_path / "base"))
    loaded = PeftModel.from_pretrained(base(), str(tmp_path / "model"))
    ids = torch.cat([IDS, torch.tensor([[len(tokenizer) - 2, len(tokenizer) - 1]])], dim=1)
    assert torch.equal(loaded(ids).logits, wrapped.eval()(ids).logits)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, wrapped(ids).logits)


def test_a_new_pad_token_alone_needs_no_trained_embeddings(tmp_path: Path) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    save_model(model.config, dict(model.state_dict()), tmp_path / "base", tokenizer)
    grown = load_policy(ModelConfig(), tmp_path / "base", torch.float32, num_tokens=len(tokenizer) + 1)
    wrapped = add_lora(grown, lora())
    trained(wrapped)
    save_adapter(wrapped, trained_weights(wrapped), tmp_path / "model", tokenizer, str(tmp_path / "base"))
    assert all("lora_" in n for n in load_file(tmp_path / "model" / "adapter_model.safetensors"))
    again = load_policy(ModelConfig(), tmp_path / "base", torch.float32)
    grow_embeddings(again, len(tokenizer) + 1)
    loaded = PeftModel.from_pretrained(again, str(tmp_path / "model"))
    assert torch.equal(loaded(IDS).logits, wrapped.eval()(IDS).logits)


def test_an_incomplete_gather_is_not_saved(tmp_path: Path) -> None:
    wrapped = add_lora(tiny_model(), lora())
    weights = trained_weights(wrapped)
    weights.popitem()
    with pytest.raises(AssertionError, match="not gathered"):
        save_adapter(wrapped, weights, tmp_path / "model", tiny_tokenizer(), "base")
    assert not (tmp_path / "model").exists()
