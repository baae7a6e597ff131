"""One update computed twice: by the program, on any layout of ranks, and token by token (tests/ppo_reference.py)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.ppo_cases import Trained, given, make_critic, make_policy, ppo_config, text_rows
from tests.ppo_reference import Slow, slow_update

pytestmark = pytest.mark.distributed

TRAIN = "tests.ppo_cases:train"
# (ranks, ZeRO stage, micro-batch)
LAYOUTS = [(1, 0, 8), (1, 2, 1), (1, 3, 2), (2, 2, 1), (2, 2, 8), (2, 3, 2), (2, 3, 8)]
FIGURES = {
    "loss/policy_avg": "policy",
    "loss/value_avg": "value",
    "loss/ptx": "ptx",
    "policy/entropy_avg": "entropy",
    "policy/clipfrac_avg": "clipped",
    "val/ratio": "ratio",
    "val/ratio_var": "ratio_var",
}


def slow(kind: str = "llama", critic: bool = True, **settings: Any) -> Slow:
    config = ppo_config(advantage="gae" if critic else "rloo", samples_per_prompt=None if critic else 2, **settings)
    text = text_rows() if config.ppo.ptx.coef else None
    return slow_update(
        make_policy(kind), make_critic() if critic else None, given(config, critic=critic, kind=kind), config, 1, text
    )


def assert_same(done: Trained, expected: Slow, last_only: bool = False) -> None:
    """Figures, weights, and with last_only, after the only step, the gradient that Adam was given."""
    for name, ours in FIGURES.items():
        if ours in expected.figures:
            assert done.figures[name] == pytest.approx(expected.figures[ours], abs=1e-5), name
    for found, wanted in zip(done.weights, expected.weights, strict=True):
        assert set(found) == set(wanted)
        for name, weight in wanted.items():
            assert np.abs(found[name] - weight.numpy()).max() < 1e-5, name
    if not last_only:
        return
    for found, wanted in zip(done.moments, expected.gradients, strict=True):
        assert set(found) == set(wanted)
        for name, gradient in wanted.items():
            # Adam's first moment after one step: (1 - 0.9) x gradient
            assert np.abs(10 * found[name] - gradient.flatten().numpy()).max() < 1e-5, name


@pytest.fixture(scope="module")
def expected() -> Slow:
    """Two epochs of two steps, with critic, text and clipping of everything that can be clipped."""
    found = slow(ptx="token_mean")
    assert 0.05 < found.figures["clipped"] < 0.6
    start = make_policy().state_dict()
    moved = [float((weight - start[name]).abs().max()) for name, weight in found.weights[0].items()]
    assert min(moved) > 1e-4  # ten times the tolerance at least, everywhere
    return found


@pytest.mark.parametrize(("world", "stage", "micro"), LAYOUTS)
def test_every_layout_trains_the_same(run_on_ranks: Any, expected: Slow, world: int, stage: int, micro: int) -> None:
    results = run_on_ranks(world, TRAIN, stage=stage, micro=micro, ptx="token_mean")
    assert_same(results[0], expected)
    assert results[0].steps == 4
    for other in results[1:]:
        assert other.figures == results[0].figures


@pytest.mark.parametrize(("world", "stage"), [(1, 2), (2, 2), (2, 3)])
def test_the_gradient_is_that_of_autograd(run_on_ranks: Any, world: int, stage: int) -> None:
    one = {"ppo_epochs": 1, "num_mini_batches": 1, "optim": {"max_grad_norm": 0.0}, "ptx": "row_mean"}
    assert_same(run_on_ranks(world, TRAIN, stage=stage, micro=2, **one)[0], slow(**one), last_only=True)


@pytest.mark.parametrize(("kind", "stage"), [("llama", 2), ("gpt2", 2), ("gpt2", 3), ("lora", 2), ("lora", 3)])
def test_without_a_critic(run_on_ranks: Any, kind: str, stage: int) -> None:
    done = run_on_ranks(2, TRAIN, stage=stage, kind=kind, critic=False, ptx="token_mean")[0]
    assert_same(done, slow(kind, critic=False, ptx="token_mean"))
    assert not any("value" in name or name.startswith("critic") for name in done.figures)


def test_a_rank_without_a_response(run_on_ranks: Any) -> None:
    """Three responses of a mini-batch as four micro-batches of two ranks: one is empty."""
    settings: dict[str, Any] = {"rollout_batch_size": 6, "micro": 1}
    for stage in (2, 3):
        assert_same(run_on_ranks(2, TRAIN, stage=stage, **settings)[0], slow(**settings))


@pytest.mark.parametrize(
    ("kind", "world", "stage", "micro"), [("llama", 1, 2, 1), ("llama", 2, 3, 4), ("gpt2", 2, 2, 1), ("lora", 2, 3, 2)]
)
def test_measured_as_one_by_one(run_on_ranks: Any, kind: str, world: int, stage: int, micro: int) -> None:
    """Log-probabilities and values of ragged responses, the same on every rank, 0 behind the end."""
    results = run_on_ranks(world, "tests.ppo_cases:measure", stage=stage, micro=micro, kind=kind)
    for found in results:
        assert np.abs(found.logprobs - found.slow_logprobs).max() < 1e-5
        assert np.abs(found.values - found.slow_values).max() < 1e-5
        assert (found.logprobs == results[0].logprobs).all()
        assert (found.values == results[0].values).all()
    assert (results[0].logprobs == 0).any()


@pytest.mark.parametrize(
    ("kind", "dtype", "world", "stage"),
    [("llama", "fp32", 1, 2), ("llama", "bf16", 2, 3), ("lora", "fp32", 2, 3), ("lora", "bf16", 1, 2)],
)
def test_kl_starts_at_exactly_zero_and_the_reference_stays(
    run_on_ranks: Any, kind: str, dtype: str, world: int, stage: int
) -> None:
    case = {"kind": kind, "dtype": dtype, "stage": stage}
    for found in run_on_ranks(world, "tests.ppo_cases:reference_over_training", **case):
        assert found.start == 0.0
        assert found.reference == 0.0
        assert found.policy > 1e-3
