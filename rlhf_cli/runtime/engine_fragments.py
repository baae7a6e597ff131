"""Which rank holds which piece of the optimizer state, and how to read and set it: DeepSpeed's inside.

The optimizer of each ZeRO stage flattens the parameters of a group into one fp32 vector and gives every rank a piece.
A *piece* of a parameter is what this rank updates of it: elements [start, end) of the flattened parameter, each element
on exactly one rank. kind is one of KINDS. Each assumption made here has its canary in tests/test_canaries_deepspeed.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from rlhf_cli.runtime.engine import Engine

MASTER = "master"
KINDS = (MASTER, "exp_avg", "exp_avg_sq")


class Flat(NamedTuple):
    """One flat fp32 vector that AdamW updates on this rank, and the parameters whose pieces it holds."""

    vector: torch.Tensor
    parameters: list[Any]


def trainable(engine: Engine) -> dict[str, Any]:
    """The trainable parameters by name, in the same order on every rank."""
    return {name: p for name, p in engine.module.named_parameters() if p.requires_grad}


def shape(parameter: Any) -> torch.Size:
    """The true shape: under ZeRO-3 the parameter is an empty placeholder and carries it beside."""
    return getattr(parameter, "ds_shape", parameter.shape)


def numel(parameter: Any) -> int:
    """The true number of elements."""
    return shape(parameter).numel()


def flats(engine: Engine) -> list[Flat]:
    """The vectors of this rank. A group of parameters has one, or several under stage 3 (sub-groups)."""
    optimizer = engine.inner.optimizer
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        vectors, groups = optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups
    elif isinstance(optimizer, BF16_Optimizer):  # stage 1 in bf16
        vectors, groups = optimizer.fp32_groups_flat_partition, optimizer.bf16_groups
    else:
        assert isinstance(optimizer, DeepSpeedZeroOptimizer), f"unknown optimizer {type(optimizer).__name__}"
        vectors, groups = optimizer.single_partition_of_fp32_groups, optimizer.bit16_groups
    return [Flat(vector, list(group)) for vector, group in zip(vectors, groups, strict=True)]


def ensure_moments(engine: Engine) -> None:
    """Create Adam's state where no step has done so yet, with the zeros that AdamW would start from."""
    optimizer = engine.inner.optimizer
    fused = optimizer.optimizer.defaults["fused"]
    for vector, _ in flats(engine):
        state = optimizer.optimizer.state[vector]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=vector.device if fused else "cpu")
            state["exp_avg"] = torch.zeros_like(vector)
            state["exp_avg_sq"] = torch.zeros_like(vector)
    if engine.zero_stage < 3:
        # Stages 1 and 2 find a parameter's moments through links into the vectors, made once after the first step.
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()


def adam_steps(engine: Engine) -> dict[str, int]:
    """Adam's step count of each trainable parameter."""
    ensure_moments(engine)
    names = {id(p): name for name, p in trainable(engine).items()}
    state = engine.inner.optimizer.optimizer.state
    return {names[id(p)]: int(state[flat.vector]["step"]) for flat in flats(engine) for p in flat.parameters}


def set_adam_steps(engine: Engine, steps: dict[str, int]) -> None:
    """Set the step counts; parameters that steps does not name start from 0. One count per group of parameters."""
    names = {id(p): name for name, p in trainable(engine).items()}
    for flat in flats(engine):
        counts = {steps.get(names[id(p)], 0) for p in flat.parameters}
        assert len(counts) == 1, f"one group with step counts {sorted(counts)}; pass steps to param_groups"
        engine.inner.optimizer.optimizer.state[flat.vector]["step"].fill_(counts.pop())


def piece_range(engine: Engine, parameter: Any) -> tuple[int, int]:
    """(start, end) of this rank's piece; equal when it has none."""
    if engine.zero_stage == 3:
        size = parameter.ds_tensor.numel()
        start = min(size * engine.ranks.rank, numel(parameter))
        return start, min(start + size, numel(parameter))
    if parameter._hp_mapping is None:
        return 0, 0
    address = parameter._hp_mapping.lp_fragment_address
    return address.start, address.start + address.numel


def read_piece(engine: Engine, parameter: Any, kind: str) -> torch.Tensor:
    """This rank's piece: (end - start,) fp32."""
    start, end = piece_range(engine, parameter)
    key = None if kind == MASTER else kind
    if engine.zero_stage == 3:
        return engine.inner.optimizer.get_local_fp32_param(parameter, key)[: end - start].detach()
    if end == start:
        return torch.empty(0, dtype=torch.float32, device=parameter.device)
    return parameter._hp_mapping.get_hp_fragment(key).detach()


def write_piece(engine: Engine, parameter: Any, kind: str, values: torch.Tensor) -> None:
    """Set this rank's piece to values (end - start,)."""
    key = None if kind == MASTER else kind
    if engine.zero_stage == 3:
        # The call wants the whole slice; the last ranks' slices end in padding.
        padded = torch.zeros(parameter.ds_tensor.numel(), dtype=torch.float32, device=values.device)
        padded[: len(values)] = values
        engine.inner.optimizer.set_local_hp_param(padded, parameter, key)
    elif len(values):
        parameter._hp_mapping.get_hp_fragment(key).data.copy_(values)


def whole(engine: Engine, parameter: Any, kind: str) -> torch.Tensor:
    """All ranks' pieces put together, on every rank: (numel,) fp32 on the device. All ranks call it."""
    return put_together(engine, parameter, read_piece(engine, parameter, kind))


def put_together(engine: Engine, parameter: Any, piece: torch.Tensor) -> torch.Tensor:
    """The whole of something of which every rank has the elements of its piece: piece (end - start,) fp32 -> (numel,)
    on every rank's device. All ranks call it."""
    start, end = piece_range(engine, parameter)
    bits = torch.zeros(numel(parameter), dtype=torch.int32, device=engine.ranks.device)
    bits[start:end] = piece.to(bits.device).contiguous().view(torch.int32)
    # Each element lives on one rank, the others add zero bits: a sum that is exact for every float, -0.0 included.
    dist.all_reduce(bits, op=dist.ReduceOp.SUM)
    return bits.view(torch.float32)


def weights_piece(engine: Engine, parameter: Any) -> torch.Tensor:
    """This rank's piece of the weights that the forward pass uses: (end - start,) in the model's dtype."""
    start, end = piece_range(engine, parameter)
    if engine.zero_stage == 3:
        return parameter.ds_tensor.data[: end - start]
    return parameter.data.view(-1)[start:end]


def round_weights(engine: Engine, parameter: Any) -> None:
    """Make the weights of the forward pass from the master weights, as a step does. All ranks call it."""
    if engine.zero_stage < 3:
        parameter.data.copy_(whole(engine, parameter, MASTER).view(parameter.shape))
        return
    if parameter.ds_status == ZeroParamStatus.AVAILABLE:
        parameter.partition([parameter])  # small parameters stay gathered; let go of the old values
    weights_piece(engine, parameter).copy_(read_piece(engine, parameter, MASTER))


def loss_scaler_state(engine: Engine) -> dict[str, Any]:
    """The numbers of fp16's dynamic loss scaler; empty where there is none."""
    scaler = _dynamic_scaler(engine)
    return {} if scaler is None else {k: v for k, v in vars(scaler).items() if isinstance(v, int | float)}


def set_loss_scaler_state(engine: Engine, state: dict[str, Any]) -> None:
    """Put the loss scaler back to loss_scaler_state. Without one on either side, as between bf16 and fp16, nothing."""
    scaler = _dynamic_scaler(engine)
    if scaler is not None:
        vars(scaler).update(state)


def _dynamic_scaler(engine: Engine) -> Any | None:
    scaler = getattr(engine.inner.optimizer, "loss_scaler", None)
    return scaler if scaler is not None and scaler.dynamic else None
