"""Derivatives of grouped linear layers, and what torch's compilers see of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import DTYPES, SumOracle
from gossamer import grouped_linear
from gossamer.nn import GroupedLinear
from grouped_cases import GroupedCase
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap

ops = torch.ops.gossamer
SMALL = GroupedCase((2, 0, 3), 4, 5)


def gradient_operands(dtype: torch.dtype, case: GroupedCase = SMALL) -> tuple[Tensor, ...]:
    return tuple(t.requires_grad_() for t in case.operands(dtype))


@pytest.mark.parametrize("activation", [None, "gelu"])
def test_first_and_second_derivatives(serial_target: str, activation: str | None) -> None:
    def layer(x: Tensor, weights: Tensor, bias: Tensor) -> Tensor:
        return grouped_linear(x, weights, SMALL.offsets, bias, activation)

    operands = gradient_operands(torch.float64)
    assert torch.autograd.gradcheck(layer, operands)
    assert torch.autograd.gradgradcheck(layer, operands)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_are_those_of_the_dense_layers(target: str, dtype: torch.dtype) -> None:
    case = GroupedCase((5, 0, 40, 1), 33, 70)
    x, weights, bias = operands = gradient_operands(dtype, case)
    y = grouped_linear(x, weights, case.offsets, bias)
    dy = torch.randn_like(y)
    got = torch.autograd.grad(y, operands, dy)
    assert [g.dtype for g in got] == [dtype] * 3

    exact, ends = [t.detach().double() for t in (dy, x, weights)], case.offsets.tolist()

    def wanted(dy: Tensor, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        groups = [slice(a, b) for a, b in zip([0, *ends], ends, strict=False)]
        dx = torch.cat([dy[g] @ weights[e] for e, g in enumerate(groups)])
        dw = torch.stack([dy[g].t() @ x[g] for g in groups])
        return dx, dw, torch.stack([dy[g].sum(0) for g in groups])

    values, sizes = wanted(*exact), wanted(*(t.abs() for t in exact))
    for g, value, size, products in zip(got, values, sizes, (case.n, 40, 40), strict=True):
        SumOracle(value, size, products, dtype).check(g)
    assert not got[1][1].any()
    assert not got[2][1].any()


@pytest.mark.parametrize("alone", range(3))
def test_any_operand_alone(alone: int) -> None:
    operands = gradient_operands(torch.float32)
    (want,) = torch.autograd.grad(
        grouped_linear(operands[0], operands[1], SMALL.offsets, operands[2]).sum(), operands[alone]
    )
    for i, operand in enumerate(operands):
        operand.requires_grad_(i == alone)
    # A sum's gradient is expanded, with strides of zero.
    grouped_linear(operands[0], operands[1], SMALL.offsets, operands[2]).sum().backward()
    assert torch.equal(operands[alone].grad, want)


def test_no_tokens_have_gradients_of_zero() -> None:
    x, weights, bias = gradient_operands(torch.float32, GroupedCase((0, 0), 4, 5))
    grouped_linear(x, weights, torch.zeros(2, dtype=torch.int32), bias).sum().backward()
    assert x.grad.shape == (0, 5)
    assert not weights.grad.any()
    assert not bias.grad.any()


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_function_transforms() -> None:
    layer, offsets = GroupedLinear(3, 5, 4), SMALL.offsets
    params, x = dict(layer.named_parameters()), torch.randn(2, 5, 5)

    def loss(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(layer, params, (x, offsets)).square().sum()

    per_sample = vmap(grad(loss), in_dims=(None, 0))(params, x)
    for i, sample in enumerate(x):
        expected = torch.autograd.grad(loss(params, sample), list(params.values()))
        for got, want in zip(per_sample.values(), expected, strict=True):
            torch.testing.assert_close(got[i], want)
    with pytest.raises(NotImplementedError, match="jvp"):
        jvp(lambda x: layer(x, offsets), (x[0],), (x[0],))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    layer, x = GroupedLinear(3, 5, 4), torch.randn(5, 5, requires_grad=True)
    with torch.autocast("cpu", dtype):
        y = layer(x, SMALL.offsets)
        dense = layer.to_linears()
        twin = torch.cat([dense[0](x[:2]), dense[2](x[2:])])
    assert y.dtype == dtype
    torch.testing.assert_close(y, twin)
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32


def opcheck_operands(gradient: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, weights, bias = (t.requires_grad_(gradient) for t in SMALL.operands(torch.float32))
    return x, weights, SMALL.offsets, bias


@pytest.mark.parametrize("gradient", [False, True])
def test_opcheck(gradient: bool) -> None:
    x, weights, offsets, bias = opcheck_operands(gradient)
    dy = torch.randn(5, 4, requires_grad=gradient)
    torch.library.opcheck(ops.grouped_linear, (x, weights, offsets, bias, "silu"))
    torch.library.opcheck(ops.grouped_linear, (x, weights, offsets.int(), None, "none"))
    torch.library.opcheck(ops.grouped_input, (dy, weights, offsets))
    torch.library.opcheck(ops.grouped_weight, (dy, x, offsets))


class MixtureOfExperts(nn.Module):
    """Top-1 routing, two layers an expert."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(8, 4)
        self.up, self.down = GroupedLinear(4, 8, 12), GroupedLinear(4, 12, 8)

    def forward(self, x: Tensor) -> Tensor:
        weight, expert = self.router(x).softmax(-1).max(-1)
        order = expert.argsort(stable=True)
        offsets = nn.functional.one_hot(expert, 4).sum(0).cumsum(0)
        y = self.down(self.up(x[order], offsets).relu(), offsets)
        return torch.zeros_like(x).index_copy(0, order, y) * weight.unsqueeze(-1)


def test_compiled_training_matches_eager() -> None:
    torch._dynamo.reset()
    model = MixtureOfExperts()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    parameters: list[Any] = list(model.parameters())
    for tokens in (7, 20):
        x = torch.randn(tokens, 8)
        expected, got = model(x), compiled(x)
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(
            torch.autograd.grad(got.square().sum(), parameters),
            torch.autograd.grad(expected.square().sum(), parameters),
        )


def test_inductor_calls_the_op() -> None:
    torch._dynamo.reset()
    x, weights, bias = SMALL.operands(torch.float32)
    operands = (x, weights, SMALL.offsets, bias, "silu")
    compiled = torch.compile(grouped_linear, fullgraph=True)
    assert torch.equal(compiled(*operands), grouped_linear(*operands))


def test_export() -> None:
    model, batch = MixtureOfExperts().eval(), torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, (torch.randn(3, 8),), dynamic_shapes=({0: batch},))
    x = torch.randn(9, 8)
    torch.testing.assert_close(program.module()(x), model(x))
    assert "gossamer.grouped_linear.default" in str(program.graph)
