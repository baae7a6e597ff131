"""The DeepSpeed engine behind a small face: forward, backward, step, and whole weights on demand.

Only this file and engine_fragments.py import deepspeed. What they assume about its inside is checked one by one in
tests/test_canaries_deepspeed.py.
"""

from __future__ import annotations

import copy
import gc
import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import deepspeed as ds
import torch
from deepspeed.accelerator import get_accelerator
from torch import nn

from rlhf_cli.errors import ModelError
from rlhf_cli.runtime.distributed import Ranks, barrier
from rlhf_cli.schema import DeepspeedConfig, OptimConfig

DEFAULT_BUCKET = 500_000_000  # DeepSpeed's reduce_bucket_size, in elements
LEFT_BEHIND = ("pre_bwd_fn", "post_bwd_fn", "_z3_optimizer")  # by ZeRO-3, on modules and parameters


class Engine:
    """A model under training, sharded as its ZeRO stage says. Made by make_engine.

    Every rank must call forward, backward and step equally often, or all of them wait for each other.
    """

    def __init__(self, inner: Any, twin: nn.Module | None, ranks: Ranks):
        self.inner = inner
        self.ranks = ranks
        self.skipped = False  # whether the last step left the weights alone, because its gradient was not finite
        self._twin = twin

    @property
    def module(self) -> nn.Module:
        """The model that was passed in. Under ZeRO-3 its parameters are placeholders outside of a forward pass."""
        return self.inner.module

    @property
    def zero_stage(self) -> int:
        """The ZeRO stage that runs: 1, 2 or 3."""
        return int(self.inner.zero_optimization_stage())

    @property
    def scales_loss(self) -> bool:
        """Whether a step with an infinite gradient is the fp16 loss scaler at work, and no failure."""
        return bool(self.inner.fp16_enabled())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model."""
        output = self.inner(*args, **kwargs)
        if self.zero_stage == 3 and not torch.is_grad_enabled():
            # It has begun to gather weights for a backward pass, which does not come: nobody could read or save them.
            self.inner.optimizer.parameter_offload.get_param_coordinator()._clean_inflight_param_registry()
        return output

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of loss () to what has gathered since the last step.

        loss: this rank's share of a sum over the global batch (token losses / number of tokens of ALL ranks). Any
        number of backward calls may come before a step, as long as it is the same on every rank. Every trainable
        parameter has to take part in the first one.
        """
        # DeepSpeed averages over ranks, and a share of a sum wants adding up.
        self.inner.backward(loss * self.ranks.world_size, scale_wrt_gas=False)

    def step(self, lr: float) -> float:
        """Clip, update every parameter with this learning rate, and clear the gradient.

        Returns the norm of the global gradient before clipping: infinite if the gradient was not finite, in which case
        nothing was changed and `skipped` is set. With fp16 that is the loss scaler at work; otherwise something broke.
        """
        for group in self.inner.optimizer.param_groups:
            group["lr"] = lr
        self.inner.step()
        self.skipped = not self.inner.was_step_applied()
        return float("inf") if self.skipped else float(self.inner.get_global_grad_norm())

    def train(self) -> None:
        """Training mode: dropout on."""
        self.module.train()

    def eval(self) -> None:
        """Evaluation mode: dropout off."""
        self.module.eval()

    def destroy(self) -> None:
        """Take DeepSpeed off the model, which stays usable for another make_engine (with ZeRO-3: sharded).

        Master weights and moments are given back, whoever still holds this engine; nothing can be done with it.
        """
        inner, model = self.inner, self.module
        self.inner = self._twin = None
        inner.destroy()
        # What it leaves on the model would keep all of it alive, and have the next engine's backward pass run by it.
        inner.module_forward_pre_hook.remove()
        inner.module_forward_post_hook.remove()
        for owner in [*model.modules(), *model.parameters()]:
            for name in LEFT_BEHIND:
                vars(owner).pop(name, None)
        del inner
        gc.collect()
        if self.ranks.device.type == "cuda":
            torch.cuda.empty_cache()


def param_groups(model: nn.Module, weight_decay: float, steps: Mapping[str, int] | None = None) -> list[dict[str, Any]]:
    """The trainable parameters as AdamW groups: matrices decay; biases and norms (fewer than two dimensions) do not.

    steps: Adam steps that parameters bring along by name (see engine_state); others count from 0. DeepSpeed keeps one
    step count per group, so each count gets groups of its own.
    """
    groups: dict[tuple[bool, int], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # Under ZeRO-3 the placeholder has no shape; DeepSpeed keeps the true one in ds_shape.
            decays = len(getattr(parameter, "ds_shape", parameter.shape)) >= 2
            groups.setdefault((decays, (steps or {}).get(name, 0)), []).append(parameter)
    return [
        {"params": groups[key], "weight_decay": weight_decay if key[0] else 0.0}
        for key in sorted(groups, key=lambda key: (not key[0], key[1]))
    ]


def make_engine(
    model: nn.Module,
    groups: list[dict[str, Any]],
    optim: OptimConfig,
    deepspeed: DeepspeedConfig,
    dtype: torch.dtype,
    ranks: Ranks,
) -> Engine:
    """Put a model under DeepSpeed with AdamW over groups (from param_groups).

    Weights are the same on every rank afterwards (rank 0's count). A model made at random should be made in full on
    every rank, without deepspeed.zero.Init: that shards modules while they are being built, before the model's own
    initialisation reaches them. In low precision the optimizer keeps fp32 master weights and sums gradients in fp32.
    Raises ModelError for fp16 where the device has none (most CPUs).
    """
    assert groups, "no parameter is trainable"
    if dtype == torch.float16 and not get_accelerator().is_fp16_supported():
        raise ModelError(f"model.dtype: fp16 does not run on this {ranks.device.type}; use bf16 or fp32")
    _prepare_deepspeed()
    config = ds_config(deepspeed, dtype, optim.max_grad_norm)
    if ranks.world_size == 1:
        _undivided(config["zero_optimization"], dtype)
    _fit_bucket(config["zero_optimization"], groups)
    if any(hasattr(p, "ds_id") for p in model.parameters()):
        _finish_sharded_model(model, dtype, ranks)
    twin = _twin(model) if config["zero_optimization"]["stage"] == 3 else None
    optimizer = torch.optim.AdamW(
        groups, lr=optim.lr, betas=(optim.betas[0], optim.betas[1]), eps=optim.eps, fused=ranks.device.type == "cuda"
    )
    barrier()  # ranks load at different speeds, and DeepSpeed's own groups wait no longer than NCCL's default
    inner, *_ = ds.initialize(model=model, optimizer=optimizer, config=config)
    if twin is not None:
        # Parameters are shared; buffers are not, and DeepSpeed moved only the model's own to the device.
        move_buffers(twin, ranks.device)
    return Engine(inner, twin, ranks)


def ds_config(deepspeed: DeepspeedConfig, dtype: torch.dtype, max_grad_norm: float) -> dict[str, Any]:
    """DeepSpeed's JSON: the user's, plus what this program owns (schema: DeepspeedConfig.OWNED)."""
    zero = dict(deepspeed.json.get("zero_optimization") or {})
    # Plain data parallelism gives no gradient norm in fp32 and keeps no master weights in bf16. Stage 1 does the same
    # arithmetic with both, and costs no more communication.
    zero["stage"] = max(1, deepspeed.zero_stage)
    return {
        **deepspeed.json,
        "zero_optimization": zero,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # The number of micro-batches differs from step to step, and `step` alone says when one is complete.
        "managed_gradient_accumulation": False,
        "gradient_clipping": max_grad_norm,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
        # torch's AdamW steps on the CPU too, without compiling an operator first.
        "zero_force_ds_cpu_optimizer": False,
    }


def _undivided(zero: dict[str, Any], dtype: torch.dtype) -> None:
    """One rank has nobody to divide gradients with, and stage 1 adds them up in place, where stage 2 copies them out
    of each micro-batch: measured in fp32, the same numbers and memory, and 14 % less time in PPO's updates.

    In low precision stage 1 takes 4 more bytes per parameter, and offloading wants stage 2.
    """
    if zero["stage"] == 2 and dtype == torch.float32 and not zero.get("offload_optimizer"):
        zero |= {"stage": 1, "overlap_comm": False}  # nothing to overlap with; stage 1 has no such thing


@contextmanager
def sharded_loading(deepspeed: DeepspeedConfig, dtype: torch.dtype) -> Iterator[None]:
    """Around from_pretrained and resize_token_embeddings: under ZeRO-3 each rank keeps only its share of the weights.

    transformers looks for a living HfDeepSpeedConfig. With other stages this does nothing.
    """
    if deepspeed.zero_stage != 3:
        yield
        return
    _prepare_deepspeed()
    from transformers.integrations import HfDeepSpeedConfig
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    alive = HfDeepSpeedConfig(ds_config(deepspeed, dtype, max_grad_norm=0.0))
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del alive


def gathered_tensors(
    engine: Engine, only_trainable: bool = False, dtype: torch.dtype | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Whole weights and persistent buffers by name, one after the other, on the CPU of rank 0.

    Every rank must run the iterator to its end; only on rank 0 does it yield. Names that share a weight (tied
    embeddings) yield the very same tensor. dtype converts floating-point tensors.
    """
    tensors = {
        name: value
        for name, value in engine.module.state_dict(keep_vars=True).items()
        if isinstance(value, torch.Tensor) and (value.requires_grad or not only_trainable)
    }
    names_left = Counter(id(value) for value in tensors.values())
    kept: dict[int, torch.Tensor | None] = {}  # whole tensors whose other names are still to come
    for name, value in tensors.items():
        whole = kept[id(value)] if id(value) in kept else _whole_on_main(engine, value, dtype)
        names_left[id(value)] -= 1
        if names_left[id(value)]:
            kept[id(value)] = whole
        else:
            kept.pop(id(value), None)
        if whole is not None:
            yield name, whole


def gathered_state_dict(
    engine: Engine, only_trainable: bool = False, dtype: torch.dtype | None = None
) -> dict[str, torch.Tensor]:
    """gathered_tensors as a dict: everything on rank 0, nothing on the others. All ranks call it."""
    return dict(gathered_tensors(engine, only_trainable, dtype))


@contextmanager
def gathered_for_generation(engine: Engine) -> Iterator[nn.Module]:
    """The model in evaluation mode with whole weights, for many forward passes that ranks need not make in step.

    Under ZeRO-3 the weights are gathered once, and the yielded module is a twin that shares them but carries none of
    DeepSpeed's hooks: hooks would gather layer by layer, and ranks that stop at different lengths would hang.
    Weights must not be changed inside.
    """
    module = engine.module if engine._twin is None else engine._twin
    was_training = module.training
    module.eval()
    try:
        with ds.zero.GatheredParameters(list(module.parameters()), modifier_rank=None):
            yield module
    finally:
        module.train(was_training)


@contextmanager
def gathered(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Under ZeRO-3 these parameters are whole inside; all ranks enter and leave. Contexts must not overlap.

    For module trees that share an engine's parameters and none of its hooks.
    """
    with ds.zero.GatheredParameters(list(parameters), modifier_rank=None):
        yield


def _whole_on_main(engine: Engine, value: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor | None:
    # For any other tensor than a ZeRO-3 parameter the context does nothing.
    with ds.zero.GatheredParameters([value], modifier_rank=None):
        if not engine.ranks.is_main:
            return None
        to = dtype if dtype is not None and value.is_floating_point() else value.dtype
        return value.detach().to("cpu", to, copy=True).contiguous()


def _prepare_deepspeed() -> None:
    """Keep it quiet, and from compiling an operator."""
    ds.utils.logger.setLevel(logging.WARNING)
    # On CPU it would build a shared-memory all-reduce for inference, which nothing here calls: a minute of compiling,
    # and a lock file that makes every later run wait for ever when a process is killed in between.
    ds.ops.__compatible_ops__ = {}
    # DeepSpeed calls collectives by names that torch has begun to rename, and is warned for each call.
    warnings.filterwarnings("ignore", message="`torch.distributed.*` is deprecated", category=FutureWarning)


def _fit_bucket(zero: dict[str, Any], groups: list[dict[str, Any]]) -> None:
    """No larger a buffer for gradients on their way than all of them need: DeepSpeed takes the whole size at once, by
    default a gigabyte in bf16, for an adapter of some megabytes too."""
    trained = sum(getattr(p, "ds_shape", p.shape).numel() for group in groups for p in group["params"])
    size = zero.get("reduce_bucket_size", DEFAULT_BUCKET)
    if isinstance(size, int | float):
        zero["reduce_bucket_size"] = min(int(size), trained)


def _twin(model: nn.Module) -> nn.Module:
    """A copy of the module tree around the same Parameter objects, taken before DeepSpeed adds its hooks."""
    return copy.deepcopy(model, memo={id(p): p for p in model.parameters()})


def _finish_sharded_model(model: nn.Module, dtype: torch.dtype, ranks: Ranks) -> None:
    """Do for parameters added after a sharded load (adapters, heads) what DeepSpeed then leaves out.

    It takes a model with one sharded parameter for a finished one: it casts nothing, and moves no buffer.
    """
    for parameter in model.parameters():
        if not hasattr(parameter, "ds_id") and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    move_buffers(model, ranks.device)


def move_buffers(model: nn.Module, device: torch.device) -> None:
    """Move a model's buffers, and nothing else, to a device."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
