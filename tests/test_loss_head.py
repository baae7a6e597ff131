"""model(targets=...) against cross-entropy of the model's own logits, for many architectures."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CohereConfig,
    Gemma2Config,
    GPTJConfig,
    GraniteConfig,
    MixtralConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

from rlhf_cli.models.head import IGNORE, enable_loss
from rlhf_cli.models.load import enable_gradient_checkpointing
from rlhf_cli.models.lora import add_lora
from rlhf_cli.ops.logprobs import IDENTITY, LogitTransform
from rlhf_cli.schema import LoraConfig
from tests.loss_cases import LogitsWatch
from tests.tiny_models import ARCHS, noisy, tiny_model

V = 50
SHAPE = {
    "vocab_size": V,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OTHERS: dict[str, tuple[PretrainedConfig, LogitTransform]] = {
    "qwen2": (Qwen2Config(**SHAPE), IDENTITY),
    "gemma2": (Gemma2Config(**SHAPE, head_dim=8), LogitTransform(softcap=30.0)),
    "cohere": (CohereConfig(**SHAPE), LogitTransform(scale=0.0625)),
    "granite": (GraniteConfig(**SHAPE, logits_scaling=4.0), LogitTransform(scale=0.25)),
    "mixtral": (MixtralConfig(**SHAPE, num_local_experts=4), IDENTITY),
    "gptj with a bias": (
        GPTJConfig(
            vocab_size=V,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=64,
            rotary_dim=4,
            bos_token_id=1,
            eos_token_id=2,
            tie_word_embeddings=False,
        ),
        IDENTITY,
    ),
    "opt": (
        OPTConfig(
            vocab_size=V,
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            word_embed_proj_dim=16,
            max_position_embeddings=64,
        ),
        IDENTITY,
    ),
    "bloom": (BloomConfig(vocab_size=V, hidden_size=32, n_layer=2, n_head=4), IDENTITY),
}


def batch(model: nn.Module, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(input_ids, targets), both (2, 12); about half of the positions have a target, and one row has few."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, model.config.vocab_size, (2, 13), generator=generator)
    trained = torch.rand(2, 12, generator=generator) < 0.5
    return ids[:, :-1], torch.where(trained, ids[:, 1:], IGNORE)


def plain_loss(model: nn.Module, ids: Tensor, targets: Tensor) -> Tensor:
    logits = model(input_ids=ids, use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")


def grads(model: nn.Module) -> dict[str, Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same_as_logits(model: nn.Module, path: str, transform: LogitTransform = IDENTITY) -> None:
    ids, targets = batch(model)
    logits = model(input_ids=ids, use_cache=False).logits
    expected = plain_loss(model, ids, targets)
    expected.backward()
    expected_grads = grads(model)
    assert set(expected_grads) == {n for n, p in model.named_parameters() if p.requires_grad}
    plan = enable_loss(model)
    assert plan.path == path
    assert plan.transform == transform
    out = model(input_ids=ids, targets=targets)
    out.loss_sum.backward()
    assert out.num_targets == (targets != IGNORE).sum()
    torch.testing.assert_close(out.loss_sum, expected)
    torch.testing.assert_close(grads(model), expected_grads, atol=1e-5, rtol=1e-4)
    assert torch.equal(model(input_ids=ids, use_cache=False).logits, logits)
    nothing = model(input_ids=ids, targets=torch.full_like(targets, IGNORE))
    nothing.loss_sum.backward()
    assert nothing.loss_sum == 0
    assert set(grads(model)) == set(expected_grads)  # every trained parameter took part


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("arch", ARCHS)
def test_own_architectures(arch: str, tie: bool) -> None:
    assert_same_as_logits(tiny_model(arch, tie), "fused")


@pytest.mark.parametrize("name", OTHERS)
def test_other_architectures(name: str) -> None:
    config, transform = OTHERS[name]
    torch.manual_seed(0)
    model = noisy(AutoModelForCausalLM.from_config(config, dtype=torch.float32))
    if name.startswith("gptj"):
        assert model.lm_head.bias.abs().min() > 0
    assert_same_as_logits(model, "fused", transform)


def test_unknown_work_on_the_logits_takes_the_logits_path() -> None:
    model = tiny_model()
    original = type(model).forward

    class Odd(type(model)):  # type: ignore[misc]
        def forward(self, *args: object, **kwargs: object) -> object:
            out = original(self, *args, **kwargs)
            out.logits = out.logits.abs()
            return out

    model.__class__ = Odd
    assert_same_as_logits(model, "logits")


def lora(targets: list[str] | str = "all-linear") -> LoraConfig:
    return LoraConfig(enabled=True, r=4, alpha=8.0, target_modules=targets)


def adapted(model: PreTrainedModel, config: LoraConfig, train_embeddings: bool = False) -> nn.Module:
    wrapped = add_lora(model, config, train_embeddings=train_embeddings)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:  # zero at the start, and then A has no gradient
            nn.init.normal_(parameter, std=0.1)
    return wrapped.eval()


@pytest.mark.parametrize("arch", ARCHS)
def test_lora_on_the_blocks(arch: str) -> None:
    assert_same_as_logits(adapted(tiny_model(arch), lora()), "fused")


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("arch", ARCHS)
def test_lora_with_trained_embeddings(arch: str, tie: bool) -> None:
    model = adapted(tiny_model(arch, tie), lora(), train_embeddings=True)
    trained = [n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n]
    assert len(trained) == (1 if tie else 2)
    assert_same_as_logits(model, "fused")


def test_lora_on_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf_cli.models.head.chunk_rows", lambda *_: 3)  # several chunks
    assert_same_as_logits(adapted(tiny_model(), lora(["q_proj", "lm_head"])), "module")


@pytest.mark.parametrize("arch", ARCHS)
def test_gradient_checkpointing_changes_nothing(arch: str) -> None:
    for make in (tiny_model, lambda a: adapted(tiny_model(a), lora())):
        model = make(arch)
        enable_loss(model)
        ids, targets = batch(model)
        model.train()
        model(input_ids=ids, targets=targets).loss_sum.backward()
        expected = grads(model)
        recomputed: list[int] = []
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        enable_gradient_checkpointing(base)
        block = base.get_decoder().h[0] if arch == "gpt2" else base.get_decoder().layers[0]
        attention = next(m for n, m in block.named_modules() if n in ("attn", "attention", "self_attn"))
        attention.register_forward_pre_hook(lambda *_, log=recomputed: log.append(1))
        model(input_ids=ids, targets=targets).loss_sum.backward()
        assert len(recomputed) == 2  # forward, and again in the backward
        torch.testing.assert_close(grads(model), expected)


def test_token_weights_scale_each_loss() -> None:
    model = tiny_model()
    ids, targets = batch(model)
    losses = F.cross_entropy(model(input_ids=ids).logits.flatten(0, 1), targets.flatten(), reduction="none").view(2, 12)
    weights = torch.rand(2, 12)
    enable_loss(model)
    found = model(input_ids=ids, targets=targets, token_weights=weights).loss_sum
    torch.testing.assert_close(found, (losses * weights)[targets != IGNORE].sum())


def test_a_deep_copy_has_its_own_loss() -> None:
    model = tiny_model()
    enable_loss(model)
    ids, targets = batch(model)
    before = model(input_ids=ids, targets=targets).loss_sum.item()
    twin = copy.deepcopy(model)
    nn.init.zeros_(twin.lm_head.weight)
    # A zero head predicts all tokens alike
    count = int((targets != IGNORE).sum())
    expected = count * torch.tensor(float(model.config.vocab_size)).log().item()
    assert twin(input_ids=ids, targets=targets).loss_sum.item() == pytest.approx(expected, rel=1e-6)
    assert model(input_ids=ids, targets=targets).loss_sum.item() == before


def test_generation_is_untouched() -> None:
    model = tiny_model("gpt2")
    ids = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]])
    mask = (ids > 0).long()
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    enable_loss(model)
    assert torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False), expected)


@pytest.mark.parametrize("arch", ARCHS)
def test_packed_documents_do_not_see_each_other(arch: str) -> None:
    # Positions that start again, no attention mask, no cache: transformers keeps attention inside each document.
    model = tiny_model(arch)
    enable_loss(model)
    generator = torch.Generator().manual_seed(1)
    documents = [torch.randint(3, model.config.vocab_size, (n,), generator=generator) for n in (5, 9, 2)]
    separate = []
    for d in documents:
        targets = torch.cat([d[1:], torch.tensor([IGNORE])])
        separate.append(model(input_ids=d[None], targets=targets[None]).loss_sum)
    packed = model(
        input_ids=torch.cat(documents)[None],
        position_ids=torch.cat([torch.arange(len(d)) for d in documents])[None],
        attention_mask=None,
        targets=torch.cat([torch.cat([d[1:], torch.tensor([IGNORE])]) for d in documents])[None],
    )
    torch.testing.assert_close(packed.loss_sum, torch.stack(separate).sum(), atol=1e-5, rtol=1e-6)
    assert packed.num_targets == 4 + 8 + 1


def test_loss_makes_no_logits_for_all_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    enable_loss(model)
    ids, targets = batch(model)
    monkeypatch.setattr("rlhf_cli.ops.logprobs.chunk_rows", lambda *_: 3)
    with LogitsWatch(model.config.vocab_size, model.config.hidden_size) as watch:
        model(input_ids=ids, targets=targets).loss_sum.backward()
    assert watch.largest == 3
