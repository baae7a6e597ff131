"""model(targets=..., logprobs=True) against log_softmax of the model's own logits: values, entropies, gradients."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM

from rlhf_cli.models.head import IGNORE, enable_loss
from rlhf_cli.models.load import enable_gradient_checkpointing
from rlhf_cli.ops.logprobs import LogitTransform, linear_logprobs
from tests.logprob_cases import coefficients, naive_logprobs
from tests.loss_cases import LogitsWatch
from tests.test_logprobs import TRANSFORMS, gradients, leaves, plain_logits
from tests.test_loss_head import OTHERS, adapted, batch, grads, lora
from tests.tiny_models import ARCHS, noisy, tiny_model


def assert_same_as_logits(model: nn.Module, path: str, temperature: float = 0.7) -> None:
    ids, targets = batch(model)
    expected, entropies = naive_logprobs(model, ids, targets, temperature)
    upstream = coefficients(len(expected))
    (expected * upstream).sum().backward()
    expected_grads = grads(model)
    assert set(expected_grads) == {n for n, p in model.named_parameters() if p.requires_grad}
    assert enable_loss(model).path == path
    positions = torch.arange(ids.shape[1]).expand(ids.shape)
    call = partial(model, input_ids=ids, position_ids=positions, temperature=temperature, logprobs=True)
    out = call(targets=targets)
    assert out.logprobs.dtype == out.entropy.dtype == torch.float32
    assert not out.entropy.requires_grad
    torch.testing.assert_close(out.logprobs, expected, atol=2e-6, rtol=1e-6)
    torch.testing.assert_close(out.entropy, entropies, atol=2e-6, rtol=1e-6)
    (out.logprobs * upstream).sum().backward()
    torch.testing.assert_close(grads(model), expected_grads, atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        again = call(targets=targets)
    assert torch.equal(again.logprobs, out.logprobs)
    assert torch.equal(again.entropy, out.entropy)
    nothing = call(targets=torch.full_like(targets, IGNORE))
    assert nothing.logprobs.shape == nothing.entropy.shape == (0,)
    nothing.logprobs.sum().backward()
    assert set(grads(model)) == set(expected_grads)  # every trained parameter took part


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("arch", ARCHS)
def test_own_architectures(arch: str, tie: bool) -> None:
    assert_same_as_logits(tiny_model(arch, tie), "fused")


@pytest.mark.parametrize("name", ["gemma2", "cohere", "granite", "gptj with a bias"])
def test_softcap_scale_and_bias(name: str) -> None:
    torch.manual_seed(0)
    assert_same_as_logits(noisy(AutoModelForCausalLM.from_config(OTHERS[name][0], dtype=torch.float32)), "fused")


@pytest.mark.parametrize("name", ["gemma2", "granite"])
def test_an_adapted_head_with_softcap_and_scale(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf_cli.models.head.chunk_rows", lambda *_: 3)  # several chunks
    torch.manual_seed(0)
    model = noisy(AutoModelForCausalLM.from_config(OTHERS[name][0], dtype=torch.float32))
    model.config.tie_word_embeddings = False
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    assert_same_as_logits(adapted(model, lora(["q_proj", "lm_head"])), "module")


def test_lora_on_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf_cli.models.head.chunk_rows", lambda *_: 3)
    assert_same_as_logits(adapted(tiny_model(), lora(["q_proj", "lm_head"])), "module")


@pytest.mark.parametrize("train_embeddings", [False, True])
def test_lora_on_the_blocks(train_embeddings: bool) -> None:
    """The head is frozen, or trained as a copy."""
    assert_same_as_logits(adapted(tiny_model(), lora(), train_embeddings), "fused")


@pytest.mark.parametrize("trained", ["lm_head", "model.layers.1"])
def test_partly_frozen(trained: str) -> None:
    """Only the head has a gradient, or only what is below it."""
    model = tiny_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(trained))
    assert_same_as_logits(model, "fused")


def test_unknown_work_on_the_logits_takes_the_logits_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf_cli.models.head.chunk_rows", lambda *_: 3)
    model = tiny_model()
    original = type(model).forward

    class Odd(type(model)):  # type: ignore[misc]
        def forward(self, *args: object, **kwargs: object) -> object:
            out = original(self, *args, **kwargs)
            out.logits = out.logits.abs()
            return out

    model.__class__ = Odd
    assert_same_as_logits(model, "logits")


def test_gradient_checkpointing_changes_nothing() -> None:
    model = tiny_model()
    enable_loss(model)
    ids, targets = batch(model)
    model.train()
    model(input_ids=ids, targets=targets, logprobs=True).logprobs.sum().backward()
    expected = grads(model)
    enable_gradient_checkpointing(model)
    model(input_ids=ids, targets=targets, logprobs=True).logprobs.sum().backward()
    torch.testing.assert_close(grads(model), expected)


def test_rows_come_in_order_and_padding_behind_them_does_not_matter() -> None:
    model = tiny_model()
    enable_loss(model)
    generator = torch.Generator().manual_seed(3)
    lengths, prompts = [9, 4, 6], [3, 2, 5]  # of prompt and response together, of the prompt
    rows = [torch.randint(3, model.config.vocab_size, (n,), generator=generator) for n in lengths]
    found = []
    for padding in (0, 7):
        ids, targets = torch.full((3, 12), padding), torch.full((3, 12), IGNORE)
        for i, (row, start) in enumerate(zip(rows, prompts, strict=True)):
            ids[i, : len(row)] = row
            targets[i, start - 1 : len(row) - 1] = row[start:]  # position t predicts token t + 1
        with torch.no_grad():
            found.append(model(input_ids=ids, targets=targets, logprobs=True).logprobs)
    assert torch.equal(found[0], found[1])
    alone = []
    for row, start in zip(rows, prompts, strict=True):
        log_p = torch.log_softmax(model(input_ids=row[None]).logits[0], -1)
        alone += [log_p[t - 1, row[t]] for t in range(start, len(row))]
    torch.testing.assert_close(found[0], torch.stack(alone), atol=1e-6, rtol=0)


def test_other_rows_of_the_chunk_do_not_matter() -> None:
    hidden, weight, _ = leaves(600, 64, 1000, False, 0, torch.float32)
    assert hidden is not None
    assert weight is not None
    targets = torch.arange(600)
    with torch.no_grad():
        weight = weight / 8  # logits of size 1, as of a model
        together, entropies = linear_logprobs(hidden, weight, None, targets)
        for rows in (slice(0, 1), slice(3, 5), slice(500, 600)):
            alone, alone_entropies = linear_logprobs(hidden[rows], weight, None, targets[rows])
            assert (alone - together[rows]).abs().max() <= 1e-6
            assert (alone_entropies - entropies[rows]).abs().max() <= 2e-6  # a sum of 1000 terms, 6.4 nats


@settings(max_examples=50, deadline=None)
@given(
    rows=st.integers(0, 7),
    vocab=st.integers(1, 9),
    chunk=st.integers(1, 8),
    with_bias=st.booleans(),
    transform=st.sampled_from(TRANSFORMS),
    temperature=st.sampled_from([0.5, 1.0, 1.3]),
    seed=st.integers(0, 10**6),
)
def test_linear_logprobs_equals_log_softmax(
    rows: int, vocab: int, chunk: int, with_bias: bool, transform: LogitTransform, temperature: float, seed: int
) -> None:
    inputs = leaves(rows, 4, vocab, with_bias, seed, torch.float64)
    hidden, weight, bias = inputs
    assert hidden is not None
    assert weight is not None
    transform = transform._replace(temperature=temperature)
    targets = torch.randint(0, vocab, (rows,), generator=torch.Generator().manual_seed(seed))
    log_p = torch.log_softmax(plain_logits(hidden, weight, bias, transform), -1)
    expected = log_p.gather(-1, targets[:, None]).squeeze(-1)
    found, entropy = linear_logprobs(hidden, weight, bias, targets, chunk, transform)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(entropy, -(log_p.exp() * log_p).sum(-1).detach())
    upstream = coefficients(rows).double()
    torch.testing.assert_close(
        gradients((found * upstream).sum(), inputs), gradients((expected * upstream).sum(), inputs)
    )


def test_a_forbidden_token_has_no_part_in_the_entropy() -> None:
    # A bias of −inf: the other two are equally likely, ln 2
    bias = torch.tensor([0.0, -torch.inf, 0.0])
    logprobs, entropy = linear_logprobs(torch.zeros(1, 2), torch.zeros(3, 2), bias, torch.tensor([2]))
    ln_2 = pytest.approx(0.693147, abs=1e-6)
    assert -logprobs.item() == ln_2
    assert entropy.item() == ln_2


def test_makes_no_logits_for_all_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    enable_loss(model)
    ids, targets = batch(model)
    monkeypatch.setattr("rlhf_cli.ops.logprobs.chunk_rows", lambda *_: 3)
    with LogitsWatch(model.config.vocab_size, model.config.hidden_size) as watch:
        model(input_ids=ids, targets=targets, logprobs=True).logprobs.sum().backward()
    assert watch.largest == 3


def test_a_deep_copy_answers_from_its_own_weights() -> None:
    model = tiny_model()
    enable_loss(model)
    ids, targets = batch(model)
    twin = copy.deepcopy(model)
    nn.init.zeros_(twin.lm_head.weight)
    # A zero head holds all tokens for equally likely
    uniform = torch.tensor(float(model.config.vocab_size)).log()
    out = twin(input_ids=ids, targets=targets, logprobs=True, temperature=3.0)
    torch.testing.assert_close(out.logprobs, (-uniform).expand_as(out.logprobs))
    torch.testing.assert_close(out.entropy, uniform.expand_as(out.entropy))
    assert model(input_ids=ids, targets=targets, logprobs=True).entropy.max() < uniform - 1e-3


CASE = "tests.logprob_cases:under_deepspeed"


@pytest.mark.distributed
@pytest.mark.parametrize(
    "kind",
    ["llama", "gpt2 tied", "llama checkpointing", "llama lora", "llama tied lora embeddings", "llama lora head"],
)
def test_zero3(run_on_ranks: Any, kind: str) -> None:
    for error, grad_error, compared in run_on_ranks(2, CASE, stage=3, kind=kind):
        assert error < 5e-6
        assert grad_error < 1e-6
        assert compared > 5


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["llama tied", "llama lora head"])
def test_zero2(run_on_ranks: Any, kind: str) -> None:
    for error, grad_error, _ in run_on_ranks(2, CASE, stage=2, kind=kind):
        assert error < 5e-6
        assert grad_error < 1e-6
