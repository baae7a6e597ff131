"""One test per assumption about DeepSpeed's inside. A failure after an upgrade names what no longer holds.

The code that leans on them: rlhf_cli/runtime/engine.py and engine_fragments.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from rlhf_cli.runtime import engine_fragments as fragments
from rlhf_cli.runtime.distributed import Ranks, gather_objects
from rlhf_cli.runtime.engine import LEFT_BEHIND, Engine, _prepare_deepspeed, _twin, ds_config
from tests.dist_cases import DTYPES, deepspeed_config, make, one_step, tiny_llama

pytestmark = pytest.mark.distributed
ALONE = Ranks(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
HERE = "tests.test_canaries_deepspeed"


def raw_engine(model: nn.Module, stage: int, dtype: str = "fp32", **json: Any) -> Any:
    """DeepSpeed itself with plain gradient descent of rate 1: the change of a weight is minus its gradient."""
    import deepspeed as ds

    _prepare_deepspeed()
    config = {**ds_config(deepspeed_config(stage), DTYPES[dtype], max_grad_norm=0.0), **json}
    return ds.initialize(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=1.0), config=config)[0]


def master_sum(engine: Any) -> float:
    """Sum of the master weights that this rank updates."""
    return sum(float(flat.vector.detach().sum()) for flat in fragments.flats(Engine(engine, None, ALONE)))


def line(*values: float) -> nn.Module:
    model = nn.Linear(len(values), 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([values]))
    return model


# --- several backward calls, one step ---------------------------------------------------------------------------------


def accumulate(ranks: Ranks, stage: int, dtype: str) -> list[float]:
    """Sum of the weights after steps of 3, 1 and 257 backward calls."""
    engine = raw_engine(line(0.0, 0.0), stage, dtype)
    seen = []
    for inputs in ([1.0, 1.0, 1.0], [2.0], [1.0] + [2.0**-9] * 256):
        for value in inputs:
            x = torch.tensor([[value * (ranks.rank + 1), 0.0]], dtype=DTYPES[dtype])
            engine.backward(engine(x).float().sum(), scale_wrt_gas=False)
        engine.step()
        seen.append(sum(gather_objects(master_sum(engine))))
    engine.destroy()
    return seen


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_unmanaged_accumulation(run_on_ranks: Any, stage: int, dtype: str) -> None:
    """managed_gradient_accumulation=false adds up any number of backward calls, averages over ranks, clears at step.

    Mean over ranks of (1, 2) is 1.5. Sums: -3 * 1.5 = -4.5; then -2 * 1.5 more = -7.5; then -(1 + 256/512) * 1.5,
    -2.25 more = -9.75. Summed in bf16, 1.5 + 1.5/512 would stay 1.5 and the end would be -9.0.
    """
    seen = run_on_ranks(2, f"{HERE}:accumulate", stage=stage, dtype=dtype)[0]
    assert seen == [-4.5, -7.5, -9.75], (
        "gradients no longer add up in fp32 over backward calls until step(): managed_gradient_accumulation=false or"
        " data_types.grad_accum_dtype changed"
    )


def stage_0(ranks: Ranks) -> Any:
    engine = raw_engine(line(1.0, 2.0), 1, zero_optimization={"stage": 0})
    engine.backward(engine(torch.ones(1, 2)).sum(), scale_wrt_gas=False)
    engine.step()
    return engine.get_global_grad_norm()


def test_zero_0_has_no_gradient_norm(run_on_ranks: Any) -> None:
    assert run_on_ranks(1, f"{HERE}:stage_0") == [None], (
        "stage 0 in fp32 reports a gradient norm now; ds_config need not map zero0 to stage 1 for that any more"
    )


def rates(ranks: Ranks, stage: int) -> tuple[float, bool, bool]:
    engine = raw_engine(line(1.0, 2.0), stage)
    for group in engine.optimizer.param_groups:
        group["lr"] = 0.5
    engine.backward(engine(torch.ones(1, 2)).sum(), scale_wrt_gas=False)
    engine.step()
    applied = engine.was_step_applied()
    total = master_sum(engine)
    engine.backward(engine(torch.ones(1, 2)).sum() * float("inf"), scale_wrt_gas=False)
    engine.step()
    return total, applied, engine.was_step_applied()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_rate_and_skipped_steps(run_on_ranks: Any, stage: int) -> None:
    # Gradient (1, 1): 1 + 2 - 2 * 0.5 = 2.
    assert run_on_ranks(1, f"{HERE}:rates", stage=stage)[0] == (2.0, True, False), (
        "optimizer.param_groups no longer sets the rate of the next step, or was_step_applied() changed its meaning"
    )


# --- where the optimizer state is -------------------------------------------------------------------------------------


def layout(ranks: Ranks, stage: int, dtype: str) -> dict[str, Any]:
    """How the pieces of each parameter lie on the ranks, and whether reading finds what writing set."""
    engine = make(ranks, stage, dtype)
    fragments.ensure_moments(engine)
    kinds = [type(engine.inner.optimizer).__name__, type(engine.inner.optimizer.optimizer).__name__]
    parameters = fragments.trainable(engine)
    for i, parameter in enumerate(parameters.values()):
        start, end = fragments.piece_range(engine, parameter)
        for k, kind in enumerate(fragments.KINDS):
            fragments.write_piece(engine, parameter, kind, torch.arange(start, end) + 1000.0 * i + 100_000.0 * k)
    wrong = [
        (name, kind)
        for i, (name, parameter) in enumerate(parameters.items())
        for k, kind in enumerate(fragments.KINDS)
        if not torch.equal(
            fragments.whole(engine, parameter, kind),
            torch.arange(fragments.numel(parameter)) + 1000.0 * i + 100_000.0 * k,
        )
    ]
    # The vectors must hold exactly these values and alignment padding: then AdamW steps on what was written.
    state = engine.inner.optimizer.optimizer.state
    sums = [
        [float(v.detach().double().sum()) for v in (f.vector, state[f.vector]["exp_avg"])]
        for f in fragments.flats(engine)
    ]
    grouped = sorted(id(p) for f in fragments.flats(engine) for p in f.parameters)
    result = {
        "kinds": kinds,
        "wrong": wrong,
        "ranges": [fragments.piece_range(engine, p) for p in parameters.values()],
        "sums": [sum(column) for column in zip(*sums, strict=True)],
        "all_grouped": grouped == sorted(id(p) for p in parameters.values()),
    }
    engine.destroy()
    return result


@pytest.mark.parametrize(
    ("stage", "dtype", "optimizer"),
    [
        (1, "fp32", "DeepSpeedZeroOptimizer"),
        (1, "bf16", "BF16_Optimizer"),
        (2, "bf16", "DeepSpeedZeroOptimizer"),
        (3, "fp32", "DeepSpeedZeroOptimizer_Stage3"),
        (3, "bf16", "DeepSpeedZeroOptimizer_Stage3"),
    ],
)
def test_pieces_cover_every_parameter_once(run_on_ranks: Any, stage: int, dtype: str, optimizer: str) -> None:
    results = run_on_ranks(2, f"{HERE}:layout", stage=stage, dtype=dtype)
    sizes = [p.numel() for p in tiny_llama().parameters()]
    assert all(r["kinds"] == [optimizer, "AdamW"] for r in results), "another optimizer class runs this stage"
    assert all(r["wrong"] == [] for r in results), (
        "_hp_mapping (stages 1, 2) or get_local_fp32_param / set_local_hp_param (stage 3) no longer reach the state"
    )
    assert all(r["all_grouped"] for r in results), "the groups of the flat vectors no longer list the parameters"
    for size, *ranges in zip(sizes, *[r["ranges"] for r in results], strict=True):
        assert sum(end - start for start, end in ranges) == size, "pieces overlap or leave holes"
    # Sum over parameters of (0 + ... + n-1) + 1000 i n (+ 100000 n for exp_avg).
    master = sum(n * (n - 1) / 2 + 1000.0 * i * n for i, n in enumerate(sizes))
    found = [sum(column) for column in zip(*[r["sums"] for r in results], strict=True)]
    assert found == [master, master + 100_000.0 * sum(sizes)], "the flat vectors hold something else than the pieces"


def links(ranks: Ranks, stage: int, dtype: str) -> tuple[bool, bool]:
    """Moments made before the first step are those that the step updates, and the links still point to them."""
    engine = make(ranks, stage, dtype)
    fragments.ensure_moments(engine)
    state = engine.inner.optimizer.optimizer.state
    before = [state[f.vector]["exp_avg"] for f in fragments.flats(engine)]
    one_step(engine, 0, 2)
    kept = all(a is state[f.vector]["exp_avg"] for a, f in zip(before, fragments.flats(engine), strict=True))
    pieces = [fragments.read_piece(engine, p, "exp_avg") for p in fragments.trainable(engine).values()]
    spaces = {a.untyped_storage().data_ptr() for a in before}
    linked = all(p.untyped_storage().data_ptr() in spaces for p in pieces if len(p))
    engine.destroy()
    return kept, linked


@pytest.mark.parametrize(("stage", "dtype"), [(1, "fp32"), (1, "bf16"), (2, "fp32"), (3, "fp32")])
def test_moments_can_be_made_before_the_first_step(run_on_ranks: Any, stage: int, dtype: str) -> None:
    assert run_on_ranks(2, f"{HERE}:links", stage=stage, dtype=dtype) == [(True, True)] * 2, (
        "_hp_optimizer_states_linked / _lazy_init_hp_params_optimizer_state no longer link what ensure_moments makes"
    )


def persistent(ranks: Ranks) -> tuple[int, bool]:
    """Small parameters that stage 3 keeps whole: letting go of them makes the next forward gather the new values."""
    engine = make(ranks, 3)
    tokens = torch.arange(6)[None]
    one_step(engine, 0, 2)
    whole = [p for p in fragments.trainable(engine).values() if p.ds_status.name == "AVAILABLE"]
    with torch.no_grad():
        for parameter in whole:  # the norms: with weight 0 the last one makes every logit 0
            zeros = torch.zeros_like(fragments.read_piece(engine, parameter, fragments.MASTER))
            fragments.write_piece(engine, parameter, fragments.MASTER, zeros)
            fragments.round_weights(engine, parameter)
        logits = engine.forward(input_ids=tokens).logits
    engine.destroy()
    return len(whole), bool((logits == 0).all())


def test_stale_whole_parameters_are_dropped(run_on_ranks: Any) -> None:
    for whole, all_zero in run_on_ranks(2, f"{HERE}:persistent"):
        assert whole == 5, "stage 3 no longer keeps small parameters whole after a step; this canary checks nothing"
        assert all_zero, "parameter.partition() no longer drops old values: an imported state would be half used"


def in_flight(ranks: Ranks) -> tuple[int, int, bool]:
    """Weights on their way after a forward pass without a backward, and after the cleaning; whether the trace stays."""
    engine = make(ranks, 3)
    for step in range(2):
        one_step(engine, step, 2)
    coordinator = engine.inner.optimizer.parameter_offload.get_param_coordinator()

    def count() -> int:
        return sum(p.ds_status.name == "INFLIGHT" for p in engine.module.parameters())

    with torch.no_grad():
        engine.inner(input_ids=torch.arange(6)[None])
    before = count()
    coordinator._clean_inflight_param_registry()
    result = before, count(), coordinator.is_complete_trace()
    engine.destroy()
    return result


def test_a_forward_alone_leaves_weights_on_their_way(run_on_ranks: Any) -> None:
    for before, after, traced in run_on_ranks(2, f"{HERE}:in_flight"):
        assert before > 0, (
            "stage 3 no longer gathers ahead for a backward pass that may not come; forward need not clean"
        )
        assert after == 0, "_clean_inflight_param_registry no longer waits for what is on its way"
        assert traced, "cleaning throws the trace away: every evaluation would slow the training after it down"


# --- models -----------------------------------------------------------------------------------------------------------


def hooks(ranks: Ranks) -> tuple[int, int, bool, bool]:
    model = tiny_llama()
    twin = _twin(model)
    identities = [id(p) for p in model.parameters()]
    engine = make(ranks, 3, "bf16", model=model)

    def count(module: nn.Module) -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())

    result = (
        count(engine.module),
        count(twin),
        identities == [id(p) for p in engine.module.parameters()],
        identities == [id(p) for p in twin.parameters()],
    )
    engine.destroy()
    return result


def test_twin_has_no_hooks_and_the_same_parameters(run_on_ranks: Any) -> None:
    own, twins, same_model, same_twin = run_on_ranks(2, f"{HERE}:hooks")[0]
    assert own > 0, "stage 3 no longer works by module hooks; gathered_for_generation needs no twin"
    assert twins == 0, "the twin got hooks: it would gather layer by layer"
    assert same_model, "DeepSpeed replaced Parameter objects; the twin would keep the old ones"
    assert same_twin, "the twin has parameters of its own"


def left_behind(ranks: Ranks, stage: int) -> tuple[int, list[str]]:
    """What DeepSpeed's own destroy leaves on a model: hooks, and attributes by name."""
    engine = make(ranks, stage)
    one_step(engine, 0, 2)
    model = engine.module
    engine.inner.destroy()
    owners: list[Any] = [*model.modules(), *model.parameters()]
    names = {name for owner in owners for name in LEFT_BEHIND if name in vars(owner)}
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()), sorted(names)


def test_deepspeed_does_not_let_go_of_a_model(run_on_ranks: Any) -> None:
    found = [run_on_ranks(1, f"{HERE}:left_behind", stage=stage)[0] for stage in (2, 3)]
    assert [hooks for hooks, _ in found] == [2, 2], "DeepSpeedEngine.destroy() has other hooks to be removed after it"
    assert [names for _, names in found] == [[], sorted(LEFT_BEHIND)], (
        "ZeRO-3 keeps other things on modules and parameters; Engine.destroy may leave the old engine in memory"
    )


def sharded_then_grown(ranks: Ranks, dtype: str) -> list[float]:
    """Values of a layer that differs between ranks, added to a model made under zero.Init as PEFT adds adapters."""
    import deepspeed as ds

    _prepare_deepspeed()
    with ds.zero.Init(config_dict_or_path=ds_config(deepspeed_config(3), DTYPES[dtype], 0.0)):
        first = nn.Linear(30, 30)
    grown = nn.Linear(30, 1, bias=False)
    nn.init.constant_(grown.weight, float(ranks.rank + 1))
    model = nn.Sequential(first, grown)
    if dtype == "bf16":
        with pytest.raises(AssertionError):  # one flat buffer of two dtypes
            raw_engine(model, 3, dtype)
        return []
    engine = raw_engine(model, 3, dtype)
    with ds.zero.GatheredParameters([grown.weight]):
        values = sorted({float(v) for v in grown.weight.flatten()})
    engine.destroy()
    return values


def test_layers_added_to_a_sharded_model(run_on_ranks: Any) -> None:
    assert run_on_ranks(2, f"{HERE}:sharded_then_grown", dtype="fp32") == [[1.0], [1.0]], (
        "rank 0's values of parameters added after zero.Init no longer reach the others; broadcast them in make_engine"
    )
    assert run_on_ranks(2, f"{HERE}:sharded_then_grown", dtype="bf16") == [[], []], (
        "DeepSpeed casts parameters added after zero.Init now; _finish_sharded_model need not"
    )


def built_under_zero_init(ranks: Ranks) -> float:
    import deepspeed as ds

    _prepare_deepspeed()
    plain = {name: p.detach().clone() for name, p in tiny_llama().named_parameters()}
    with ds.zero.Init(config_dict_or_path=ds_config(deepspeed_config(3), torch.float32, 0.0)):
        model = tiny_llama()
    worst = 0.0
    for name, parameter in model.named_parameters():
        with ds.zero.GatheredParameters([parameter]):
            worst = max(worst, float((parameter - plain[name]).abs().max()))
    return worst


def test_zero_init_spoils_random_weights(run_on_ranks: Any) -> None:
    assert run_on_ranks(2, f"{HERE}:built_under_zero_init")[0] > 0.1, (
        "models built under zero.Init get their own initialisation now; models from scratch could be built sharded"
    )


def scaler(ranks: Ranks) -> dict[str, Any]:
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    loss_scaler = DynamicLossScaler(8, 2.0, 3, 1, 2, False)
    loss_scaler.update_scale(True)
    return {key: value for key, value in vars(loss_scaler).items() if isinstance(value, int | float)}


def test_loss_scaler_is_plain_numbers(run_on_ranks: Any) -> None:
    state = run_on_ranks(1, f"{HERE}:scaler")[0]
    assert {"cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis"} <= state.keys(), (
        "DynamicLossScaler keeps its state elsewhere; loss_scaler_state would miss it"
    )


def operator(ranks: Ranks) -> bool:
    from deepspeed import comm

    make(ranks, 1).destroy()
    return comm.comm.cdb.shm_comm_op is None


def test_no_operator_is_compiled(run_on_ranks: Any) -> None:
    assert run_on_ranks(2, f"{HERE}:operator") == [True, True], (
        "DeepSpeed no longer asks ops.__compatible_ops__ before it builds its shared-memory operator"
    )


def test_bucket_of_gradients_is_no_larger_than_they_are(run_on_ranks: Any) -> None:
    for stage in (2, 3):
        sizes = run_on_ranks(1, "tests.dist_cases:bucket_sizes", stage=stage)[0]
        assert sizes == [sum(p.numel() for p in tiny_llama().parameters()), 100]
