"""Which parameters move: after one AdamW step, exactly those that should have."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch
from transformers import PreTrainedModel

from rlhf_cli.errors import ModelError
from rlhf_cli.models.head import enable_loss
from rlhf_cli.models.trainable import apply_trainable, count_parameters, find_blocks, lisa_apply, lisa_draw
from rlhf_cli.schema import TrainableConfig
from tests.tiny_models import ARCHS, tiny_model

BLOCK = {"llama": "model.layers.", "qwen3": "model.layers.", "gpt2": "transformer.h.", "gpt_neox": "gpt_neox.layers."}
NORM = {"llama": "model.norm.", "qwen3": "model.norm.", "gpt2": "transformer.ln_f.", "gpt_neox": "gpt_neox.final_"}


def moved(model: PreTrainedModel) -> set[str]:
    """Names of parameters that one step changes."""
    enable_loss(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    ids = torch.randint(3, model.config.vocab_size, (4, 17), generator=torch.Generator().manual_seed(0))
    model(input_ids=ids[:, :-1], targets=ids[:, 1:]).loss_sum.backward()
    optimizer.step()
    return {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}


def names(model: PreTrainedModel, *starts: str) -> set[str]:
    found = {n for n, _ in model.named_parameters() if n.startswith(starts)}
    assert found
    return found


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("arch", ARCHS)
def test_all(arch: str, tie: bool) -> None:
    model = tiny_model(arch, tie)
    model.requires_grad_(False)
    apply_trainable(model, TrainableConfig(mode="all"))
    assert moved(model) == {n for n, _ in model.named_parameters()}


@pytest.mark.parametrize("arch", ARCHS)
def test_last_layers(arch: str) -> None:
    for count in (0, 1, 3):
        model = tiny_model(arch, layers=3)
        apply_trainable(model, TrainableConfig(mode="last_layers", last_layers=count))
        blocks = [f"{BLOCK[arch]}{i}." for i in range(3 - count, 3)]
        assert moved(model) == names(model, NORM[arch], *blocks)


def test_patterns() -> None:
    model = tiny_model(layers=3)
    apply_trainable(model, TrainableConfig(mode="patterns", patterns=[r"layers\.[12]\..*mlp", "^lm_head"]))
    expected = {n for n in names(model, "model.layers.1.", "model.layers.2.") if ".mlp." in n}
    assert moved(model) == expected | {"lm_head.weight"}


@pytest.mark.parametrize("arch", ARCHS)
def test_lisa(arch: str) -> None:
    model = tiny_model(arch, layers=4)
    lisa_apply(model, [0, 2])
    assert moved(model) == {n for n, _ in model.named_parameters()} - names(
        model, f"{BLOCK[arch]}1.", f"{BLOCK[arch]}3."
    )
    lisa_apply(model, [3])
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == names(
        model, *(f"{BLOCK[arch]}{i}." for i in range(3))
    )
    apply_trainable(model, TrainableConfig(mode="lisa", lisa_layers=2), seed=7)
    on = [i for i, b in enumerate(find_blocks(model)) if next(b.parameters()).requires_grad]
    assert on == lisa_draw(4, 2, seed=7, draw_index=0)


def test_lisa_draws_are_repeatable_and_uniform() -> None:
    assert lisa_draw(8, 3, 1, 5) == lisa_draw(8, 3, 1, 5)
    draws = [tuple(lisa_draw(4, 2, 0, i)) for i in range(3000)]
    assert set(draws) == set(itertools.combinations(range(4), 2))
    # Each of the 6 pairs is expected 500 times, with a standard deviation of sqrt(3000 · 1/6 · 5/6) = 20.
    assert all(abs(n - 500) < 5 * 20.4 for n in Counter(draws).values())
    assert [lisa_draw(32, 2, 0, i) for i in range(20)] != [lisa_draw(32, 2, 1, i) for i in range(20)]


def test_impossible_requests() -> None:
    model = tiny_model()
    with pytest.raises(ModelError, match=r"last_layers: got 3; the model has 2"):
        apply_trainable(model, TrainableConfig(mode="last_layers", last_layers=3))
    with pytest.raises(ModelError, match=r"lisa_layers: got 3; the model has 2"):
        apply_trainable(model, TrainableConfig(mode="lisa", lisa_layers=3))
    with pytest.raises(ModelError, match=r"'layer9' matches no parameter; names are such as model\.embed_tokens"):
        apply_trainable(model, TrainableConfig(mode="patterns", patterns=["norm", "layer9"]))
    with pytest.raises(ModelError, match=r"'\(' is no regular expression"):
        apply_trainable(model, TrainableConfig(mode="patterns", patterns=["("]))


def test_counts_by_hand() -> None:
    model = tiny_model(tie=True)
    vocab = model.config.vocab_size
    # h 32, 4 heads of 8 with 2 kv heads, I 48: q and o 32·32, k and v 32·16, three of 32·48, two norms of 32
    block = 2 * 1024 + 2 * 512 + 3 * 1536 + 2 * 32
    assert count_parameters(model) == (vocab * 32 + 2 * block + 32,) * 2
    apply_trainable(model, TrainableConfig(mode="last_layers", last_layers=1))
    assert count_parameters(model).trainable == block + 32
