"""PPO's losses: by hand, against a loop over tokens, autograd of the naive formula, and split into micro-batches."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf_cli.ops.losses import ppo_policy_loss, ppo_value_loss
from tests.ragged import NAN, Ragged, ragged

KEPT = torch.ones(1, 1, dtype=torch.bool)
CLIP = st.floats(0.05, 0.5)


def one(value: float) -> Tensor:
    return torch.tensor([[value]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("advantage", "ratio", "loss", "gradient", "clipfrac"),
    [
        (1.0, 1.3, -1.2, 0.0, 1),  # far enough upwards
        (-1.0, 1.3, 1.3, 1.3, 0),  # wrong way: pulled back, d(−Aρ)/d log π = −Aρ
        (1.0, 0.7, -0.7, -0.7, 0),
        (-1.0, 0.7, 0.8, 0.0, 1),  # far enough downwards
        (2.0, 1.1, -2.2, -2.2, 0),
        (0.0, 1.3, 0.0, 0.0, 0),
    ],
)
def test_clipping_direction_of_the_policy(
    advantage: float, ratio: float, loss: float, gradient: float, clipfrac: int
) -> None:
    old = one(-2.0)
    logprobs = (old + math.log(ratio)).requires_grad_()
    found, stats = ppo_policy_loss(logprobs, old, one(advantage), KEPT, clip_range=0.2)
    found.backward()
    assert found.item() == pytest.approx(loss)
    assert logprobs.grad is not None
    assert logprobs.grad.item() == pytest.approx(gradient)
    assert stats.clipfrac.item() == clipfrac
    assert stats.approxkl.item() == pytest.approx(0.5 * math.log(ratio) ** 2)


@pytest.mark.parametrize("num_tokens", [None, 0, torch.tensor(0)])
def test_a_mini_batch_without_a_token_has_no_loss(num_tokens: int | torch.Tensor | None) -> None:
    zero, nothing = one(0.3), torch.zeros_like(KEPT)
    assert ppo_policy_loss(zero, zero, zero, nothing, 0.2, num_tokens)[0] == 0
    assert ppo_value_loss(zero, zero, zero, nothing, 0.2, num_tokens)[0] == 0


@pytest.mark.parametrize(
    ("value", "target", "loss", "gradient", "clipfrac"),
    [
        (1.0, 0.0, 0.5, 1.0, 0),  # left the range away from the target: (V−R)² = 1 > 0.2²
        (1.0, 2.0, 1.62, 0.0, 1),  # left it towards the target: (0.2 − 2)² = 3.24 > 1
        (-1.0, -2.0, 1.62, 0.0, 1),
        (0.1, 2.0, 1.805, -1.9, 0),  # inside: ½ · 1.9²
    ],
)
def test_clipping_direction_of_the_value(
    value: float, target: float, loss: float, gradient: float, clipfrac: int
) -> None:
    values = one(value).requires_grad_()
    found, stats = ppo_value_loss(values, one(0.0), one(target), KEPT, clip_range=0.2)
    found.backward()
    assert found.item() == pytest.approx(loss)
    assert values.grad is not None
    assert values.grad.item() == pytest.approx(gradient)
    assert stats.clipfrac.item() == clipfrac
    assert stats.square_error.item() == pytest.approx((value - target) ** 2)


def test_ratio_is_one_before_the_first_step() -> None:
    logprobs = torch.tensor([[-1.0, -2.0, NAN]])
    keep = torch.tensor([[True, True, False]])
    loss, stats = ppo_policy_loss(logprobs, logprobs.clone(), torch.tensor([[3.0, 1.0, NAN]]), keep, 0.2)
    assert loss.item() == -2  # −mean A
    assert [s.item() for s in stats] == [0, 0, 1, 0]
    assert stats.ratio_var.item() == 0


def test_ratio_variance_by_hand() -> None:
    # Ratios 1, 2, 3: mean 2, variance (1 + 0 + 1)/3; their (ρ − 1)² are 0, 1, 4
    old = torch.zeros(1, 3, dtype=torch.float64)
    _, stats = ppo_policy_loss(torch.tensor([[1.0, 2.0, 3.0]]).double().log(), old, old, old == 0, 0.2)
    assert (stats.ratio.item(), stats.ratio_square.item()) == pytest.approx((2, 5 / 3))
    assert stats.ratio_var.item() == pytest.approx(2 / 3)


def slow_policy(new: list[float], old: list[float], gain: list[float], clip: float) -> tuple[float, list[float]]:
    """(sum of losses, sums of the stats) of the kept tokens, one after the other."""
    total, sums = 0.0, [0.0] * 4
    for p, q, a in zip(new, old, gain, strict=True):
        ratio = math.exp(p - q)
        clipped = min(max(ratio, 1 - clip), 1 + clip)
        total += max(-a * ratio, -a * clipped)
        for i, s in enumerate((float(-a * clipped > -a * ratio), (p - q) ** 2 / 2, ratio, (ratio - 1) ** 2)):
            sums[i] += s
    return total, sums


@settings(max_examples=60, deadline=None)
@given(batch=ragged(), clip=CLIP, given_count=st.booleans())
def test_policy_loss_token_by_token(batch: Ragged, clip: float, given_count: bool) -> None:
    old, gain, keep = batch.draw(0), batch.draw(1), batch.keep_mask
    new = (old + batch.draw(2, scale=0.3)).requires_grad_()
    count = 50 if given_count else int(keep.sum())
    loss, stats = ppo_policy_loss(new, old, gain, keep, clip, 50 if given_count else None)
    total, sums = slow_policy(new[keep].tolist(), old[keep].tolist(), gain[keep].tolist(), clip)
    assert loss.item() == pytest.approx(total / count)
    assert [s.item() for s in stats] == pytest.approx([s / count for s in sums])

    naive = new.detach()[keep].requires_grad_()
    ratio = (naive - old[keep]).exp()
    a = gain[keep]
    (torch.max(-a * ratio, -a * ratio.clamp(1 - clip, 1 + clip)).sum() / count).backward()
    loss.backward()
    assert new.grad is not None
    assert naive.grad is not None
    torch.testing.assert_close(new.grad[keep], naive.grad)
    assert not new.grad[~keep].any()


@settings(max_examples=60, deadline=None)
@given(batch=ragged(), clip=CLIP, given_count=st.booleans())
def test_value_loss_token_by_token(batch: Ragged, clip: float, given_count: bool) -> None:
    old, target, keep = batch.draw(0), batch.draw(1), batch.keep_mask
    values = (old + batch.draw(2, scale=0.5)).requires_grad_()
    count = 50 if given_count else int(keep.sum())
    loss, stats = ppo_value_loss(values, old, target, keep, clip, 50 if given_count else None)
    total = clipped_tokens = squares = 0.0
    for v, o, r in zip(*(t[keep].tolist() for t in (values, old, target)), strict=True):
        free, clipped = (v - r) ** 2, (min(max(v, o - clip), o + clip) - r) ** 2
        total, clipped_tokens, squares = (
            total + max(free, clipped) / 2,
            clipped_tokens + (clipped > free),
            squares + free,
        )
    assert loss.item() == pytest.approx(total / count)
    assert [s.item() for s in stats] == pytest.approx([clipped_tokens / count, squares / count])

    naive = values.detach()[keep].requires_grad_()
    near = old[keep] + (naive - old[keep]).clamp(-clip, clip)
    (0.5 * torch.max((naive - target[keep]) ** 2, (near - target[keep]) ** 2).sum() / count).backward()
    loss.backward()
    assert values.grad is not None
    assert naive.grad is not None
    torch.testing.assert_close(values.grad[keep], naive.grad)
    assert not values.grad[~keep].any()


@settings(max_examples=40, deadline=None)
@given(batch=ragged(min_rows=2, max_rows=6), size=st.integers(1, 3))
def test_micro_batches_add_up(batch: Ragged, size: int) -> None:
    old, third, keep = batch.draw(0), batch.draw(1), batch.keep_mask
    moved = old + batch.draw(2, scale=0.3)
    count = keep.sum()
    for compute in (ppo_policy_loss, ppo_value_loss):
        new = moved.clone().requires_grad_()
        loss, stats = compute(new, old, third, keep, 0.2)
        (gradient,) = torch.autograd.grad(loss, new)
        new = moved.clone().requires_grad_()
        rows = [slice(i, i + size) for i in range(0, len(keep), size)]
        parts = [compute(new[i], old[i], third[i], keep[i], 0.2, count) for i in rows]
        (split,) = torch.autograd.grad(sum((p[0] for p in parts), torch.zeros(())), new)
        torch.testing.assert_close(sum(p[0].item() for p in parts), loss.item())
        for name, whole in stats._asdict().items():
            torch.testing.assert_close(sum(getattr(p[1], name).item() for p in parts), whole.item())
        assert torch.equal(split, gradient)  # of each token: the same operations


def test_a_ratio_that_overflows_does_not_make_clipped_tokens_nan() -> None:
    logprobs = torch.zeros(1, 3, requires_grad=True)
    old = torch.tensor([[-1000.0, -1000.0, 0.0]])
    loss, _ = ppo_policy_loss(logprobs, old, torch.tensor([[1.0, 0.0, 2.0]]), torch.ones(1, 3, dtype=torch.bool), 0.2)
    loss.backward()
    assert loss.item() == pytest.approx((-1.2 - 0 - 2) / 3)
    assert logprobs.grad is not None
    assert logprobs.grad.tolist()[0] == pytest.approx([0, 0, -2 / 3])


def test_a_kept_nan_is_not_hidden() -> None:
    for values in ([[NAN, 0.0]], [[0.0, NAN]]):
        new, keep = torch.tensor(values), torch.ones(1, 2, dtype=torch.bool)
        assert ppo_policy_loss(new, torch.zeros(1, 2), torch.ones(1, 2), keep, 0.2)[0].isnan()
        assert ppo_value_loss(new, torch.zeros(1, 2), torch.ones(1, 2), keep, 0.2)[0].isnan()


@pytest.mark.parametrize("compute", [ppo_policy_loss, ppo_value_loss])
@pytest.mark.parametrize("shape", [(0,), (2, 3)])
def test_no_kept_token_gives_a_connected_zero(compute: object, shape: tuple[int, ...]) -> None:
    new = torch.full(shape, NAN, requires_grad=True)
    nothing = torch.zeros(shape, dtype=torch.bool)
    loss, stats = compute(new, torch.zeros(shape), torch.zeros(shape), nothing, 0.2)  # type: ignore[operator]
    loss.backward()
    assert loss.item() == 0
    assert not any(stats)
    assert new.grad is not None
    assert not new.grad.any()


@pytest.mark.parametrize("compute", [ppo_policy_loss, ppo_value_loss])
def test_only_the_new_model_gets_a_gradient_and_half_precision_is_widened(compute: object) -> None:
    new, old, third = (torch.ones(1, 2, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    loss, stats = compute(new, old, third, torch.ones(1, 2, dtype=torch.bool), 0.2)  # type: ignore[operator]
    loss.backward()
    assert loss.dtype == torch.float32
    assert new.grad is not None
    assert old.grad is None
    assert third.grad is None
    assert not any(s.requires_grad for s in stats)
