"""From the products that skip zero activations down to the kernels, as on a GPU, emulated."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from actsparse_cases import ActiveCase, LinearOracle, OutputsOracle, draw_cases
from cases import SumOracle
from emulated_gpu import Gpu
from gossamer import _C, actsparse_linear, actsparse_outputs, pack_spikes, spike_linear
from gossamer.ops import cuda_workspace
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ACTIVATIONS = (None, "relu", "gelu", "silu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_plain_torch(gpu: Gpu, dtype: torch.dtype) -> None:
    """What torch computes, of many rows or odd columns, is rounded before the activation."""
    gpu.describe(multiprocessors=4)
    for i, case in enumerate(draw_cases(24)):
        x, weight, bias = case.operands(dtype)
        given, threshold = bias if i % 3 else None, (0.0, 0.1, 0.7)[i % 3]
        activation = ACTIVATIONS[i % 4] if case.m <= _C.actsparse_cuda_rows(weight) else None
        y = actsparse_linear(x, weight, given, threshold, activation)
        try:
            LinearOracle(x, weight, given, threshold, activation).check(y)
        except AssertionError as error:
            raise AssertionError(f"{case}, threshold {threshold}, {activation}") from error
        assert torch.equal(actsparse_linear(x, weight, given, threshold, activation), y)
    assert all(not counters.any() for counters in cuda_workspace._counters.values())


def test_which_products_are_the_kernels(gpu: Gpu) -> None:
    ran = []
    for m in (1, 3, 8, 16, 17, 70):
        x, weight, _ = ActiveCase(m, 64, 64, "some").operands(torch.bfloat16)
        before = gpu.launches
        actsparse_linear(x, weight)
        ran.append(gpu.launches - before)
    assert ran == [1, 1, 1, 1, 0, 0]
    x, weight, _ = ActiveCase(3, 33, 64, "some").operands(torch.float16)
    before = gpu.launches
    actsparse_linear(x, weight)
    actsparse_linear(x[:1].double(), weight.double())
    actsparse_linear(x[:1], weight.t().contiguous().t())  # would have to be copied
    for none in (x[:0], x[:0].double()):
        assert actsparse_linear(none, weight.to(none.dtype)).shape == (0, 33)
        assert actsparse_linear(none, weight.to(none.dtype).t().contiguous().t()).shape == (0, 33)
        wanted = torch.ones(0, 64, dtype=torch.bool)
        y = actsparse_outputs(none.new_empty(0, 33), weight.to(none.dtype), wanted)
        assert y.shape == (0, 64)
    assert gpu.launches == before


def test_infinities_at_the_end_of_a_wanted_row(gpu: Gpu) -> None:
    for dtype in DTYPES:
        x, weight = torch.ones(2, 40, dtype=dtype), torch.ones(8, 40, dtype=dtype)
        weight[3, -1], weight[5, -2] = float("inf"), -float("inf")
        y = actsparse_outputs(x, weight, torch.ones(2, 8, dtype=torch.bool))
        assert torch.equal(y, weight.sum(-1).expand(2, 8))


def test_strides_and_dimensions(gpu: Gpu) -> None:
    for dtype in DTYPES:
        x, weight, bias = ActiveCase(6, 48, 37, "some").operands(dtype)
        y = actsparse_linear(x, weight, bias)
        wide = torch.full((37, 104), float("nan"), dtype=dtype)
        wide[:, 8:56] = weight
        assert torch.equal(actsparse_linear(x.t().contiguous().t(), wide[:, 8:56], bias), y)
        assert torch.equal(actsparse_linear(x.view(2, 3, 37), weight, bias), y.view(2, 3, 48))
        row = x[:1].expand(6, -1)
        assert torch.equal(
            actsparse_linear(row, weight, bias.repeat(2)[:48]),
            actsparse_linear(row.contiguous(), weight, bias),
        )
        assert torch.equal(actsparse_linear(x[:, :0], weight[:0], bias), bias.expand(6, -1))
        assert actsparse_linear(x[:0], weight).shape == (0, 48)
        assert actsparse_linear(x, weight[:, :0]).shape == (6, 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_wanted_outputs(gpu: Gpu, dtype: torch.dtype) -> None:
    gpu.describe(multiprocessors=2)
    for i, (m, n, k) in enumerate(((1, 90, 64), (1, 33, 45), (5, 70, 96), (9, 40, 64), (3, 9, 7))):
        x, weight, bias = (torch.randn(s).to(dtype) for s in ((m, k), (n, k), (n,)))
        gate = torch.randn(m, n).to(dtype)
        given, kernel = bias if i % 2 else None, m <= (8 if k % 8 == 0 else 1)
        activation, before = ACTIVATIONS[i % 4] if kernel else None, gpu.launches
        y = actsparse_outputs(x, weight, gate, given, 0.5, activation)
        assert gpu.launches - before == kernel
        OutputsOracle(x, weight, gate.abs() > 0.5, given, activation).check(y)
    assert actsparse_outputs(x, weight, torch.tensor([4, 1])).shape == (3, 2)
    assert actsparse_outputs(x[:0], weight, gate[:0]).shape == (0, 9)
    none = actsparse_outputs(x[:1, :0], weight[:, :0], gate[:1], bias)
    assert torch.equal(none, torch.where(gate[:1] == 0, 0, bias))


def test_spikes(gpu: Gpu) -> None:
    gpu.describe(multiprocessors=3)
    for dtype in DTYPES:
        for tokens, k, n in (
            (0, 9, 5),
            (1, 1, 1),
            (1, 300, 64),
            (5, 77, 9),
            (7, 77, 8),
            (40, 65, 128),
        ):
            spikes, weight = torch.rand(tokens, k) < 0.3, torch.randn(k, n).to(dtype)
            bias = torch.randn(n).to(dtype)
            x, w, b = spikes.double(), weight.double(), bias.double()
            before = gpu.launches
            y = spike_linear(pack_spikes(spikes), weight, bias)
            kernels = tokens <= (16 if n % 8 == 0 else 1)
            assert gpu.launches - before == (kernels and tokens > 0)
            SumOracle(x @ w + b, x @ w.abs() + b.abs(), k + 1, dtype).check(y)


X, WEIGHT = torch.randn(5, 8), torch.randn(8, 4)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"x": X[:, :7]}, ValueError, "7 features, the weight expects 8"),
        ({"bias": torch.zeros(8)}, ValueError, r"bias has shape \[8\], expected \[4\]"),
        ({"bias": torch.zeros(4).half()}, TypeError, "bias is torch.float16"),
        ({"activation": "tanh"}, ValueError, "tanh"),
        ({"threshold": -0.5}, ValueError, "threshold is -0.5"),
    ],
)
def test_mistakes(gpu: Gpu, change: dict[str, Any], error: type, text: str) -> None:
    with pytest.raises(error, match=text):
        actsparse_linear(**({"x": X, "weight_kn": WEIGHT} | change))


def test_what_the_border_refuses(gpu: Gpu) -> None:
    gpu.describe(multiprocessors=8)

    def linear(**other: Tensor | None) -> None:
        x, weight, _ = ActiveCase(1, 64, 256, "some").operands(torch.float32)
        operands: dict[str, Any] = {
            "out": torch.empty(1, 64),
            "x": x,
            "weight": weight,
            "bias": None,
            "threshold": 0.0,
            "activation": "none",
            "workspace": torch.empty(8 * 128),
            "counters": torch.zeros(1, dtype=torch.int32),
        }
        _C.actsparse_linear_cuda(**(operands | other))

    linear()
    with pytest.raises(ValueError, match="4096 bytes of workspace are needed"):
        linear(workspace=None)
    with pytest.raises(ValueError, match="28 bytes of workspace and 1 counters, expected 4096"):
        linear(workspace=torch.empty(7))
    with pytest.raises(TypeError, match="counters is int64"):
        linear(counters=torch.zeros(1, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"out has shape \[2, 64\]"):
        linear(out=torch.empty(2, 64))
    with pytest.raises(TypeError, match="float64, a GPU has kernels of its own"):
        linear(**{name: torch.empty(1, 1).double() for name in ("out", "x", "weight")})
    gpu.describe(capability=75)
    with pytest.raises(ValueError, match=r"compute capability 7\.5, the kernels need 8\.0"):
        linear()
