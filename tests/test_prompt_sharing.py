"""Rows that hold a prompt once for all its answers: the same scores and gradients as answers one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import GPTNeoConfig, MistralConfig, OPTConfig, PretrainedConfig, Qwen2Config

from rlhf_cli.data.collate import ComparisonBatch, collate_comparisons, collate_sharing
from rlhf_cli.data.comparison_rows import ComparisonRows
from rlhf_cli.data.plan import plan_groups
from rlhf_cli.models.lora import add_lora
from rlhf_cli.models.prompt_sharing import KNOWN, sharing_mask, why_not_shared
from rlhf_cli.models.reward import enable_scores, new_reward_model
from rlhf_cli.schema import LoraConfig
from tests.tiny_models import ARCHS, noisy, tiny_config

PAD = 0


def rows_of(groups: list[list[list[int]]]) -> ComparisonRows:
    sequences = [ids for group in groups for ids in group]
    count = len(groups)
    return ComparisonRows(
        input_ids=np.array([t for ids in sequences for t in ids], np.int32),
        offsets=np.cumsum([0, *map(len, sequences)]), groups=np.cumsum([0, *map(len, groups)]),
        ranks=np.array([i for group in groups for i in range(len(group))], np.float64), margins=np.zeros(count),
        labels=np.full(count, -1), sequence_digests=np.zeros(len(sequences), np.uint64),
        row_numbers=np.arange(count), sources=np.zeros(count, np.int32), repeats=np.ones(count, np.int64),
        lines=np.arange(count) + 1, paths=("a.jsonl",),
    )  # fmt: skip


# a pair, a ranking of three of which one ends inside the others' start, a pair without a common start
GROUPS = [[[5, 6, 7, 8], [5, 6, 9]], [[4, 4, 4, 7], [4, 4, 4, 8, 9, 9, 3], [4, 4, 4]], [[3, 2], [7, 7, 7, 7, 7]]]


def test_the_row_by_hand() -> None:
    batch = collate_sharing(rows_of(GROUPS), [0, 1], PAD)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 0, 0, 0], [4, 4, 4, 7, 8, 9, 9, 3]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 2, 0, 0, 0], [0, 1, 2, 3, 3, 4, 5, 6]]
    assert batch.segments is not None
    assert batch.segments.tolist() == [[0, 0, 1, 1, 2, -1, -1, -1], [0, 0, 0, 1, 2, 2, 2, 2]]
    assert batch.rows is not None
    assert list(zip(batch.rows.tolist(), batch.last.tolist(), strict=True)) == [(0, 3), (0, 4), (1, 3), (1, 7), (1, 2)]
    apart = collate_comparisons(rows_of(GROUPS), [0, 1], PAD)
    for name in ("ranks", "prompt_ids", "margins", "labels"):
        assert torch.equal(getattr(batch, name), getattr(apart, name))


def test_the_mask_by_hand() -> None:
    config = tiny_config()
    config._attn_implementation = "sdpa"
    mask = sharing_mask(torch.tensor([[0, 1, 1, 2, -1]]), config, torch.float32)[0, 0]
    assert mask.int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 0, 0, 1, 0],  # the second answer sees the prompt and itself, not the first
        [1, 0, 0, 0, 1],
    ]
    config._attn_implementation = "eager"
    added = sharing_mask(torch.tensor([[0, 1, 1, 2, -1]]), config, torch.float32)[0, 0]
    assert torch.equal(added == 0, mask)


def scores_of(model: torch.nn.Module, batch: ComparisonBatch) -> torch.Tensor:
    given = {name: getattr(batch, name) for name in ("input_ids", "position_ids", "last", "rows", "segments")}
    scores: torch.Tensor = model(**{name: tensor for name, tensor in given.items() if tensor is not None})
    return scores


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("arch", ARCHS)
def test_scores_and_gradients_are_those_of_answers_one_by_one(arch: str, lora: bool, attention: str) -> None:
    base = noisy(new_reward_model(tiny_config(arch), None, torch.float32, 0, attention))
    assert why_not_shared(base.config) is None
    model = add_lora(base, LoraConfig(enabled=True, r=4), "SEQ_CLS") if lora else base
    enable_scores(model)
    model.eval()
    rows, found = rows_of(GROUPS), []
    for collate in (collate_comparisons, collate_sharing):
        model.zero_grad()
        scores = scores_of(model, collate(rows, [2, 0, 1], PAD))[:, 0]
        (scores * torch.tensor([1.0, -2.0, 3.0, -4.0, 5.0, -6.0, 7.0])).sum().backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        found.append((scores.detach(), gradients))
    torch.testing.assert_close(found[1][0], found[0][0], atol=1e-5, rtol=1e-5)
    assert len(found[0][1]) == len(found[1][1]) > 0
    for shared, apart in zip(found[1][1], found[0][1], strict=True):
        torch.testing.assert_close(shared, apart, atol=1e-4, rtol=1e-3)


SHAPE = {"vocab_size": 16, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": PAD}
OTHERS = [
    MistralConfig(**SHAPE, num_key_value_heads=2, intermediate_size=48, sliding_window=None),
    Qwen2Config(**SHAPE, num_key_value_heads=2, intermediate_size=48, use_sliding_window=False),
    OPTConfig(**SHAPE, ffn_dim=48, word_embed_proj_dim=32, dropout=0.0),
]


def test_every_type_that_is_said_to_share_is_tried() -> None:
    assert {tiny_config(arch).model_type for arch in ARCHS} | {config.model_type for config in OTHERS} == set(KNOWN)


@pytest.mark.parametrize("config", OTHERS, ids=lambda config: config.model_type)
def test_scores_of_further_types_are_those_of_answers_one_by_one(config: PretrainedConfig) -> None:
    model = noisy(new_reward_model(config, None, torch.float32, 0, "sdpa"))
    assert why_not_shared(model.config) is None
    enable_scores(model)
    rows = rows_of(GROUPS)
    with torch.no_grad():
        apart, shared = (
            scores_of(model, collate(rows, [2, 0, 1], PAD)) for collate in (collate_comparisons, collate_sharing)
        )
    torch.testing.assert_close(shared, apart, atol=1e-5, rtol=1e-5)
    assert float(apart.std()) > 0.01, "scores must differ for this to mean anything"


def test_an_empty_batch_takes_part_and_counts_nothing() -> None:
    model = new_reward_model(tiny_config(), None, torch.float32, 0)
    enable_scores(model)
    batch = collate_sharing(rows_of(GROUPS), [], PAD)
    scores = scores_of(model, batch)
    assert (scores.shape, len(batch.ranks)) == ((1, 1), 0)
    scores[:0].sum().backward()
    assert torch.isfinite(scores).all()


def test_windows_and_unknown_models_are_left_alone() -> None:
    neo = GPTNeoConfig(attention_types=[[["global", "local"], 1]], num_layers=2)
    neo._attn_implementation = "sdpa"
    assert "not known" in str(why_not_shared(neo))
    mistral = MistralConfig(sliding_window=64)
    mistral._attn_implementation = "sdpa"
    assert "window" in str(why_not_shared(mistral))
    mistral.sliding_window = None
    assert why_not_shared(mistral) is None
    mistral.auto_map = {"AutoModelForSequenceClassification": "modeling.Own"}
    assert "code of its own" in str(why_not_shared(mistral))
    del mistral.auto_map
    mistral._attn_implementation = "flash_attention_2"
    assert "takes no mask" in str(why_not_shared(mistral))


def test_lengths_count_the_common_start_once_and_decide_the_cut() -> None:
    rows = rows_of(GROUPS)
    # 4 + 3 - 2, 4 + 7 + 3 - 2 x 3, 2 + 5
    assert rows.shared_lengths.tolist() == [5, 8, 7]
    planned = plan_groups(np.arange(3), rows.counts, rows.longest, 1, 2, 2, rows.shared_lengths)
    # 7 sequences at 2 x 2 a micro-batch are two; one row each, so [8, 7] and [5] cost 16 and 5, [8] and [7, 5] 8 and 14
    assert planned == [[[1], [2, 0]]]
