"""The engine trains as plain PyTorch does, on any number of ranks and at any ZeRO stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deepspeed.accelerator import get_accelerator

from rlhf_cli.errors import ConfigError, ModelError
from rlhf_cli.runtime import engine as engines
from rlhf_cli.runtime.distributed import Ranks
from rlhf_cli.runtime.engine import make_engine, param_groups
from rlhf_cli.schema import DeepspeedConfig, OptimConfig, build
from tests.dist_cases import SMALL_STAGE_3, tiny_llama, train_plain
from tests.ppo_models import ppo_config, write_adapter_run, write_policy_run

pytestmark = pytest.mark.distributed
LAYOUTS = [(1, 0, 8), (1, 1, 2), (1, 2, 1), (1, 3, 2), (2, 0, 2), (2, 1, 1), (2, 2, 1), (2, 2, 4), (2, 3, 2), (2, 3, 4)]


@pytest.fixture(scope="module")
def plain() -> Any:
    return train_plain()


@pytest.fixture(scope="module")
def saved_llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("llama")
    tiny_llama().save_pretrained(directory)
    return str(directory)


def assert_same_training(result: Any, reference: Any, tolerance: float) -> None:
    for own, other in zip(result[:2], reference[:2], strict=True):
        assert np.allclose(own, other, rtol=0, atol=tolerance), (own, other)
    assert result[2].keys() == reference[2].keys()
    for name, weight in reference[2].items():
        assert np.abs(result[2][name] - weight).max() < tolerance, name


def test_plain_training_moves(plain: Any) -> None:
    start = tiny_llama().state_dict()
    assert all(np.abs(weight - start[name].numpy()).max() > 1e-3 for name, weight in plain[2].items())
    assert sum(norm > 1.0 for norm in plain[1]) >= 3  # clipping takes part


@pytest.mark.parametrize(("world", "stage", "micro"), LAYOUTS)
def test_fp32_equals_plain_torch(run_on_ranks: Any, plain: Any, world: int, stage: int, micro: int) -> None:
    results = run_on_ranks(world, "tests.dist_cases:train", stage=stage, micro=micro)
    assert_same_training(results[0], plain, 1e-5)
    assert all(result[:2] == results[0][:2] for result in results)
    assert all(result[2] == {} for result in results[1:])  # whole weights on rank 0 only


@pytest.mark.parametrize(("world", "stage", "micro"), [(1, 3, 1), (2, 0, 2), (2, 2, 4), (2, 3, 1)])
def test_bf16_agrees(run_on_ranks: Any, world: int, stage: int, micro: int) -> None:
    # Rounding shows most with large weights and rates (Adam's first steps follow the sign of a gradient, which turns
    # around for tiny ones): weights of an ordinary size and a rate of 3e-3.
    case = {"dtype": "bf16", "spread": 0.05, "rate": 0.3}
    one = run_on_ranks(1, "tests.dist_cases:train", stage=2, micro=8, **case)[0]
    still = run_on_ranks(1, "tests.dist_cases:train", stage=2, micro=8, **{**case, "rate": 0.0})[0]
    other = run_on_ranks(world, "tests.dist_cases:train", stage=stage, micro=micro, **case)[0]
    assert np.abs(np.subtract(still[0], one[0])).max() > 1e-2  # the training changes more than the tolerance
    assert np.allclose(one[0], other[0], rtol=0, atol=1e-3)


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("option", ["offload", "recompute"])
def test_options_change_no_number(run_on_ranks: Any, plain: Any, stage: int, option: str) -> None:
    result = run_on_ranks(2, "tests.dist_cases:train", stage=stage, **{option: True})[0]
    assert_same_training(result, plain, 1e-5)


@pytest.mark.parametrize("stage", [1, 3])
def test_clipping(run_on_ranks: Any, plain: Any, stage: int) -> None:
    # Adam divides by the size of the gradient, so clipping shows only where eps outweighs it: |g| <= 1e-9 and
    # eps = 1 move a weight by at most lr * 1e-9 a step.
    frozen = run_on_ranks(
        2, "tests.dist_cases:train", stage=stage, steps=2, max_grad_norm=1e-9, eps=1.0, weight_decay=0.0
    )[0]
    start = tiny_llama().state_dict()
    assert all(np.array_equal(weight, start[name].numpy()) for name, weight in frozen[2].items())
    assert frozen[1][0] == pytest.approx(plain[1][0], abs=1e-5)  # the norm is the one before clipping
    unclipped = run_on_ranks(2, "tests.dist_cases:train", stage=stage, steps=3, max_grad_norm=0.0)[0]
    assert_same_training(unclipped, train_plain(steps=3, max_grad_norm=0.0), 1e-5)


@pytest.mark.parametrize(
    ("world", "stage", "dtype"), [(1, 2, "fp32"), (2, 1, "fp32"), (2, 1, "bf16"), (2, 3, "fp32"), (2, 3, "bf16")]
)
def test_broken_gradient_changes_nothing(run_on_ranks: Any, world: int, stage: int, dtype: str) -> None:
    good = run_on_ranks(world, "tests.dist_cases:train", stage=stage, dtype=dtype, steps=1)[0]
    results = run_on_ranks(world, "tests.dist_cases:broken_step", stage=stage, dtype=dtype)
    for norm, skipped, unchanged, good_loss, good_norm, skipped_again in results:
        assert norm == float("inf")
        assert skipped
        assert unchanged
        assert not skipped_again
        assert (good_loss, good_norm) == (good[0][0], good[1][0])  # nothing of the broken step is left


@pytest.mark.parametrize(("world", "stage"), [(1, 3), (2, 2), (2, 3)])
def test_random_weights_do_not_depend_on_the_layout(run_on_ranks: Any, world: int, stage: int) -> None:
    weights = run_on_ranks(world, "tests.dist_cases:initial_weights", stage=stage)[0]
    assert all(np.array_equal(weights[name], weight.numpy()) for name, weight in tiny_llama().state_dict().items())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_sharded_loading(run_on_ranks: Any, saved_llama: str, dtype: str) -> None:
    case = {"dtype": dtype, "model_dir": saved_llama}
    whole = run_on_ranks(2, "tests.dist_cases:load_and_train", stage=2, **case)[0]
    sharded = run_on_ranks(2, "tests.dist_cases:load_and_train", stage=3, **case)[0]
    assert (whole[3], sharded[3]) == (False, True)
    assert np.allclose(whole[0], sharded[0], rtol=0, atol=1e-6)
    assert whole[2].keys() == sharded[2].keys()
    for name, (buffer_dtype, values) in whole[2].items():
        assert sharded[2][name][0] == buffer_dtype  # rotary frequencies stay fp32
        assert np.array_equal(sharded[2][name][1], values)


@pytest.mark.parametrize(("stage", "loaded"), [(2, False), (3, False), (3, True)])
def test_lora_trains_and_exports_the_adapter(run_on_ranks: Any, saved_llama: str, stage: int, loaded: bool) -> None:
    before, adapter, changed, dtypes = run_on_ranks(
        2, "tests.dist_cases:lora", stage=stage, model_dir=saved_llama if loaded else None
    )[0]
    reference = run_on_ranks(1, "tests.dist_cases:lora", stage=2)[0]
    # 2 layers x (q_proj, down_proj) x (A, B) = 8
    assert len(adapter) == 8
    assert dtypes == ["torch.float32"]
    assert sorted(adapter) == changed == sorted(n for n in before if "lora_" in n)
    assert all(np.abs(adapter[name] - reference[1][name]).max() < 1e-5 for name in adapter)


def test_lora_in_bf16_on_a_sharded_base(run_on_ranks: Any, saved_llama: str) -> None:
    case = {"dtype": "bf16", "model_dir": saved_llama}
    whole = run_on_ranks(2, "tests.dist_cases:lora", stage=2, **case)[0]
    sharded = run_on_ranks(2, "tests.dist_cases:lora", stage=3, **case)[0]
    assert whole[3] == sharded[3] == ["torch.bfloat16"]
    assert len(sharded[1]) == 8
    assert sharded[2] == sorted(sharded[1])
    assert all(np.abs(sharded[1][name] - whole[1][name]).max() < 1e-2 for name in whole[1])  # two steps of 1e-2, 3e-3


@pytest.mark.parametrize("stage", [1, 3])
def test_tied_embeddings_keep_both_names(run_on_ranks: Any, stage: int) -> None:
    (names, same), (other_names, _) = run_on_ranks(2, "tests.dist_cases:tied", stage=stage)
    assert names == sorted(tiny_llama(tied=True).state_dict())
    assert same
    assert other_names == []


@pytest.mark.parametrize("stage", [2, 3])
def test_generation_context(run_on_ranks: Any, plain: Any, stage: int) -> None:
    for rank, result in enumerate(run_on_ranks(2, "tests.dist_cases:generate", stage=stage)):
        inside, hooked, text, still_training, loss, norm = result
        assert np.array_equal(inside, hooked)
        assert len(text[0]) == 3 + 2 + 4 * rank
        assert still_training
        assert (loss, norm) == (pytest.approx(plain[0][1], abs=1e-5), pytest.approx(plain[1][1], abs=1e-5))


@pytest.mark.parametrize(("world", "stage"), [(1, 3), (2, 2), (2, 3)])
def test_reading_between_steps_changes_nothing(run_on_ranks: Any, world: int, stage: int) -> None:
    """Under ZeRO-3 a forward without a backward leaves weights on their way that nobody waits for."""
    undisturbed = run_on_ranks(world, "tests.dist_cases:train", stage=stage)[0]
    results = run_on_ranks(world, "tests.dist_cases:train_and_read", stage=stage)
    assert all(result[3] for result in results)
    assert results[0][:2] == undisturbed[:2]
    assert all(np.array_equal(results[0][2][name], weight) for name, weight in undisturbed[2].items())


def test_engines_over_one_base_read_in_turns(run_on_ranks: Any, tmp_path: Path) -> None:
    """PPO's hydra under ZeRO-3: weights that one engine gathers ahead are the other one's, too."""
    policy = write_policy_run(tmp_path / "sft")
    adapter = write_adapter_run(tmp_path / "rm", policy)
    found = {}
    for name, more in (("whole", {}), ("ahead", SMALL_STAGE_3)):
        config = ppo_config(policy, [{"path": str(adapter)}], 3, lora={"enabled": True, "r": 2}, sharing="hydra")
        config.deepspeed.json["zero_optimization"] |= more
        case = {"run_dir": str(tmp_path / name), "config": config, "steps": 3}
        _, weights, readings = run_on_ranks(2, "tests.ppo_model_cases:open_train_read", **case)[0]
        found[name] = weights["policy"] | weights["critic"] | readings
    assert found["whole"].keys() == found["ahead"].keys()
    assert all(np.array_equal(found["whole"][key], found["ahead"][key]) for key in found["whole"])


def test_param_groups() -> None:
    model = tiny_llama()
    model.model.layers[1].requires_grad_(False)
    names = {id(p): n for n, p in model.named_parameters()}
    matrices, vectors = param_groups(model, 0.1)
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.1, 0.0)
    assert [names[id(p)] for p in vectors["params"]] == [
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.post_attention_layernorm.weight",
        "model.norm.weight",
    ]
    assert len(matrices["params"]) == 7 + 2  # seven projections of block 0, embeddings, head
    older = param_groups(model, 0.1, steps={"lm_head.weight": 20, "model.norm.weight": 20})
    assert [len(g["params"]) for g in older] == [8, 1, 2, 1]
    assert [names[id(p)] for p in older[1]["params"]] == ["lm_head.weight"]


def test_ds_config_passes_through_and_owns() -> None:
    user = DeepspeedConfig(json={"zero_optimization": {"stage": 0, "reduce_bucket_size": 7}, "steps_per_print": 3})
    config = engines.ds_config(user, torch.bfloat16, max_grad_norm=0.5)
    assert config["zero_optimization"] == {"stage": 1, "reduce_bucket_size": 7}
    assert config["steps_per_print"] == 3
    assert (config["bf16"], config["fp16"]) == ({"enabled": True}, {"enabled": False})
    assert config["gradient_clipping"] == 0.5
    assert user.json["zero_optimization"]["stage"] == 0
    derived = config.keys() - user.json.keys()
    assert derived <= set(DeepspeedConfig.OWNED)  # whatever we set, the schema refuses from the user


OFFLOAD = {"offload_optimizer": {"device": "cpu"}}


@pytest.mark.parametrize(
    ("world_size", "dtype", "zero", "stage"),
    [
        (1, torch.float32, {"stage": 2, "overlap_comm": True}, 1),
        (1, torch.bfloat16, {"stage": 2}, 2),
        (1, torch.float32, {"stage": 2, **OFFLOAD}, 2),
        (1, torch.float32, {"stage": 3}, 3),
        (2, torch.float32, {"stage": 2}, 2),
    ],
)
def test_one_rank_in_fp32_divides_no_gradients(
    world_size: int, dtype: torch.dtype, zero: dict[str, Any], stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Asked(Exception):
        pass

    def initialize(config: dict[str, Any], **_: Any) -> None:
        raise Asked(config["zero_optimization"]["stage"], bool(config["zero_optimization"].get("overlap_comm")))

    monkeypatch.setattr(engines, "barrier", lambda: None)
    monkeypatch.setattr(engines.ds, "initialize", initialize)
    model = torch.nn.Linear(2, 2)
    ranks = Ranks(0, world_size, 0, torch.device("cpu"))
    deepspeed = DeepspeedConfig(json={"zero_optimization": zero})
    with pytest.raises(Asked) as asked:
        make_engine(model, param_groups(model, 0.0), OptimConfig(), deepspeed, dtype, ranks)
    assert asked.value.args == (stage, False)


def test_ranks_meet_before_deepspeed_has_them_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own groups have NCCL's default timeout, and ranks load a model at different speeds."""

    class Met(Exception):
        pass

    def meet() -> None:
        raise Met

    monkeypatch.setattr(engines, "barrier", meet)
    monkeypatch.setattr(engines.ds, "initialize", lambda **_: pytest.fail("not all ranks are here"))
    model = torch.nn.Linear(2, 2)
    ranks = Ranks(0, 2, 0, torch.device("cpu"))
    with pytest.raises(Met):
        make_engine(model, param_groups(model, 0.0), OptimConfig(), DeepspeedConfig(), torch.float32, ranks)


@pytest.mark.parametrize(
    ("zero", "key"),
    [
        ({"stage": 3, "offload_param": {"device": "nvme"}}, "offload_param.device"),
        ({"stage": 2, "offload_optimizer": {"device": "nvme"}}, "offload_optimizer.device"),
        ({"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}, "offload_optimizer"),
        ({"stage": 2, "zenflow": {"topk_ratio": 0.1}}, "zenflow"),
        ({"stage": 1, "overlap_comm": True}, "overlap_comm"),
    ],
)
def test_schema_refuses_what_the_engine_cannot_do(zero: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(DeepspeedConfig, {"json": {"zero_optimization": zero}})
    assert [p.key for p in caught.value.problems] == [f"json.zero_optimization.{key}"]


@pytest.mark.skipif(get_accelerator().is_fp16_supported(), reason="this device has fp16")
def test_fp16_without_hardware_is_the_users_error(run_on_ranks: Any) -> None:
    message = run_on_ranks(1, "tests.test_engine:make_fp16")[0]
    assert message == "model.dtype: fp16 does not run on this cpu; use bf16 or fp32"


def make_fp16(ranks: Any) -> str:
    from tests.dist_cases import make

    with pytest.raises(ModelError) as caught:
        make(ranks, 2, "fp16")
    return str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_four_ranks(run_on_ranks: Any, plain: Any, stage: int) -> None:
    assert_same_training(run_on_ranks(4, "tests.dist_cases:train", stage=stage)[0], plain, 1e-5)


@pytest.mark.slow
def test_eight_ranks_bf16(run_on_ranks: Any) -> None:
    one = run_on_ranks(1, "tests.dist_cases:train", stage=2, dtype="bf16", micro=8, rate=0.3, spread=0.05)[0]
    eight = run_on_ranks(8, "tests.dist_cases:train", stage=3, dtype="bf16", micro=1, rate=0.3, spread=0.05)[0]
    assert np.allclose(one[0], eight[0], rtol=0, atol=2e-3)
