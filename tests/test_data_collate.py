"""Sequences -> tensors, by hand, and packed against unpacked through a model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_cli.data.collate import IGNORED, Batch, collate
from rlhf_cli.data.token_rows import TokenRows
from rlhf_cli.data.tokenize import Tokens

X = IGNORED


class Rows:
    """Sequences 0: 5 6 7 8 with 7 and 8 learned; 1: 9 3 all learned; 2: 4 2 1 with the 1 learned."""

    DATA = (
        Tokens(np.array([5, 6, 7, 8]), np.array([False, False, True, True])),
        Tokens(np.array([9, 3]), np.array([True, True])),
        Tokens(np.array([4, 2, 1]), np.array([False, False, True])),
    )

    def row(self, index: int) -> Tokens:
        return self.DATA[index]


def as_lists(batch: Batch) -> dict[str, object]:
    return {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in batch._asdict().items()}


def test_unpacked() -> None:
    assert as_lists(collate(Rows(), [[0], [1]], pad_id=0)) == {
        "input_ids": [[5, 6, 7, 8], [9, 3, 0, 0]],
        "position_ids": [[0, 1, 2, 3], [0, 1, 2, 3]],
        "targets": [[X, 7, 8, X], [3, X, X, X]],  # position 1 predicts the 7 at position 2
        "num_targets": 3,
    }


def test_packed_in_rows() -> None:
    assert as_lists(collate(Rows(), [[1, 2], [0, 1], [1]], pad_id=0, packed=True)) == {
        "input_ids": [[9, 3, 4, 2, 1, 0], [5, 6, 7, 8, 9, 3], [9, 3, 0, 0, 0, 0]],
        "position_ids": [[0, 1, 0, 1, 2, 0], [0, 1, 2, 3, 0, 1], [0, 1, 0, 1, 2, 3]],
        # the 3 that ends a document does not predict the 4 that begins the next
        "targets": [[3, X, X, 1, X, X], [X, 7, 8, X, 3, X], [3, X, X, X, X, X]],
        "num_targets": 6,
    }


def test_flattened() -> None:
    assert as_lists(collate(Rows(), [[1], [2, 0]], pad_id=0, packed=True, flatten=True)) == {
        "input_ids": [[9, 3, 4, 2, 1, 5, 6, 7, 8]],
        "position_ids": [[0, 1, 0, 1, 2, 0, 1, 2, 3]],
        "targets": [[3, X, X, 1, X, X, 7, 8, X]],
        "num_targets": 4,
    }


@pytest.mark.parametrize("packed", [False, True])
def test_an_empty_micro_batch_counts_nothing(packed: bool) -> None:
    batch = collate(Rows(), [], pad_id=6, packed=packed, flatten=packed)
    assert batch.input_ids.tolist() == [[6]]
    assert batch.position_ids.tolist() == [[0]]
    assert batch.targets.tolist() == [[X]]
    assert batch.num_targets == 0
    assert {t.dtype for t in batch if isinstance(t, torch.Tensor)} == {torch.int64}


def test_targets_are_as_many_as_trained_tokens() -> None:
    """TokenRows.num_trained lets every rank know the global count without talking."""
    rows = TokenRows(
        np.array([5, 6, 7, 9, 3], np.int32),
        np.array([False, True, True, False, True]),
        np.array([0, 3, 5]),
        np.zeros(2, np.uint64),
        np.ones(2, np.int64),
    )
    batch = collate(rows, [[0], [1]], pad_id=0)
    assert batch.targets.tolist() == [[6, 7, X], [3, X, X]]
    assert batch.num_targets == rows.num_trained([0, 1]) == 3


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_documents_do_not_see_each_other(attention: str) -> None:
    """Canary: transformers parts documents by position_ids when there is no mask and no cache. Nor does padding behind
    a row count, without a mask."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    config._attn_implementation = attention
    model = LlamaForCausalLM(config).eval()

    def loss(batch: Batch, mask: torch.Tensor | None = None) -> torch.Tensor:
        logits = model(
            input_ids=batch.input_ids, position_ids=batch.position_ids, attention_mask=mask, use_cache=False
        ).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="sum")

    with torch.no_grad():
        alone = sum(loss(collate(Rows(), [[i]], 0)) for i in range(3))
        together = {
            "unpacked": collate(Rows(), [[0], [1], [2]], 0),
            "packed": collate(Rows(), [[0, 1], [2]], 0, packed=True),
            "flattened": collate(Rows(), [[0, 1], [2]], 0, packed=True, flatten=True),
        }
        for name, batch in together.items():
            torch.testing.assert_close(loss(batch), alone, atol=1e-5, rtol=0, msg=name)
        # the trap itself: with a mask, documents attend to each other
        leaking = loss(together["packed"], mask=torch.ones(2, 6, dtype=torch.int64))
        assert abs(leaking - alone) > 1e-4
