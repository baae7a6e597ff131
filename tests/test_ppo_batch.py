"""Micro-batches of responses, and that neither padding nor what is not kept plays a part."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given as for_all
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf_cli.align.batch import collate_responses, share_of_rank
from rlhf_cli.align.forward import token_values
from rlhf_cli.data.collate import IGNORED
from tests.ppo_cases import PAD, make_critic, make_policy, ragged, whole_mask
from tests.tiny_models import ARCHS

TOKENS = st.lists(st.integers(0, 50), min_size=1, max_size=6)
ROWS = st.lists(st.tuples(TOKENS, TOKENS), min_size=1, max_size=8)


def test_by_hand() -> None:
    prompts = [np.array([5, 6, 7]), np.array([8])]
    responses = [np.array([1, 2]), np.array([3, 4, 9])]
    batch = collate_responses(prompts, responses, [1, 0], pad_id=0)
    # Row 1 first. 8 predicts 3, 3 predicts 4, 4 predicts 9, which nobody has to read; 7 predicts 1, 1 predicts 2.
    assert batch.input_ids.tolist() == [[8, 3, 4, 0], [5, 6, 7, 1]]
    assert batch.targets.tolist() == [[3, 4, 9, IGNORED], [IGNORED, IGNORED, 1, 2]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3]] * 2
    assert batch.response_rows.tolist() == [1, 1, 1, 0, 0]
    assert batch.response_columns.tolist() == [0, 1, 2, 0, 1]
    of_tokens = torch.tensor([[10.0, 11.0, 12.0], [20.0, 21.0, 22.0]])
    assert batch.at(of_tokens).tolist() == [20, 21, 22, 10, 11]


def test_tokens_that_are_not_kept_are_no_targets() -> None:
    prompts, responses = [np.array([5, 6])], [np.array([1, 2, 3])]
    keep = torch.tensor([[True, False, True]])
    batch = collate_responses(prompts, responses, [0], 0, keep)
    assert batch.input_ids.tolist() == [[5, 6, 1, 2]]
    assert batch.targets.tolist() == [[IGNORED, 1, IGNORED, 3]]
    assert batch.response_columns.tolist() == [0, 2]


def test_no_rows() -> None:
    batch = collate_responses([np.array([5])], [np.array([1])], [], pad_id=9)
    assert batch.input_ids.tolist() == [[9]]
    assert batch.targets.tolist() == [[IGNORED]]
    assert [t.shape for t in batch[3:]] == [(0,), (0,)]
    assert batch.at(torch.ones(1, 1)).shape == (0,)


@for_all(rows=ROWS, micro=st.integers(1, 4), world=st.integers(1, 3), data=st.data())
@settings(max_examples=60, deadline=None)
def test_every_kept_token_once_behind_what_precedes_it(rows: Any, micro: int, world: int, data: Any) -> None:
    prompts, responses = [np.array(p) for p, _ in rows], [np.array(r) for _, r in rows]
    keep = whole_mask(responses)
    for i, response in enumerate(responses):
        for t in range(len(response)):
            keep[i, t] = data.draw(st.booleans())
    seen = torch.zeros(keep.shape, dtype=torch.int64)
    counts = set()
    for rank in range(world):
        shares = share_of_rank(prompts, responses, np.arange(len(rows)), micro, rank, world)
        counts.add(len(shares))
        for share in shares:
            batch = collate_responses(prompts, responses, share, PAD, keep)
            lines, positions = (batch.targets != IGNORED).nonzero(as_tuple=True)
            for n in range(len(lines)):
                i, t = int(batch.response_rows[n]), int(batch.response_columns[n])
                seen[i, t] += 1
                before = batch.input_ids[lines[n], : positions[n] + 1].tolist()
                assert before == [*prompts[i], *responses[i][:t]]
                assert int(batch.targets[lines[n], positions[n]]) == responses[i][t]
    assert torch.equal(seen, keep.long())
    assert len(counts) == 1  # ranks call the model equally often


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("left", [0, 17])
@torch.no_grad()
def test_padding_changes_no_logprob_and_no_value(arch: str, left: int) -> None:
    """Against a forward pass of each response alone, padded on the left, with mask and position ids for it."""
    policy, critic = make_policy(arch), make_critic()
    prompts, responses = ragged(5, seed=left)
    for width in (5, 1):  # all in one batch, much padding on the right; one by one, none
        for start in range(0, 5, width):
            batch = collate_responses(prompts, responses, range(start, start + width), PAD)
            found = policy(**model_inputs(batch), targets=batch.targets, temperature=0.7, logprobs=True).logprobs
            values = token_values(critic, batch)
            for n, (i, t) in enumerate(zip(batch.response_rows, batch.response_columns, strict=True)):
                ids, at = [*prompts[i], *responses[i]], left + len(prompts[i]) - 1 + int(t)
                inputs = left_padded(ids, left)
                logits = policy(**inputs, use_cache=False).logits[0, at] / 0.7
                hidden = critic.base_model(**inputs, use_cache=False).last_hidden_state[0, at]
                assert abs(float(torch.log_softmax(logits, -1)[ids[at - left + 1]] - found[n])) < 1e-5
                assert abs(float(hidden @ critic.score.weight[0] - values[n])) < 1e-5


def model_inputs(batch: Any) -> dict[str, Tensor]:
    return {"input_ids": batch.input_ids, "position_ids": batch.position_ids}


def left_padded(ids: list[int], left: int) -> dict[str, Tensor]:
    mask = torch.tensor([[0] * left + [1] * len(ids)])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return {"input_ids": torch.tensor([[PAD] * left + ids]), "attention_mask": mask, "position_ids": positions}
