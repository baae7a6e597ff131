"""What we lean on in PEFT beyond its documentation. When one of these fails, read rlhf_cli/models/lora.py first."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn

from rlhf_cli.models.reward import new_reward_model
from tests.tiny_models import ARCHS, tiny_config, tiny_model

IDS = torch.tensor([[5, 6, 7]])


def wrapped_head() -> tuple[nn.Module, ModulesToSaveWrapper]:
    model = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    return model, model.get_base_model().get_output_embeddings()


def test_a_trained_copy_is_a_wrapper_with_the_original_and_copies_by_adapter() -> None:
    _, head = wrapped_head()
    assert isinstance(head, AuxiliaryTrainingWrapper)
    assert type(head.original_module) is nn.Linear
    assert list(head.modules_to_save) == ["default"]
    assert type(head.modules_to_save["default"]) is nn.Linear
    assert head.modules_to_save["default"].weight is not head.original_module.weight


def test_the_wrapper_hands_keyword_arguments_to_the_copy_in_use() -> None:
    # The fused loss reaches the head as head(hidden, targets=...).
    model, head = wrapped_head()
    seen: list[tuple[str, object]] = []
    head.modules_to_save["default"].forward = lambda h, targets: seen.append(("copy", targets)) or h
    head.original_module.forward = lambda h, targets: seen.append(("original", targets)) or h
    head(torch.zeros(1), targets=1)
    with model.disable_adapter():
        head(torch.zeros(1), targets=2)
    assert seen == [("copy", 1), ("original", 2)]


def test_calling_the_inner_backbone_uses_the_adapters() -> None:
    # The loss calls get_base_model().get_decoder(), not the PEFT model.
    model = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    plain = tiny_model()
    inner = model.get_base_model().get_decoder()(IDS).last_hidden_state
    assert not torch.allclose(inner, plain.get_decoder()(IDS).last_hidden_state)
    torch.testing.assert_close(model(IDS).logits, plain.lm_head(inner))


def test_adapter_weights_keep_the_models_dtype_only_when_told() -> None:
    config = LoraConfig(target_modules=["q_proj"])
    for cast, expected in ((False, torch.bfloat16), (True, torch.float32)):
        model = get_peft_model(tiny_model().bfloat16(), config, autocast_adapter_dtype=cast)
        assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {expected}


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_ensure_weight_tying_still_misses_gpt2() -> None:
    # Then _tie_trained_copies could go.
    config = LoraConfig(target_modules=["c_attn"], modules_to_save=["wte"], ensure_weight_tying=True)
    base = get_peft_model(tiny_model("gpt2", tie=True), config).get_base_model()
    assert not isinstance(base.get_output_embeddings(), AuxiliaryTrainingWrapper)


@pytest.mark.parametrize("arch", ARCHS)
def test_sequence_classification_makes_peft_train_and_keep_the_head(arch: str) -> None:
    # add_lora names no module: PEFT takes `score` (and `classifier`, which decoders do not have) by itself.
    model = new_reward_model(tiny_config(arch), ["no", "yes"], torch.float32, 0)
    start = model.score.weight.detach().clone()
    config = LoraConfig(task_type="SEQ_CLS", target_modules="all-linear")
    wrapped = get_peft_model(model, config)
    assert sorted(wrapped.peft_config["default"].modules_to_save) == ["classifier", "score"]
    head = wrapped.get_base_model().score
    assert isinstance(head, ModulesToSaveWrapper)
    copied = head.modules_to_save["default"].weight
    assert torch.equal(copied, start)
    assert copied.data_ptr() != head.original_module.weight.data_ptr()
    assert (copied.requires_grad, head.original_module.weight.requires_grad) == (True, False)
    with torch.no_grad():
        copied.add_(1)
    stored = get_peft_model_state_dict(wrapped)
    assert torch.equal(stored["base_model.model.score.weight"], start + 1)
    assert not [n for n in stored if "score" in n and n != "base_model.model.score.weight"]


def test_a_classifier_has_no_output_embeddings() -> None:
    # add_lora(train_embeddings=True), growing and the memory estimate go by it.
    for arch in ARCHS:
        assert new_reward_model(tiny_config(arch, tie=True), None, torch.float32, 0).get_output_embeddings() is None
