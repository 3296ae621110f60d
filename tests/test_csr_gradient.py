"""Derivatives of unstructured linear layers, and what torch's compilers see of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from csr_cases import CsrCase
from gossamer import Unstructured, csr_linear
from gossamer.formats import SparseCsr
from gossamer.nn import SparseLinear
from gossamer.ops import csr_pattern
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap

ops = torch.ops.gossamer
SMALL = CsrCase(3, 5, 6, 0.5)


@pytest.mark.parametrize("activation", [None, "gelu"])
def test_first_and_second_derivatives(serial_target: str, activation: str | None) -> None:
    x, weight, bias = SMALL.operands(torch.float64)

    def layer(x: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        return csr_linear(x, replace(weight, values=values), bias, activation)

    operands = tuple(t.clone().requires_grad_() for t in (x, weight.values, bias))
    assert torch.autograd.gradcheck(layer, operands)
    assert torch.autograd.gradgradcheck(layer, operands)


@pytest.mark.parametrize("alone", range(3))
def test_any_operand_alone(alone: int) -> None:
    x, weight, bias = SMALL.operands(torch.float32)
    operands = [x, weight.values.clone(), bias]

    def layer() -> Tensor:
        return csr_linear(operands[0], replace(weight, values=operands[1]), operands[2]).sum()

    operands[alone].requires_grad_()
    (want,) = torch.autograd.grad(layer(), operands[alone])
    for operand in operands:
        operand.requires_grad_()
    # A sum's gradient is expanded, with strides of zero.
    layer().backward()
    assert torch.equal(operands[alone].grad, want)


def test_the_transposed_pattern_is_made_once_and_goes_with_the_indices() -> None:
    layer = SparseLinear(40, 30, pattern=Unstructured(0.2))
    x = torch.randn(6, 40, requires_grad=True)
    found = []
    for _ in range(2):
        layer(x).sum().backward()
        found.append(csr_pattern._known[layer.col_indices].transposed)
    assert found[0] is found[1] is not None
    layer.crow_indices.add_(0)  # counts as a change
    layer(x).sum().backward()
    assert csr_pattern._known[layer.col_indices].transposed is not found[0]
    before = len(csr_pattern._known)
    del layer
    assert len(csr_pattern._known) == before - 1


def test_the_raw_op_wants_a_column_of_dy_for_each_output() -> None:
    layer = SparseLinear(40, 10, pattern=Unstructured(0.5))
    weight = layer.weight
    arguments = (weight.values.detach(), weight.crow_indices, weight.col_indices, 40)
    with pytest.raises(ValueError, match=r"dy has shape \[2, 3\], expected \[rows, 10\]"):
        torch.ops.gossamer.csr_input(torch.ones(2, 3), *arguments)


def test_other_memory_is_another_pattern() -> None:
    a, b = (SparseLinear(40, 10, pattern=Unstructured(0.5)) for _ in range(2))
    x = torch.randn(3, 40, requires_grad=True)
    a(x).sum().backward()
    a.col_indices.data, a.crow_indices.data = b.col_indices.clone(), b.crow_indices.clone()
    x.grad = None
    a(x).sum().backward()
    torch.testing.assert_close(x.grad, a.weight.to_dense().detach().sum(0).expand(3, 40))


def test_a_pattern_that_was_changed_unseen_is_transposed_again() -> None:
    x = torch.randn(5, 30, requires_grad=True)
    dense = torch.randn(12, 30) * (torch.rand(12, 30) < 0.3)
    weight, other = SparseCsr.from_dense(dense), SparseCsr.from_dense(dense.flip(1))
    csr_linear(x, weight).sum().backward()
    weight.col_indices.numpy()[:] = other.col_indices.numpy()  # as .data and collectives do
    x.grad = None
    csr_linear(x, weight).sum().backward()
    changed = SparseCsr(weight.values, weight.crow_indices, other.col_indices, (12, 30))
    torch.testing.assert_close(x.grad, changed.to_dense().sum(0).expand(5, -1))
    weight.col_indices.numpy()[0] = -1
    with pytest.raises(ValueError, match=r"col_indices\[0\] is -1"):
        csr_linear(x, weight).sum().backward()


def test_no_rows_have_gradients_of_zero() -> None:
    layer, x = SparseLinear(6, 5, pattern=Unstructured(0.5)), torch.zeros(0, 6, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.shape == (0, 6)
    assert not layer.values.grad.any()
    assert not layer.bias.grad.any()


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_function_transforms() -> None:
    layer = SparseLinear(6, 5, pattern=Unstructured(0.5))
    params, x = dict(layer.named_parameters()), torch.randn(2, 3, 6)

    def loss(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(layer, params, (x,)).square().sum()

    per_sample = vmap(grad(loss), in_dims=(None, 0))(params, x)
    for i, sample in enumerate(x):
        expected = torch.autograd.grad(loss(params, sample), list(params.values()))
        for got, want in zip(per_sample.values(), expected, strict=True):
            torch.testing.assert_close(got[i], want)
    with pytest.raises(NotImplementedError, match="jvp"):
        jvp(layer, (x[0],), (x[0],))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    layer = SparseLinear(60, 50, pattern=Unstructured(0.3))
    x = torch.randn(5, 60, requires_grad=True)
    with torch.autocast("cpu", dtype):
        y, twin = layer(x), layer.to_dense()(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y, twin)
    y.float().sum().backward()
    assert x.grad.dtype == layer.values.grad.dtype == torch.float32


@pytest.mark.parametrize("gradient", [False, True])
def test_opcheck(gradient: bool) -> None:
    x, weight, bias = SMALL.operands(torch.float32)
    x, values, bias = (t.clone().requires_grad_(gradient) for t in (x, weight.values, bias))
    dy = torch.randn(3, 5, requires_grad=gradient)
    indices = (weight.crow_indices, weight.col_indices)
    torch.library.opcheck(ops.csr_linear, (x, values, *indices, bias, 5, "silu"))
    torch.library.opcheck(ops.csr_linear, (x, values, *indices, None, 5, "none"))
    torch.library.opcheck(ops.csr_input, (dy, values, *indices, 6))
    torch.library.opcheck(ops.csr_values, (dy, x, *indices))


def net() -> nn.Module:
    return nn.Sequential(
        SparseLinear(20, 30, pattern=Unstructured(0.2)),
        nn.ReLU(),
        SparseLinear(30, 10, pattern=Unstructured(0.3)),
    )


def test_compiled_training_matches_eager() -> None:
    torch._dynamo.reset()
    model = net()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (3, 20):
        x = torch.randn(rows, 20, requires_grad=True)
        operands: list[Any] = [x, *model.parameters()]
        expected, got = model(x), compiled(x)
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(
            torch.autograd.grad(got.square().sum(), operands),
            torch.autograd.grad(expected.square().sum(), operands),
        )


def test_inductor_calls_the_op() -> None:
    torch._dynamo.reset()
    x, weight, bias = SMALL.operands(torch.float32)
    compiled = torch.compile(csr_linear, fullgraph=True)
    assert torch.equal(compiled(x, weight, bias, "silu"), csr_linear(x, weight, bias, "silu"))


def test_compiled_format_as_an_argument() -> None:
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def function(x: Tensor, weight: SparseCsr) -> Tensor:
        return csr_linear(x, weight, activation="silu")

    x, weight, _ = SMALL.operands(torch.float32)
    torch.testing.assert_close(function(x, weight), csr_linear(x, weight, activation="silu"))


def test_export() -> None:
    model, batch = net().eval(), torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, (torch.randn(3, 20),), dynamic_shapes=({0: batch},))
    x = torch.randn(9, 20)
    torch.testing.assert_close(program.module()(x), model(x))
    assert "gossamer.csr_linear.default" in str(program.graph)
