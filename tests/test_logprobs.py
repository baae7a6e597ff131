"""Loss and log-probabilities from hidden states, against plain log_softmax; and that no (N, V) tensor is made."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf_cli.ops.logprobs import IDENTITY, LogitTransform, chunk_rows, gather_logprobs, linear_cross_entropy

TRANSFORMS = [IDENTITY, LogitTransform(scale=0.25), LogitTransform(scale=2.0, softcap=3.0)]


def plain_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, transform: LogitTransform) -> Tensor:
    logits = hidden @ weight.T + (0.0 if bias is None else bias)
    logits = logits * transform.scale
    if transform.softcap is not None:
        logits = transform.softcap * torch.tanh(logits / transform.softcap)
    return logits / transform.temperature


def leaves(rows: int, width: int, vocab: int, with_bias: bool, seed: int, dtype: torch.dtype) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return [make(rows, width), make(vocab, width), make(vocab) if with_bias else None]


def gradients(output: Tensor, inputs: list[Tensor | None]) -> list[Tensor]:
    return list(torch.autograd.grad(output, [t for t in inputs if t is not None]))


def test_loss_and_gradient_by_hand() -> None:
    # One row, h = 1, W = (0, ln 3): logits (0, ln 3), p = (1/4, 3/4).
    hidden = torch.tensor([[1.0]], requires_grad=True)
    weight = torch.tensor([[0.0], [math.log(3.0)]], requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, None, torch.tensor([1]))
    assert loss.item() == pytest.approx(math.log(4 / 3))
    (2 * loss).backward()
    # d/dlogits = 2 (p − onehot) = (1/2, −1/2); dW = that · h; dh = −1/2 ln 3
    assert weight.grad is not None
    assert hidden.grad is not None
    assert weight.grad.flatten().tolist() == pytest.approx([0.5, -0.5])
    assert hidden.grad.item() == pytest.approx(-0.5 * math.log(3.0))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 9),
    vocab=st.integers(1, 12),
    chunk=st.integers(1, 10),
    with_bias=st.booleans(),
    weighted=st.booleans(),
    transform=st.sampled_from(TRANSFORMS),
    seed=st.integers(0, 10**6),
)
def test_cross_entropy_equals_logits_path(
    rows: int, vocab: int, chunk: int, with_bias: bool, weighted: bool, transform: LogitTransform, seed: int
) -> None:
    inputs = leaves(rows, 4, vocab, with_bias, seed, torch.float64)
    hidden, weight, bias = inputs
    assert hidden is not None
    assert weight is not None
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, vocab, (rows,), generator=generator)
    weights = torch.rand(rows, generator=generator, dtype=torch.float64) if weighted else None
    losses = F.cross_entropy(plain_logits(hidden, weight, bias, transform), targets, reduction="none")
    expected = (losses if weights is None else losses * weights).sum()
    loss = linear_cross_entropy(hidden, weight, bias, targets, weights, chunk, transform)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients(1.7 * loss, inputs), gradients(1.7 * expected, inputs))


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(0, 5)),
    vocab=st.integers(1, 12),
    chunk=st.integers(1, 10),
    with_bias=st.booleans(),
    transform=st.sampled_from(TRANSFORMS),
    temperature=st.sampled_from([0.5, 1.0, 1.3]),
    seed=st.integers(0, 10**6),
)
def test_gather_logprobs_equals_log_softmax(
    shape: tuple[int, int],
    vocab: int,
    chunk: int,
    with_bias: bool,
    transform: LogitTransform,
    temperature: float,
    seed: int,
) -> None:
    inputs = leaves(shape[0] * shape[1], 4, vocab, with_bias, seed, torch.float64)
    hidden, weight, bias = inputs
    assert hidden is not None
    assert weight is not None
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, vocab, shape, generator=generator)
    upstream = torch.randn(shape, generator=generator, dtype=torch.float64)
    hidden = hidden.view(*shape, 4)
    logits = plain_logits(hidden, weight, bias, transform._replace(temperature=temperature))
    expected = torch.log_softmax(logits, -1).gather(-1, targets[..., None]).squeeze(-1)
    found = gather_logprobs(hidden, weight, targets, temperature, chunk, bias, transform)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        gradients((found * upstream).sum(), inputs), gradients((expected * upstream).sum(), inputs)
    )


def test_gather_logprobs_numerical_gradient() -> None:
    hidden, weight, bias = leaves(6, 3, 7, True, 0, torch.float64)
    targets = torch.tensor([[0, 6, 3], [2, 2, 5]])
    assert torch.autograd.gradcheck(
        lambda h, w, b: gather_logprobs(h.view(2, 3, 3), w, targets, 0.7, 2, b), (hidden, weight, bias)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_as_close_as_the_logits_path(dtype: torch.dtype) -> None:
    exact = leaves(200, 64, 500, False, 0, torch.float64)
    low = [None if t is None else t.detach().to(dtype).requires_grad_() for t in exact]
    targets = torch.arange(200)
    rounded = [None if t is None else t.detach().double().requires_grad_() for t in low]
    assert rounded[0] is not None
    assert rounded[1] is not None
    assert low[0] is not None
    assert low[1] is not None
    expected = F.cross_entropy(rounded[0] @ rounded[1].T, targets, reduction="sum")
    loss = linear_cross_entropy(low[0], low[1], None, targets, chunk_size=16)
    plain = F.cross_entropy((low[0] @ low[1].T).float(), targets, reduction="sum")
    assert loss.dtype == torch.float32
    assert abs(loss.item() - expected.item()) <= 1.01 * abs(plain.item() - expected.item()) + 1e-3
    for ours, theirs, truth in zip(
        gradients(loss, low), gradients(plain, low), gradients(expected, rounded), strict=True
    ):
        assert ours.dtype == dtype
        error = (ours.double() - truth).norm() / truth.norm()
        assert error <= 1.5 * (theirs.double() - truth).norm() / truth.norm() + 1e-4


def test_weight_gradient_is_summed_in_fp32() -> None:
    # 4096 rows that each add 1/2 to one entry: bf16 sums stop growing at 256 (8 bits of mantissa).
    hidden = torch.ones(4096, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    linear_cross_entropy(hidden, weight, None, torch.zeros(4096, dtype=torch.long), chunk_size=1).backward()
    assert weight.grad is not None
    assert weight.grad.flatten().tolist() == [-2048.0, 2048.0]


def test_frozen_parts_get_no_gradient_and_no_grad_makes_none() -> None:
    hidden, weight, _ = leaves(5, 4, 6, False, 0, torch.float32)
    assert hidden is not None
    assert weight is not None
    targets = torch.arange(5)
    linear_cross_entropy(hidden, weight.detach(), None, targets).backward()
    assert hidden.grad is not None
    linear_cross_entropy(hidden.detach(), weight, None, targets).backward()
    assert weight.grad is not None
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, weight, None, targets).requires_grad


def test_no_rows_give_a_connected_zero() -> None:
    _, weight, bias = leaves(0, 4, 6, True, 0, torch.float32)
    hidden = torch.zeros(0, 4, requires_grad=True)
    assert weight is not None
    assert bias is not None
    loss = linear_cross_entropy(hidden, weight, bias, torch.zeros(0, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0
    assert weight.grad is not None
    assert bias.grad is not None
    assert not weight.grad.any()


def test_second_backward_is_refused() -> None:
    hidden, weight, _ = leaves(2, 4, 6, False, 0, torch.float32)
    assert hidden is not None
    assert weight is not None
    loss = linear_cross_entropy(hidden, weight, None, torch.tensor([0, 1]))
    loss.backward(retain_graph=True)
    with pytest.raises(AssertionError, match="one backward"):
        loss.backward()


def test_chunk_rows() -> None:
    # 16 MiB / (4 bytes · 4096) = 1024; 32000: 64 MiB / (4 · 32000) = 524 > 512; 150000: 64 MiB / 600000 = 111
    assert [chunk_rows(v, on_cpu=True) for v in (4096, 32000, 150000)] == [1024, 512, 111]
    assert chunk_rows(10**9, on_cpu=True) == 1


PEAK = """
import sys, torch
from rlhf_cli.ops.logprobs import gather_logprobs, linear_cross_entropy
from rlhf_cli.runtime.peak_memory import peak_memory_gb
torch.manual_seed(0)
N, V, H = 8192, 8192, 16  # N x V in fp32 is 256 MiB
hidden, weight = torch.randn(N, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
targets = torch.randint(0, V, (N,))
linear_cross_entropy(hidden[:8], weight, None, targets[:8]).backward()
before = peak_memory_gb(torch.device("cpu"))
if sys.argv[1] == "loss":
    linear_cross_entropy(hidden, weight, None, targets).backward()
elif sys.argv[1] == "gather":
    gather_logprobs(hidden.view(8, -1, H), weight, targets.view(8, -1)).sum().backward()
else:
    torch.nn.functional.cross_entropy(hidden @ weight.T, targets).backward()
print((peak_memory_gb(torch.device("cpu")) - before) * 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("path", "low", "high"), [("loss", 0, 250), ("gather", 0, 250), ("logits", 400, 2000)])
def test_peak_memory_in_mib(path: str, low: float, high: float) -> None:
    """Less than one N x V matrix; how much less is the allocator's mood (it may keep a chunk that was freed)."""
    run = subprocess.run([sys.executable, "-c", PEAK, path], capture_output=True, text=True, check=True)
    assert low <= float(run.stdout) < high
