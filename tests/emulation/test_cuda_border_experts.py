"""From grouped_linear and its gradients down to the kernels, as on a GPU, with these emulated."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from emulated_gpu import Gpu
from gossamer import _C, grouped_linear
from gossamer.nn import GroupedLinear
from gossamer.ops import grouped_cuda
from grouped_cases import CASES, GroupedCase, GroupedOracle
from torch import Tensor

MMA, FMA = 0, 1
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TYPICAL = GroupedCase((4, 0, 9, 1), 37, 50)


def gradient_oracles(
    x: Tensor, weights: Tensor, offsets: Tensor, dy: Tensor
) -> tuple[GroupedOracle, list[GroupedOracle]]:
    """Of dx, and of each expert's dW: products of one expert, whose tokens are rows of W."""
    begins = [0, *offsets.tolist()]
    of_weights = []
    for begin, end in pairwise(begins):
        rows = dy[begin:end].t(), x[begin:end].t()[None], torch.tensor([dy.shape[1]])
        of_weights.append(GroupedOracle(*rows))
    return GroupedOracle(dy, weights.mT, offsets), of_weights


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_plain_torch(gpu: Gpu, dtype: torch.dtype) -> None:
    """1100 tokens are for a GPU."""
    for i, case in enumerate(case for case in CASES if sum(case.counts) < 1000):
        x, weights, bias = operands = [t.requires_grad_() for t in case.operands(dtype)]
        offsets = case.offsets.to((torch.int32, torch.int64)[i % 2])
        activation = (None, "relu", "gelu", "silu")[i % 4]
        with torch.no_grad():
            y = grouped_linear(x, weights, offsets, bias, activation)
        GroupedOracle(x, weights, offsets, bias, activation).check(y)
        y = grouped_linear(x, weights, offsets, bias)
        dy = torch.randn(y.shape).to(dtype)
        dx, dw, db = torch.autograd.grad(y, operands, dy)
        of_input, of_weights = gradient_oracles(x.detach(), weights.detach(), offsets, dy)
        of_input.check(dx)
        for expert, oracle in enumerate(of_weights):
            oracle.check(dw[expert])
            tokens = slice(int(offsets[expert - 1]) if expert else 0, int(offsets[expert]))
            torch.testing.assert_close(db[expert], dy[tokens].float().sum(0).to(dtype))
    assert gpu.kernel == (MMA if dtype.itemsize == 2 else FMA)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_strides_and_float64(gpu: Gpu, dtype: torch.dtype) -> None:
    x, weights, bias = TYPICAL.operands(dtype)
    operands = (weights, TYPICAL.offsets, bias)
    y = grouped_linear(x, *operands)
    GroupedOracle(x, *operands).check(y)
    wide = torch.full((len(x), 61), torch.nan, dtype=dtype)
    wide[:, 3:53] = x
    turned = weights.mT.contiguous().mT
    every_other = TYPICAL.offsets.repeat_interleave(2)[::2]
    for given in (wide[:, 3:53], x.t().contiguous().t()):
        assert torch.equal(grouped_linear(given, turned, every_other, bias), y)
    x.requires_grad_()
    weights.requires_grad_()
    grouped_linear(x, weights, TYPICAL.offsets).sum().backward()  # of an expanded dy
    of_input, _ = gradient_oracles(x, weights, TYPICAL.offsets, torch.ones_like(y))
    of_input.check(x.grad)


def test_layer_and_autocast(gpu: Gpu) -> None:
    layer, x = GroupedLinear(4, 50, 37), torch.randn(14, 50)
    exact = layer(x, TYPICAL.offsets)
    assert gpu.kernel == FMA
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x, TYPICAL.offsets)
    assert (y.dtype, gpu.kernel) == (torch.bfloat16, MMA)
    torch.testing.assert_close(y.float(), exact, rtol=0.05, atol=0.05)
    y.float().square().sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in layer.parameters())
    assert bool((layer.weight.grad[1] == 0).all())  # no token


def test_by_torchs_grouped_mm(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chosen by name, as on Hopper; what it cannot do alike goes to the kernels."""
    if not hasattr(torch.nn.functional, "grouped_mm"):
        pytest.skip("this torch has no grouped_mm")
    monkeypatch.setattr(grouped_cuda, "grouped_choice", lambda *of: {"kernel": "grouped_mm"})
    case = GroupedCase((4, 0, 9, 1), 40, 48)
    x, weights, bias = (t.requires_grad_() for t in case.operands(torch.bfloat16))
    gpu.describe()
    y = grouped_linear(x, weights, case.offsets)
    GroupedOracle(x, weights, case.offsets).check(y)
    dy = torch.randn(y.shape).to(torch.bfloat16)
    dx, _ = torch.autograd.grad(y, (x, weights), dy)
    gradient_oracles(x.detach(), weights.detach(), case.offsets, dy)[0].check(dx)
    with torch.no_grad():
        for rest in ((bias, None), (None, "silu")):
            got = grouped_linear(x, weights, case.offsets, *rest)
            GroupedOracle(x, weights, case.offsets, *rest).check(got)
            assert gpu.kernel == MMA
        # Offsets as they should be reach it, whatever they were.
        for wrong in ([-3, 5, 2, 900], [2**40, 0, 0, 14]):
            y = grouped_linear(x, weights, torch.tensor(wrong))
            ends = torch.tensor(wrong).clamp(0, 14).cummax(0).values
            GroupedOracle(x, weights, ends).check(y)


X, WEIGHTS, OFFSETS = torch.randn(5, 8), torch.randn(3, 4, 8), torch.tensor([2, 2, 5])


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"offsets": torch.tensor([0, 1, 2, 5])}, ValueError, r"shape \[4\], expected \[3\]"),
        ({"offsets": torch.tensor([1.0, 2, 5])}, TypeError, "float32, expected int32 or int64"),
        ({"weights": WEIGHTS.half()}, TypeError, "float16"),
        ({"x": X[:, 1:]}, ValueError, "x has 7 features, the weights expect 8"),
        ({"bias": torch.randn(3, 5)}, ValueError, r"bias has shape \[3, 5\]"),
        ({"activation": "tanh"}, ValueError, "tanh"),
    ],
)
def test_mistakes(gpu: Gpu, change: dict[str, Any], error: type, text: str) -> None:
    given: dict[str, Any] = {"x": X, "weights": WEIGHTS, "offsets": OFFSETS}
    with pytest.raises(error, match=text):
        grouped_linear(**(given | change))


def test_what_the_border_refuses(gpu: Gpu) -> None:
    def linear(**other: Any) -> None:
        given: dict[str, Any] = {"out": torch.empty(5, 4), "x": X, "weights": WEIGHTS}
        given |= {"offsets": OFFSETS, "bias": None, "activation": "none"}
        _C.grouped_linear_cuda(**(given | other))

    linear()
    doubles = {"out": torch.empty(5, 4).double(), "x": X.double(), "weights": WEIGHTS.double()}
    with pytest.raises(TypeError, match="float64, a GPU has kernels of its own for float32"):
        linear(**doubles)
    with pytest.raises(ValueError, match=r"out has shape \[6, 4\], expected \[5, 4\]"):
        linear(out=torch.empty(6, 4))
    with pytest.raises(ValueError, match="x has strides"):
        linear(x=X.t().contiguous().t())
    with pytest.raises(ValueError, match=r"dy has shape \[5, 8\], expected \[5, 4\]"):
        _C.grouped_input_cuda(torch.empty(5, 8), X, WEIGHTS, OFFSETS)
    with pytest.raises(ValueError, match=r"x has shape \[5, 8\], expected \[5, 7\]"):
        _C.grouped_weight_cuda(torch.empty(3, 4, 7), torch.empty(5, 4), X, OFFSETS)
    gpu.describe(capability=75)
    with pytest.raises(ValueError, match=r"compute capability 7\.5, the kernels need 8\.0"):
        linear()
