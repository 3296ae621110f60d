"""Derivatives by torch.func and batched gradients: those of the dense layers, nested ones too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from cases import sparse_24
from gossamer import (
    actsparse_linear,
    actsparse_outputs,
    grouped_linear,
    relu2_24_linear,
    sparse24_linear,
    spike_linear,
    topk_decode,
    topk_encode,
)
from gossamer.nn import TopKAutoencoder
from gossamer.prune import magnitude_24
from layer_kinds import KINDS, make, x_for
from torch import Tensor
from torch.autograd.functional import jacobian
from torch.func import grad, vmap

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same'"),
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
]

F64 = torch.float64
INDICES = torch.randint(0, 8, (4, 3))
GATE = torch.rand(2, 3, 5) < 0.5
Function = Callable[..., Tensor]


def operands(*shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.randn(shape, dtype=F64) for shape in shapes)


def grouped(x: Tensor, weights: Tensor) -> Tensor:
    return torch.cat([F.linear(x[:1], weights[0]), F.linear(x[1:], weights[2])])


# name -> ours, the dense one, and what both are called with.
FUNCTIONS: dict[str, tuple[Function, Function, tuple[Tensor, ...]]] = {
    "grouped": (
        lambda x, w: grouped_linear(x, w, torch.tensor([1, 1, 4])),
        grouped,
        operands((4, 8), (3, 6, 8)),
    ),
    "decode": (
        lambda v, w: topk_decode(v, INDICES, w),
        lambda v, w: torch.einsum("tk,tkd->td", v, w[INDICES]),
        operands((4, 3), (8, 6)),
    ),
    "encode": (
        lambda x, w: topk_encode(x, w, k=3)[0],
        lambda x, w: F.linear(x, w).topk(3).values.relu(),
        operands((4, 6), (8, 6)),
    ),
    "squared ReLU": (
        relu2_24_linear,
        lambda x, w: magnitude_24(x.relu().square()) @ w.t(),
        operands((4, 8), (6, 8)),
    ),
    "active inputs": (actsparse_linear, torch.matmul, operands((2, 3, 8), (8, 6))),
    "wanted outputs": (
        lambda x, w: actsparse_outputs(x, w, GATE),
        lambda x, w: torch.where(GATE, F.linear(x, w), 0),
        operands((2, 3, 8), (5, 8)),
    ),
    "spikes": (spike_linear, torch.matmul, ((torch.rand(4, 11) < 0.4).to(F64), *operands((11, 6)))),
}


def second(function: Function, given: tuple[Tensor, ...], inner: int, outer: int) -> Tensor:
    """d/d outer of the squared length of d/d inner: both by torch.func."""

    def length(*given: Tensor) -> Tensor:
        return grad(lambda *given: function(*given).pow(3).sum(), inner)(*given).square().sum()

    return grad(length, outer)(*given)


@pytest.mark.parametrize("inner", [0, 1])
@pytest.mark.parametrize("outer", [0, 1])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_of_gradients(name: str, inner: int, outer: int) -> None:
    function, dense, given = FUNCTIONS[name]
    wanted = second(dense, given, inner, outer)
    torch.testing.assert_close(second(function, given, inner, outer), wanted)
    given = tuple(t.clone().requires_grad_() for t in given)
    (first,) = torch.autograd.grad(function(*given).pow(3).sum(), given[inner], create_graph=True)
    torch.testing.assert_close(torch.autograd.grad(first.square().sum(), given[outer])[0], wanted)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_inside_of_a_transform_of_something_else(name: str) -> None:
    function, dense, given = FUNCTIONS[name]

    def scaled(function: Function) -> Function:
        return lambda x, scale: function(x, given[1]) * scale

    one = torch.ones((), dtype=F64)
    wanted = second(scaled(dense), (given[0], one), 1, 0)
    torch.testing.assert_close(second(scaled(function), (given[0], one), 1, 0), wanted)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_of_samples_side_by_side(name: str) -> None:
    """Within vmap nothing says that a transform, or autograd, around it differentiates."""
    function, dense, (x, weight) = FUNCTIONS[name]
    samples = torch.stack([x, x.roll(1, 0)])

    def total(function: Function) -> Function:
        return lambda x, w: vmap(function, (0, None))(x, w).square().sum()

    for argument in (0, 1):
        wanted = grad(total(dense), argument)(samples, weight)
        found = grad(total(function), argument)(samples, weight)
        torch.testing.assert_close(found, wanted)
        given = [samples.clone(), weight.clone()]
        given[argument].requires_grad_()
        (by_autograd,) = torch.autograd.grad(total(function)(*given), given[argument])
        torch.testing.assert_close(by_autograd, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_layers_of_samples_side_by_side(kind: str) -> None:
    layer = make(kind, dtype=F64).requires_grad_(False)
    samples = torch.stack([x_for(kind, F64) for _ in range(2)])
    dense = layer.to_dense()
    wanted = grad(lambda x: dense(x.flatten(0, 1)).square().sum())(samples)
    found = grad(lambda x: vmap(layer)(x).square().sum())(samples)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_functionalized(kind: str) -> None:
    layer, x = make(kind, dtype=F64).requires_grad_(False), x_for(kind, F64)
    torch.testing.assert_close(torch.func.functionalize(layer)(x), layer(x))
    weight = torch.func.functionalize(lambda: layer.weight.to_dense())()
    torch.testing.assert_close(weight, layer.weight.to_dense())


@pytest.mark.parametrize("kind", KINDS)
def test_layers(kind: str) -> None:
    layer, x = make(kind, dtype=F64), x_for(kind, F64)
    dense = layer.to_dense()
    torch.testing.assert_close(second(layer, (x,), 0, 0), second(dense, (x,), 0, 0))
    torch.testing.assert_close(jacobian(layer, x, vectorize=True), jacobian(dense, x))

    def square(values: Tensor) -> Tensor:
        return replace(layer.weight, values=values).to_dense().square().sum()

    torch.testing.assert_close(grad(square)(layer.values.detach()), 2 * layer.values.detach())

    def run(values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"values": values}, (x,))

    values = layer.values.detach()
    torch.testing.assert_close(jacobian(run, values, vectorize=True), jacobian(run, values))


def test_the_dense_form_of_2_4() -> None:
    weight = sparse_24(6, 11, F64)

    def run(x: Tensor, values: Tensor) -> Tensor:
        return x @ replace(weight, values=values).to_dense().t()

    def product(x: Tensor, values: Tensor) -> Tensor:
        return sparse24_linear(x, replace(weight, values=values))

    given = (torch.randn(3, 11, dtype=F64), weight.values)
    for inner in (0, 1):
        torch.testing.assert_close(second(run, given, inner, 1), second(product, given, inner, 1))


@pytest.mark.parametrize("name", ["active inputs", "wanted outputs"])
def test_batched_gradients(name: str) -> None:
    function, dense, given = FUNCTIONS[name]
    wanted = jacobian(dense, given)
    torch.testing.assert_close(jacobian(function, given, vectorize=True), wanted)


def test_autoencoders_of_each_sample() -> None:
    layer, x = TopKAutoencoder(8, 32, 4, dtype=F64), torch.randn(2, 3, 8, dtype=F64)
    torch.testing.assert_close(vmap(layer)(x), torch.stack([layer(sample) for sample in x]))
    got = vmap(grad(lambda x: layer(x).square().sum()))(x)
    given = x.clone().requires_grad_()
    torch.testing.assert_close(got, torch.autograd.grad(layer(given).square().sum(), given)[0])
