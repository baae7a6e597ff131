"""The update of an iteration: how many steps, at which rates, on which tokens, and when it ends."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rlhf_cli.ppo.update import learning_rates, mini_batches
from tests.ppo_cases import Trained, make_critic, make_policy, ppo_config
from tests.ranks import RankFailed

pytestmark = pytest.mark.distributed  # an engine needs a process group, if only of one


@pytest.fixture(scope="module")
def train(run_on_ranks: Any) -> Any:
    return lambda **case: run_on_ranks(1, "tests.ppo_cases:train", **({"micro": 4} | case))[0]


@pytest.fixture(scope="module")
def usual(train: Any) -> Trained:
    return train()


def largest_change(done: Trained) -> float:
    """Of any weight, of policy or critic."""
    starts = [make_policy().state_dict(), make_critic().state_dict()]
    return max(
        float(np.abs(weight - starts[i][name].numpy()).max())
        for i, weights in enumerate(done.weights)
        for name, weight in weights.items()
    )


def assert_same_weights(one: Trained, other: Trained, tolerance: float = 0.0) -> None:
    for a, b in zip(one.weights, other.weights, strict=True):
        assert set(a) == set(b)
        assert all(np.abs(a[name] - b[name]).max() <= tolerance for name in a)


@pytest.mark.parametrize(("epochs", "parts"), [(1, 1), (1, 3), (4, 1), (2, 2)])
def test_epochs_times_mini_batches_steps(train: Any, epochs: int, parts: int) -> None:
    """Counted by AdamW itself, after each call of after_step; micro-batches of 1 add none."""
    done = train(ppo_epochs=epochs, num_mini_batches=parts, micro=1)
    assert done.steps == epochs * parts
    assert not done.stopped


def test_each_epoch_takes_every_response_once_in_an_order_of_its_own() -> None:
    config = ppo_config(ppo_epochs=3, num_mini_batches=4)
    steps = list(mini_batches(config, 5, 12))
    assert [len(rows) for rows in steps] == [3] * 12
    epochs = [np.concatenate(steps[start : start + 4]).tolist() for start in (0, 4, 8)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(12))] * 3
    others = [np.concatenate(list(mini_batches(config, i, 12))[:4]).tolist() for i in (4, 6)]
    assert len({tuple(order) for order in epochs + others}) == 5
    again = list(mini_batches(config, 5, 12))
    assert all((a == b).all() for a, b in zip(steps, again, strict=True))


def test_target_kl_ends_the_iteration_after_the_step_that_went_too_far(train: Any, usual: Trained) -> None:
    # Old log-probabilities are 0.2 off at random: approxkl is about 0.02 from the first step on.
    stopped = train(target_kl=1e-3)
    assert stopped.stopped
    assert stopped.steps == 1
    assert stopped.figures["policy/approxkl_avg"] > 1e-3
    assert largest_change(stopped) > 0
    free = train(target_kl=10.0)
    assert not free.stopped
    assert free.steps == 4
    assert_same_weights(free, usual)
    last = train(target_kl=1e-3, ppo_epochs=1, num_mini_batches=1)
    assert not last.stopped  # there was nothing left to leave out


def test_learning_rates_fall_over_the_whole_run() -> None:
    config = ppo_config()  # 3 iterations x 2 epochs x 2 mini-batches = 12 steps, lr 2e-3 and 3e-3, linear to 0
    for step in (0, 6, 11):
        assert learning_rates(config, step) == pytest.approx(
            {"lr": 2e-3 * (12 - step) / 12, "critic_lr": 3e-3 * (12 - step) / 12}
        )
    config.ppo.critic_lr = None
    assert learning_rates(config, 3)["critic_lr"] == pytest.approx(2e-3 * 9 / 12)
    config.ppo.advantage = "grpo"
    assert set(learning_rates(config, 3)) == {"lr"}


def test_the_rates_of_the_last_step_are_logged(train: Any, usual: Trained) -> None:
    # Iteration 1 has steps 4 to 7 of 12.
    assert usual.figures["lr"] == pytest.approx(2e-3 * 5 / 12)
    assert usual.figures["critic_lr"] == pytest.approx(3e-3 * 5 / 12)
    assert train(target_kl=1e-3).figures["lr"] == pytest.approx(2e-3 * 8 / 12)


def test_clipping_to_nothing_freezes_the_models(train: Any) -> None:
    """Adam divides a gradient by its size, so that clipping shows in the weights only where eps is larger: with
    |g| <= 1e-9 a step is at most lr x g / (|g| + eps), which for eps = 1e-5 is lr x 1e-4."""
    plain = {"optim": {"weight_decay": 0.0, "max_grad_norm": 0.0}}
    clipped = {"optim": {"weight_decay": 0.0, "max_grad_norm": 1e-9}}
    one = {"ppo_epochs": 1, "num_mini_batches": 1, "iteration": 0}
    free, frozen = train(**plain, **one), train(**clipped, **one)
    for i, name in enumerate(("grad_norm", "critic_grad_norm")):
        # The norm that is logged is the one before clipping; Adam's first moment is 0.1 x what it was given.
        assert frozen.figures[name] == pytest.approx(free.figures[name], rel=1e-5)
        assert free.figures[name] > 0.01
        assert 10 * norm(free.moments[i]) == pytest.approx(free.figures[name], rel=1e-4)
        assert 10 * norm(frozen.moments[i]) == pytest.approx(1e-9, rel=1e-3)
    assert largest_change(frozen) < 1.1 * 3e-3 * 1e-4
    assert largest_change(free) > 2e-3 * 0.9


def norm(tensors: dict[str, np.ndarray]) -> float:
    return float(np.sqrt(sum(np.square(t.astype(np.float64)).sum() for t in tensors.values())))


def test_what_stands_where_no_token_is_kept_plays_no_part(train: Any, usual: Trained) -> None:
    """given() puts nan there."""
    zeros = train(change="zeros_instead_of_nan")
    assert zeros.figures == usual.figures
    assert_same_weights(zeros, usual)


def test_tokens_after_the_end_play_no_part(train: Any, usual: Trained) -> None:
    """Also not in entropy and ratio; other micro-batches, so up to rounding."""
    longer = train(change="written_on_after_the_end")
    assert longer.figures == pytest.approx(usual.figures, abs=1e-5)
    assert_same_weights(longer, usual, tolerance=1e-5)


@pytest.mark.parametrize("forward_micro", [1, 12])
def test_the_ratio_is_one_before_the_first_step(run_on_ranks: Any, forward_micro: int) -> None:
    case = {"stage": 2, "forward_micro": forward_micro, "micro": 5}
    figures = run_on_ranks(1, "tests.ppo_cases:first_ratio", **case)[0]
    assert abs(figures["val/ratio"] - 1) < 1e-5
    assert 0 <= figures["policy/approxkl_avg"] < 0.5e-10  # ½ (1e-5)²
    assert abs(figures["val/ratio_var"]) < 1e-10
    assert figures["policy/clipfrac_avg"] == 0


def test_ptx_pulls_on_the_policy_only(train: Any, usual: Trained) -> None:
    with_text = train(ptx="token_mean")
    policy, critic = (
        max(float(np.abs(with_text.weights[i][n] - usual.weights[i][n]).max()) for n in usual.weights[i])
        for i in (0, 1)
    )
    assert policy > 1e-4
    assert critic == 0.0
    assert with_text.steps == usual.steps
    assert "loss/ptx" not in usual.figures
    assert with_text.figures["loss/value_avg"] == usual.figures["loss/value_avg"]


def test_bitwise_repeat(train: Any, usual: Trained) -> None:
    again = train()
    assert again.figures == usual.figures
    assert_same_weights(again, usual)


def test_no_longer_a_number(train: Any) -> None:
    with pytest.raises(RankFailed, match=r"RunFailed: optimizer step \d+: loss/policy_avg nan.*no longer a number"):
        train(change="without_a_number")
