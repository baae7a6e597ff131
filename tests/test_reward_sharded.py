"""Reward models on two ranks, ZeRO-2 and ZeRO-3: the same scores, the same training, complete files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from rlhf_cli.models.reward import enable_scores, load_reward_model
from rlhf_cli.models.save import save_model
from rlhf_cli.schema import ModelConfig
from tests.reward_cases import random_rows, scores_of, tiny_reward
from tests.tiny_models import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.distributed
CASE = "tests.reward_cases:train_pairs"
FP32 = torch.float32


def save_base(arch: str, directory: Path, tie: bool = False) -> str:
    """A causal LM, or a reward model where arch says so."""
    name = arch.removesuffix(" reward")
    model = tiny_model(name, tie) if name == arch else tiny_reward(name, tie=tie)
    save_model(model.config, dict(model.state_dict()), directory, tiny_tokenizer())
    return str(directory)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "llama reward"])
@pytest.mark.parametrize("kind", ["full", "lora", "lora embeddings", "lora checkpointing"])
def test_zero3_trains_and_saves_as_zero2(run_on_ranks: Any, tmp_path: Path, arch: str, kind: str) -> None:
    if arch != "llama" and kind == "lora checkpointing":
        kind = "full checkpointing"
    base = save_base(arch, tmp_path / "base", tie=arch == "gpt2")
    two, three = (
        run_on_ranks(2, CASE, base=base, stage=stage, kind=kind, directory=str(tmp_path / f"zero{stage}"))
        for stage in (2, 3)
    )
    whole = load_reward_model(ModelConfig(), base, FP32, None, 7)
    enable_scores(whole)
    for rank in range(2):
        expected = scores_of(whole, random_rows(rank) + random_rows(50 + rank))[:, 0]
        for found in (two, three):
            torch.testing.assert_close(torch.tensor(found[rank][0]), expected, atol=1e-5, rtol=1e-5)
    assert two[0][1].keys() == three[0][1].keys()
    for name, values in two[0][1].items():
        torch.testing.assert_close(torch.tensor(three[0][1][name]), torch.tensor(values), atol=2e-4, rtol=1e-3)
    assert two[1][1] == three[1][1] == {}  # whole weights on rank 0 only
    changed = three[0][2]
    assert all(change > 1e-3 for change in changed.values()), changed
    (head,) = (n for n in changed if "score" in n)
    assert head.endswith("score.modules_to_save.default.weight" if "lora" in kind else "score.weight")

    # What was saved, read by others alone, gives the scores that the trained model gave.
    saved = tmp_path / "zero3"
    if "lora" in kind:
        stored = load_file(saved / "adapter_model.safetensors")
        assert len(stored) == len(three[0][1])
        assert stored["base_model.model.score.weight"].shape == (1, 32)
        own: Any = PeftModel.from_pretrained(_plain(base), str(saved))
    else:
        own = AutoModelForSequenceClassification.from_pretrained(saved)
        assert own.config.reward == {"mean": 0.5, "std": 2.0}
    for row, score in zip(random_rows(99), three[0][3], strict=True):
        found_score = own(input_ids=torch.tensor([row])).logits[0]
        torch.testing.assert_close(found_score, torch.tensor(score), atol=1e-5, rtol=1e-5)


def _plain(base: str) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
