"""Linear layers of a rollout on a CPU, with their weights in the order in which oneDNN's kernels read them.

A step multiplies a few rows with every matrix of the model. Measured on two AMD cores with AVX-512, all products of a
step of 5 M weights, torch's own and packed: fp32 5.0 ms and 3.3 ms for 32 rows, 4.5 ms and 1.6 ms for 5 rows; bf16
2.6 ms and 2.0 ms for 32. In fp32 torch calls MKL, so part of the gain is oneDNN's kernel (3.1 ms for 5 rows without
packing) and may be another on Intel; in bf16 torch calls oneDNN, too, and packing is all of it.

The operators are the ones that torch's compiler puts into frozen CPU graphs; tests/test_rollout_packing.py says so if
they move.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rlhf_cli.models.head import is_taught_linear

# The call takes 12 µs longer than torch's own; below 256 x 256 that is more than what it saves (measured).
SMALLEST = 1 << 16
# Copies of the weights, all together: packing is for models that a CPU can train, and must not fill its memory.
MOST_BYTES = 2 << 30


@contextmanager
def packed_linears(model: nn.Module) -> Iterator[None]:
    """Inside, linear layers on a CPU use packed copies of their weights, which must not change there.

    Layers that compute something else, quantised ones for example, and models whose copies would take more than
    MOST_BYTES stay as they are.
    """
    weights = {module: weight for module in model.modules() if (weight := _matrix(module)) is not None}
    if sum(weight.nbytes for weight in weights.values()) > MOST_BYTES:
        weights = {}
    before = {module: module.__dict__.get("forward") for module in weights}
    try:
        for module, weight in weights.items():
            module.forward = _packed_forward(weight, module.bias)  # type: ignore[arg-type]
        yield
    finally:
        for module, forward in before.items():
            del module.forward
            if forward is not None:
                module.forward = forward


def _packed_forward(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """hidden (..., in) -> (..., out); weight (out, in), bias (out,)."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
    product = torch.ops.mkldnn._linear_pointwise
    return lambda hidden: product(hidden, packed, bias, "none", [], "")


def _matrix(module: nn.Module) -> Tensor | None:
    """The weight (out, in) of a plain linear layer that packing makes faster."""
    is_conv = type(module).forward is Conv1D.forward  # GPT-2's linear layer: its weight is (in, out)
    if not is_conv and type(module).forward is not nn.Linear.forward:
        return None
    if "forward" in module.__dict__ and not is_taught_linear(module):
        return None
    weight = module.weight
    # A quantised or distributed weight is of a class of its own; a sharded one that is not gathered is empty.
    is_plain = type(weight) is nn.Parameter and weight.ndim == 2 and weight.numel() >= SMALLEST
    if not is_plain or weight.device.type != "cpu" or not _has_kernel(weight.dtype):
        return None
    return weight.detach().t() if is_conv else weight.detach()


def _has_kernel(dtype: torch.dtype) -> bool:
    """fp16 is left out: few CPUs compute in it."""
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
