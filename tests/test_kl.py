"""KL estimators against the enumerated KL of a small policy, the alarm for another sampler, the controllers."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf_cli.ops.kl import kl_estimate, negative_kl_test, next_kl_coef
from rlhf_cli.ops.logprobs import gather_logprobs
from rlhf_cli.schema import AlgorithmConfig
from tests.ragged import NAN

END, V, LONGEST = 0, 4, 3
PREFIXES = [p for n in range(LONGEST) for p in itertools.product(range(1, V), repeat=n)]
ANSWERS = [(*p, t) for p in PREFIXES for t in range(V) if t == END or len(p) == LONGEST - 1]


class Texts(NamedTuple):
    """tokens (R, LONGEST) padded with 1, a real token; states (R, LONGEST): number of the prefix; keep_mask."""

    tokens: Tensor
    states: Tensor
    keep_mask: Tensor


def texts(answers: list[tuple[int, ...]]) -> Texts:
    pad = [a + (1,) * (LONGEST - len(a)) for a in answers]
    states = [[PREFIXES.index(a[:t]) if t < len(a) else 0 for t in range(LONGEST)] for a in answers]
    keep = torch.arange(LONGEST)[None] < torch.tensor([len(a) for a in answers])[:, None]
    return Texts(torch.tensor(pad), torch.tensor(states), keep)


def logprobs_of(logits: Tensor, batch: Texts) -> Tensor:
    """(R, LONGEST): a policy is a table of logits (prefixes, V); its hidden state says which prefix it is at."""
    hidden = torch.eye(len(PREFIXES), dtype=logits.dtype)[batch.states]
    return gather_logprobs(hidden, logits.T.contiguous(), batch.tokens)


def sample(logits: Tensor, count: int, seed: int, min_new_tokens: int = 0) -> list[tuple[int, ...]]:
    generator, answers = np.random.default_rng(seed), []
    probabilities = torch.softmax(logits, -1).numpy()
    for _ in range(count):
        answer: tuple[int, ...] = ()
        while len(answer) < LONGEST and END not in answer:
            p = probabilities[PREFIXES.index(answer)].copy()
            if len(answer) < min_new_tokens:
                p[END] = 0.0
            answer += (int(generator.choice(V, p=p / p.sum())),)
        answers.append(answer)
    return answers


def policies() -> tuple[Tensor, Tensor]:
    """(policy, reference) (prefixes, V): the policy has learnt to come to an end."""
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(len(PREFIXES), V, generator=generator, dtype=torch.float64)
    policy = reference + 0.3 * torch.randn(reference.shape, generator=generator, dtype=torch.float64)
    policy[:, END] += 2.0
    return policy, reference


def enumerated_kl(policy: Tensor, reference: Tensor) -> float:
    batch = texts(ANSWERS)
    p, q = ((logprobs_of(table, batch) * batch.keep_mask).sum(1) for table in (policy, reference))
    assert p.exp().sum().item() == pytest.approx(1)  # these are all answers there are
    return float((p.exp() * (p - q)).sum())


def test_by_hand() -> None:
    # r = π_ref/π = 2: k1 = −ln 2, k2 = ½ ln² 2, k3 = 1 − ln 2; r = ½: ln 2, ½ ln² 2, −½ + ln 2
    two = math.log(2.0)
    logprobs, reference = torch.tensor([[-3.0, -3.0]]), torch.tensor([[-3.0 + two, -3.0 - two]])
    assert kl_estimate(logprobs, reference, "k1")[0].tolist() == pytest.approx([-two, two])
    assert kl_estimate(logprobs, reference, "k2")[0].tolist() == pytest.approx([two**2 / 2] * 2)
    assert kl_estimate(logprobs, reference, "k3")[0].tolist() == pytest.approx([1 - two, two - 0.5])
    with pytest.raises(ValueError, match="allowed: k1, k2, k3"):
        kl_estimate(torch.zeros(1, 1), torch.zeros(1, 1), "k4")


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(-20, 0), st.floats(-20, 0)), min_size=1, max_size=6))
def test_every_token_by_the_formula(pairs: list[tuple[float, float]]) -> None:
    logprobs, reference = torch.tensor(pairs, dtype=torch.float64).T[:, None]
    slow = {
        "k1": [a - b for a, b in pairs],
        "k2": [(a - b) ** 2 / 2 for a, b in pairs],
        "k3": [math.exp(b - a) - 1 - (b - a) for a, b in pairs],
    }
    for kind, expected in slow.items():
        assert kl_estimate(logprobs, reference, kind)[0].tolist() == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert (kl_estimate(logprobs.float(), reference.float(), "k3") >= 0).all()


def test_k3_keeps_its_digits_near_the_reference() -> None:
    # Δ = 1e-3: e^−Δ − 1 + Δ = Δ²/2 − Δ³/6 + … = 4.9983e-7, of which exp(−Δ) − 1 in fp32 (steps of 6e-8) keeps one digit
    found = kl_estimate(torch.tensor([[1e-3]]), torch.zeros(1, 1), "k3").item()
    assert found == pytest.approx(4.9983e-7, rel=1e-3)


def test_half_precision_is_widened() -> None:
    low = torch.tensor([[-3.0]], dtype=torch.bfloat16)
    assert kl_estimate(low, low, "k1").dtype == torch.float32


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_exactly_zero_at_the_reference(kind: str) -> None:
    policy, _ = policies()
    batch = texts(sample(policy, 50, seed=1))
    logprobs = logprobs_of(policy, batch)
    assert not kl_estimate(logprobs, logprobs_of(policy.clone(), batch), kind).any()


def test_samples_agree_with_the_enumerated_kl() -> None:
    policy, reference = policies()
    expected = enumerated_kl(policy, reference)
    batch = texts(sample(policy, 4000, seed=1))
    found = {}
    for kind in ("k1", "k3"):
        tokens = kl_estimate(logprobs_of(policy, batch), logprobs_of(reference, batch), kind)
        sums = tokens.masked_fill(~batch.keep_mask, 0.0).sum(1)
        found[kind] = (sums.mean().item(), sums.std().item() / 4000**0.5)
        assert found[kind][1] < 0.05 * expected  # the comparison means something
        assert abs(found[kind][0] - expected) < 3 * found[kind][1]
    k1 = kl_estimate(logprobs_of(policy, batch), logprobs_of(reference, batch), "k1")
    test = negative_kl_test(k1, batch.keep_mask)
    assert (test.mean, test.stderr) == pytest.approx(found["k1"])
    assert not test.alarm


def test_a_masked_end_trips_the_alarm() -> None:
    """The policy ends sooner than the reference; where it may not, it writes what it holds less likely than that."""
    policy, reference = policies()
    for min_new_tokens, tripped in ((0, False), (2, True)):
        batch = texts(sample(policy, 64, 2, min_new_tokens))
        k1 = kl_estimate(logprobs_of(policy, batch), logprobs_of(reference, batch), "k1")
        assert negative_kl_test(k1, batch.keep_mask).alarm is tripped


def test_alarm_by_hand() -> None:
    # Sums −1, −3, four times each: mean −2, variance 8 · 1² / 7, SE = √(8/7) / √8 = √(1/7)
    keep = torch.tensor([[True, True, False], [True, False, False]] * 4)
    k1 = torch.tensor([[-0.25, -0.75, NAN], [-3.0, NAN, 99.0]] * 4)
    test = negative_kl_test(k1, keep)
    assert test.mean == -2
    assert test.stderr == pytest.approx(7**-0.5)
    assert test.alarm  # −2 + 3 · 0.378 < 0
    assert not negative_kl_test(k1[:4], keep[:4]).alarm  # four responses say nothing
    # Sums 0, −2.5: mean −1.25, SE = 1.25 · √(1/7) = 0.472, and −1.25 + 1.417 > 0
    assert not negative_kl_test(k1 + 0.5, keep).alarm
    assert negative_kl_test(k1[:1], keep[:1]).stderr == math.inf
    assert not negative_kl_test(torch.zeros(8, 3), keep).alarm


def adaptive(target: float = 6.0, horizon: int = 10000) -> AlgorithmConfig:
    return AlgorithmConfig(kl_controller="adaptive", kl_target=target, kl_horizon=horizon)


@pytest.mark.parametrize(
    ("kl", "factor"),
    [
        (6.0, 1.0),
        (6.6, 1.00512),  # error 0.1: 1 + 0.1 · 512/10000
        (12.0, 1.01024),  # error 1, clipped to 0.2
        (math.inf, 1.01024),
        (5.7, 0.99744),  # error −0.05
        (0.0, 0.98976),
        (-3.0, 0.98976),
    ],
)
def test_adaptive_controller(kl: float, factor: float) -> None:
    assert next_kl_coef(0.05, kl, 512, adaptive()) == pytest.approx(0.05 * factor, rel=1e-12)


@settings(max_examples=50, deadline=None)
@given(kl=st.floats(-100, 100))
def test_adaptive_controller_is_bounded_and_goes_the_right_way(kl: float) -> None:
    factor = next_kl_coef(1.0, kl, 512, adaptive())
    assert 0.98976 - 1e-12 <= factor <= 1.01024 + 1e-12
    assert (factor >= 1) if kl >= 6 else (factor <= 1)


def test_fixed_controller() -> None:
    assert next_kl_coef(0.05, 100.0, 512, AlgorithmConfig()) == 0.05


def test_a_horizon_that_could_turn_the_sign_is_refused() -> None:
    # 1 − 0.2 · 512/102 < 0 < 1 − 0.2 · 512/103
    refused = [p.key for p in AlgorithmConfig(kl_controller="adaptive", rollout_batch_size=512, kl_horizon=102).check()]
    assert refused == ["kl_horizon"]
    settings = AlgorithmConfig(kl_controller="adaptive", rollout_batch_size=512, kl_horizon=103)
    assert not list(settings.check())
    assert next_kl_coef(0.05, 0.0, 512, settings) > 0
