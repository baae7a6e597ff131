"""Losses of reward models: by hand, against brute force, and their gradients."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_cli.ops.losses import classification_loss, kwise_reward_loss, pairwise_reward_loss

LN2 = math.log(2)
# (prompt, rank, score) of a batch in any order: ragged K from 1 on, ties in ranks and in scores
RANKINGS = st.lists(
    st.tuples(st.integers(-3, 3), st.integers(0, 4), st.integers(-6, 6).map(lambda x: x / 2)), min_size=0, max_size=30
)


def doubles(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def test_pairwise_by_hand() -> None:
    # differences 2 and 0: log(1 + e^-2) = 0.126928, ln 2 = 0.693147; mean 0.410038
    loss, stats = pairwise_reward_loss(doubles(3, 1), doubles(1, 1))
    assert loss.item() == pytest.approx((0.126928 + 0.693147) / 2, abs=1e-6)
    assert (stats.accuracy.item(), stats.margin.item(), stats.num) == (0.75, 1.0, 2)  # (1 + ½) / 2; (2 + 0) / 2
    assert stats.mean_reward.item() == 1.5  # (3 + 1 + 1 + 1) / 4
    assert not stats.margin.requires_grad
    # a margin of 2 takes the first difference to 0; it does not count as reward
    loss, stats = pairwise_reward_loss(doubles(3, 1), doubles(1, 1), margin=torch.tensor([2.0, 0.0]))
    assert loss.item() == pytest.approx(LN2)
    assert (stats.accuracy.item(), stats.margin.item()) == (0.75, 1.0)
    # centring: 0.01 ((3 + 1)² + (1 + 1)²) / 2 = 0.1
    centred, _ = pairwise_reward_loss(doubles(3, 1), doubles(1, 1), center_coef=0.01)
    assert centred.item() == pytest.approx((0.126928 + 0.693147) / 2 + 0.1, abs=1e-6)
    both = pairwise_reward_loss(doubles(3, 1), doubles(1, 1), margin=2.0)[0]
    assert both == pairwise_reward_loss(doubles(3, 1), doubles(1, 1), margin=torch.tensor([2.0, 2.0]))[0]


def test_pairwise_gradient() -> None:
    chosen, rejected = doubles(0.3, -1.0, 2.0), doubles(0.5, 1.5, 2.0)
    margin = torch.tensor([0.1, 0.0, 0.7])
    assert torch.autograd.gradcheck(lambda a, b: pairwise_reward_loss(a, b, margin, 0.05)[0], (chosen, rejected))
    pairwise_reward_loss(chosen, rejected)[0].backward()
    # d/dc of -log σ(c - r) is -σ(r - c), a third of it in a mean of 3
    assert chosen.grad is not None
    assert chosen.grad.tolist() == pytest.approx((-torch.sigmoid(rejected - chosen) / 3).tolist())


def test_pairwise_is_stable_and_wide() -> None:
    chosen = torch.tensor([-1e4], dtype=torch.bfloat16, requires_grad=True)
    loss, _ = pairwise_reward_loss(chosen, torch.tensor([1e4], dtype=torch.bfloat16))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(2e4, rel=1e-2)  # -log σ(-x) is x for large x, not infinite
    loss.backward()
    assert chosen.grad is not None
    assert chosen.grad.item() == -1
    # in bfloat16 the difference of 256 and 255 would be lost after the sum with a margin; fp32 keeps it
    halves = torch.tensor([256.0, 1.0], dtype=torch.bfloat16)
    assert pairwise_reward_loss(halves[:1], halves[1:])[1].margin.item() == 255


def test_empty_batches_reach_their_inputs() -> None:
    scores = doubles(1.0)
    loss, stats = pairwise_reward_loss(scores[1:], scores[1:])
    assert (loss.item(), stats.num, stats.accuracy.item(), stats.mean_reward.item()) == (0, 0, 0, 0)
    kwise, ranked = kwise_reward_loss(scores[1:], torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    assert (kwise.item(), ranked.num) == (0, 0)
    lone, ranked = kwise_reward_loss(scores, torch.zeros(1), torch.zeros(1, dtype=torch.int64))
    assert (lone.item(), ranked.num, ranked.mean_reward.item()) == (0, 0, 0)
    logits = torch.zeros(1, 3, requires_grad=True)
    labelled, told = classification_loss(logits[1:], torch.zeros(0, dtype=torch.int64), torch.ones(3))
    assert (labelled.item(), told.num, told.weight.item()) == (0, 0, 0)
    for zero, inputs in ((loss, scores), (kwise, scores), (lone, scores), (labelled, logits)):
        inputs.grad = None
        zero.backward()
        assert inputs.grad is not None
        assert not inputs.grad.any()


def test_kwise_by_hand() -> None:
    # prompt 7: scores 2 > 1 > 1 with ranks 1, 2, 2: two pairs of difference 1, the tie makes none.
    # prompt 5: scores 0, 3 with ranks 1, 2: one pair of difference -3. prompt 9: two equal ranks, no pair.
    scores, ranks = doubles(2, 0, 1, 3, 1, 8, 8), torch.tensor([1, 1, 2, 2, 2, 4, 4.0])
    prompts = torch.tensor([7, 5, 7, 5, 7, 9, 9])
    loss, stats = kwise_reward_loss(scores, ranks, prompts)
    # log(1 + e^-1) = 0.313262; log(1 + e^3) = 3.048587
    assert loss.item() == pytest.approx((0.313262 + 3.048587) / 2, abs=1e-6)
    assert stats.num == 2
    assert stats.accuracy.item() == 0.5  # 1 for prompt 7, 0 for prompt 5
    assert stats.margin.item() == -1  # (1 - 3) / 2
    assert stats.mean_reward.item() == pytest.approx((4 / 3 + 3 / 2) / 2)  # (2 + 1 + 1) / 3 and (0 + 3) / 2
    # the centring term of a pair: prompt 7 has (2 + 1)² twice, prompt 5 (0 + 3)²
    centred, _ = kwise_reward_loss(scores, ranks, prompts, center_coef=0.01)
    assert (centred - loss).item() == pytest.approx(0.01 * (9 + 9) / 2)


def brute_force(
    rows: list[tuple[int, int, float]], center_coef: float
) -> tuple[float, float, float, float, int]:  # loss, accuracy, margin, mean reward, prompts
    losses, accuracies, margins, rewards = [], [], [], []
    for prompt in {p for p, _, _ in rows}:
        mine = [(rank, score) for p, rank, score in rows if p == prompt]
        pairs = [(a, b) for rank, a in mine for other, b in mine if rank < other]
        if pairs:
            each = [math.log1p(math.exp(b - a)) + center_coef * (a + b) ** 2 for a, b in pairs]
            losses.append(sum(each) / len(pairs))
            accuracies.append(sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs) / len(pairs))
            margins.append(sum(a - b for a, b in pairs) / len(pairs))
            rewards.append(sum(score for _, score in mine) / len(mine))
    n = max(1, len(losses))
    return sum(losses) / n, sum(accuracies) / n, sum(margins) / n, sum(rewards) / n, len(losses)


@given(RANKINGS, st.sampled_from([0.0, 0.01]))
@settings(max_examples=150, deadline=None)
def test_kwise_against_brute_force(rows: list[tuple[int, int, float]], center_coef: float) -> None:
    prompts = torch.tensor([p for p, _, _ in rows], dtype=torch.int64)
    ranks = torch.tensor([r for _, r, _ in rows], dtype=torch.float64)
    loss, stats = kwise_reward_loss(doubles(*(s for _, _, s in rows)), ranks, prompts, center_coef)
    told = (loss.item(), stats.accuracy.item(), stats.margin.item(), stats.mean_reward.item(), stats.num)
    assert told == pytest.approx(brute_force(rows, center_coef))


@given(RANKINGS, st.integers(0, 100))
@settings(max_examples=50, deadline=None)
def test_kwise_does_not_depend_on_the_order_and_has_true_gradients(
    rows: list[tuple[int, int, float]], seed: int
) -> None:
    prompts = torch.tensor([p for p, _, _ in rows], dtype=torch.int64)
    ranks = torch.tensor([r for _, r, _ in rows], dtype=torch.float64)
    scores = doubles(*(s for _, _, s in rows))
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    loss, _ = kwise_reward_loss(scores, ranks, prompts)
    shuffled, _ = kwise_reward_loss(scores[order], ranks[order], prompts[order])
    assert shuffled.item() == pytest.approx(loss.item())
    assert torch.autograd.gradcheck(lambda s: kwise_reward_loss(s, ranks, prompts, 0.01)[0], (scores,))


@pytest.mark.parametrize("count", range(2, 10))
def test_equal_scores_cost_ln_2_for_any_k(count: int) -> None:
    loss, stats = kwise_reward_loss(doubles(*[1.5] * count), torch.arange(count), torch.full((count,), 3))
    assert loss.item() == pytest.approx(LN2, abs=1e-12)
    assert (stats.accuracy.item(), stats.num) == (pytest.approx(0.5), 1)


def test_two_answers_are_a_pair_to_the_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    chosen, rejected = torch.randn(2, 1000, generator=generator).requires_grad_()
    pairwise, compared = pairwise_reward_loss(chosen, rejected, center_coef=0.01)
    scores = torch.stack([chosen, rejected], 1).flatten()
    ranks, prompts = torch.tensor([0.0, 1.0]).repeat(1000), torch.arange(1000).repeat_interleave(2)
    kwise, ranked = kwise_reward_loss(scores, ranks, prompts, center_coef=0.01)
    assert kwise.item() == pairwise.item()
    assert (ranked.accuracy.item(), ranked.margin.item(), ranked.num) == (
        compared.accuracy.item(),
        compared.margin.item(),
        compared.num,
    )


def test_micro_batches_add_up() -> None:
    """loss x num over any cut of the rows is that of the whole: what the loop relies on."""
    generator = torch.Generator().manual_seed(1)
    scores, prompts = torch.randn(60, generator=generator).double(), torch.arange(60) // 4
    ranks = torch.randint(0, 3, (60,), generator=generator).double()
    whole, stats = kwise_reward_loss(scores, ranks, prompts)
    parts = [kwise_reward_loss(scores[s], ranks[s], prompts[s]) for s in (slice(0, 8), slice(8, 48), slice(48, 60))]
    assert sum(loss.item() * part.num for loss, part in parts) == pytest.approx(whole.item() * stats.num)
    assert sum(part.accuracy.item() * part.num for _, part in parts) == pytest.approx(stats.accuracy.item() * stats.num)


def test_classification_by_hand() -> None:
    # row 0: softmax(0, ln 3) = ¼, ¾ and the label 1: -ln ¾ = 0.287682. row 1: ½, ½ and the label 0: ln 2
    logits = torch.tensor([[0.0, math.log(3)], [1.0, 1.0]], dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([1, 0])
    loss, stats = classification_loss(logits, labels)
    assert loss.item() == pytest.approx((0.287682 + LN2) / 2, abs=1e-6)
    assert (stats.accuracy.item(), stats.num, stats.weight.item()) == (1.0, 2, 2.0)
    # weights 3 for class 0, 1 for class 1: (1 · 0.287682 + 3 · 0.693147) / 4
    weights = torch.tensor([3.0, 1.0])
    loss, stats = classification_loss(logits, labels, weights)
    assert loss.item() == pytest.approx((0.287682 + 3 * LN2) / 4, abs=1e-6)
    assert (stats.accuracy.item(), stats.weight.item()) == (1.0, 4.0)
    assert torch.autograd.gradcheck(lambda x: classification_loss(x, labels, weights)[0], (logits,))
    assert classification_loss(logits, torch.tensor([0, 0]))[1].accuracy.item() == 0.5


def test_a_wrong_shape_is_our_fault() -> None:
    with pytest.raises(AssertionError):
        pairwise_reward_loss(torch.zeros(2), torch.zeros(3))
    with pytest.raises(AssertionError):
        kwise_reward_loss(torch.zeros(2, 1), torch.zeros(2), torch.zeros(2))
