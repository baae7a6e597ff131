"""Module trees over one set of weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rlhf_cli.models.head import enable_loss
from rlhf_cli.models.hydra import classifier_over, twin
from rlhf_cli.models.lora import add_lora
from rlhf_cli.models.reward import enable_scores, load_reward_model
from rlhf_cli.models.save import save_model
from rlhf_cli.schema import LoadedModelConfig, LoraConfig
from tests.reward_cases import random_rows, scores_of
from tests.tiny_models import ARCHS, tiny_model, tiny_tokenizer

LORA = LoraConfig(enabled=True, r=2)


@pytest.mark.parametrize("arch", [*ARCHS, "tied"])
@pytest.mark.parametrize("labels", [None, ["sad", "happy"]])
def test_classifier_over_is_the_one_that_loads(tmp_path: Path, arch: str, labels: list[str] | None) -> None:
    base = tiny_model("gpt2", tie=True) if arch == "tied" else tiny_model(arch)
    save_model(base.config, dict(base.state_dict()), tmp_path / "m", tiny_tokenizer())
    alone = load_reward_model(LoadedModelConfig(), tmp_path / "m", torch.float32, labels, seed=7).eval()
    shared = classifier_over(base, labels, seed=7)
    assert type(shared) is type(alone)
    own = {id(p) for p in base.parameters()}
    assert [n for n, p in shared.named_parameters() if id(p) not in own] == ["score.weight"]
    buffers = {b.data_ptr() for b in base.buffers() if b.numel()}
    assert not buffers & {b.data_ptr() for b in shared.buffers() if b.numel()}
    for model in (alone, shared):
        enable_scores(model)
    assert torch.equal(scores_of(alone, random_rows(1)), scores_of(shared, random_rows(1)))
    assert shared.config.num_labels == (1 if labels is None else 2)
    assert base.config.architectures != shared.config.architectures


def test_adapters_of_one_tree_are_none_of_the_others() -> None:
    base = tiny_model()
    ids = torch.arange(3, 12)[None]
    expected = base(input_ids=ids).logits.detach()
    bare = twin(base)
    critic = add_lora(classifier_over(bare, None, 0), LORA, "SEQ_CLS")
    policy = add_lora(base, LORA)
    enable_loss(policy)
    with torch.no_grad():
        for model in (policy, critic):
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.fill_(0.1)
    assert torch.equal(bare(input_ids=ids).logits, expected)
    assert not torch.equal(policy(input_ids=ids).logits, expected)
    trained = [{id(p) for p in model.parameters() if p.requires_grad} for model in (policy, critic)]
    assert all(trained)
    assert not trained[0] & trained[1]
    assert not any(p.requires_grad for p in bare.parameters())
    # A weight that changes changes in all trees.
    with torch.no_grad():
        bare.get_input_embeddings().weight.mul_(2)
    moved = bare(input_ids=ids).logits
    assert not torch.equal(moved, expected)
    with policy.disable_adapter():
        assert torch.equal(policy(input_ids=ids).logits, moved)
