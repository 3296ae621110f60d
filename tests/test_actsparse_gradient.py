"""Derivatives of products that skip zero activations, and what torch's compilers see of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from actsparse_cases import ActiveCase, LinearOracle
from cases import DTYPES, SumOracle
from gossamer import actsparse_linear, actsparse_outputs
from torch import Tensor
from torch.func import grad, vmap

ops = torch.ops.gossamer
SMALL = ActiveCase(3, 4, 5, "some")


def gradient_operands(dtype: torch.dtype, case: ActiveCase = SMALL) -> tuple[Tensor, ...]:
    return tuple(t.requires_grad_() for t in case.operands(dtype))


@pytest.mark.parametrize("threshold", [0.0, 0.4])
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_first_and_second_derivatives(
    serial_target: str, activation: str | None, threshold: float
) -> None:
    x, weight, bias = gradient_operands(torch.float64, ActiveCase(3, 4, 5, "all"))
    # Away from the threshold, where the function jumps.
    x = torch.where((x.abs() - threshold).abs() < 1e-3, 1.0, x).detach().requires_grad_()

    def layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return actsparse_linear(x, weight, bias, threshold, activation)

    assert torch.autograd.gradcheck(layer, (x, weight, bias))
    assert torch.autograd.gradgradcheck(layer, (x, weight, bias))
    wanted = torch.rand(3, 5) < 0.5

    def outputs(y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return actsparse_outputs(y, weight, wanted, bias, activation=activation)

    y = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(outputs, (y, weight, bias))
    assert torch.autograd.gradgradcheck(outputs, (y, weight, bias))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_gradients_are_those_of_the_dense_layer(
    actsparse_target: str, threshold: float, dtype: torch.dtype
) -> None:
    for case in (ActiveCase(1, 65, 130, "few"), ActiveCase(7, 33, 70, "some")):
        x, weight, bias = operands = gradient_operands(dtype, case)
        y = actsparse_linear(x, weight, bias, threshold)
        dy = torch.randn_like(y)
        got = torch.autograd.grad(y, operands, dy)
        assert [g.dtype for g in got] == [dtype] * 3
        inactive = x.detach().abs() <= threshold
        exact = [t.detach().double() for t in (dy, x, weight)]

        def wanted(
            dy: Tensor, x: Tensor, weight: Tensor, inactive: Tensor = inactive
        ) -> tuple[Tensor, ...]:
            dx = dy @ weight.t()
            # As of torch.nn.Linear, also at zeros: only a threshold takes inputs away.
            dx = dx if threshold == 0 else torch.where(inactive, 0, dx)
            return dx, torch.where(inactive, 0, x).t() @ dy, dy.sum(0)

        values, sizes = wanted(*exact), wanted(*(t.abs() for t in exact))
        for g, value, size, products in zip(
            got, values, sizes, (case.n, case.m, case.m), strict=True
        ):
            SumOracle(value, size, products, dtype).check(g)


@pytest.mark.parametrize("alone", range(3))
@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_any_operand_alone(alone: int, threshold: float) -> None:
    operands = gradient_operands(torch.float32)
    (want,) = torch.autograd.grad(
        actsparse_linear(*operands, threshold, "silu").sum(), operands[alone]
    )
    for i, operand in enumerate(operands):
        operand.requires_grad_(i == alone)
    actsparse_linear(*operands, threshold, "silu").sum().backward()
    assert torch.equal(operands[alone].grad, want)
    # A sum's gradient is expanded, with strides of zero.
    operands[alone].grad = None
    actsparse_linear(operands[0][None], *operands[1:], threshold).sum().backward()
    assert operands[alone].grad.shape == operands[alone].shape


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_per_sample_gradients() -> None:
    weight, x = torch.randn(5, 4), torch.randn(3, 2, 5).relu()

    def loss(weight: Tensor, x: Tensor) -> Tensor:
        h = actsparse_linear(x, weight, threshold=0.2)
        return actsparse_outputs(h, weight, x > 0).square().sum()

    per_sample = vmap(grad(loss), in_dims=(None, 0))(weight, x)
    for got, sample in zip(per_sample, x, strict=True):
        torch.testing.assert_close(got, grad(loss)(weight, sample))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    x, weight = torch.randn(5, 6, requires_grad=True), torch.randn(6, 4)
    with torch.autocast("cpu", dtype):
        y = actsparse_linear(x, weight)
        twin = F.linear(x, weight.t())
        z = actsparse_outputs(x, weight.t(), y)
    assert y.dtype == z.dtype == dtype
    torch.testing.assert_close(y, twin)
    torch.testing.assert_close(z, y)
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32


@pytest.mark.parametrize("gradient", [False, True])
def test_opcheck(gradient: bool) -> None:
    x, weight, bias = (t.requires_grad_(gradient) for t in SMALL.operands(torch.float32))
    dy, wanted = torch.randn(3, 4, requires_grad=gradient), torch.rand(3, 5) < 0.5
    row = torch.randn(5, requires_grad=gradient)
    torch.library.opcheck(ops.actsparse_linear, (x, weight, bias, 0.0, "silu"))
    torch.library.opcheck(ops.actsparse_linear, (row, weight, None, 0.5, "none"))
    torch.library.opcheck(ops.actsparse_outputs, (dy, weight, wanted, None, "none"))
    torch.library.opcheck(ops.actsparse_outputs, (dy, weight, wanted, row, "relu"))


def compiled(function: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=False)


@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_compiles_as_one_graph(threshold: float) -> None:
    x, weight, bias = gradient_operands(torch.float32, ActiveCase(3, 6, 8, "some"))
    indices = torch.tensor([0, 5, 2])

    def model(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        h, fraction = actsparse_linear(x, weight, bias, threshold, "relu", return_fraction=True)
        gated = actsparse_outputs(h, weight, x, threshold=threshold)
        picked = actsparse_outputs(x, weight.t(), indices)
        return gated.sum() + picked.square().sum(), fraction

    results = []
    for function in (model, compiled(model)):
        loss, fraction = function(x, weight, bias)
        results.append((loss, fraction, *torch.autograd.grad(loss, (x, weight, bias))))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


def test_raw_op_with_gradient_is_no_detached_result() -> None:
    x, weight, bias = gradient_operands(torch.float32)
    y = ops.actsparse_linear(x, weight, bias, 0.0, "none")
    assert y.requires_grad
    LinearOracle(x, weight, bias).check(y)
