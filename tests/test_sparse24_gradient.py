"""Derivatives of sparse24_linear and the layout ops: both orders, per sample, under autocast."""

from __future__ import annotations

from itertools import compress, product

import pytest
import torch
import torch.nn.functional as F
from cases import dense_24, sparse_24
from gossamer import reference, sparse24_linear
from gossamer.formats import Sparse24, Sparse24Panels
from gossamer.nn import SparseLinear
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap

ACTIVATIONS = (None, "relu", "gelu", "silu")
ops = torch.ops.gossamer


def leaf(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("leading", "in_features"), [((3,), 6), ((), 4), ((2, 2), 5), ((0,), 3)])
def test_first_and_second_derivatives(
    serial_target: str, leading: tuple[int, ...], in_features: int, activation: str | None
) -> None:
    sparse = sparse_24(5, in_features, torch.float64)

    def layer(x: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        weight = Sparse24(values, sparse.indices, sparse.shape)
        return sparse24_linear(x, weight, bias, activation)

    operands = (leaf(*leading, in_features), sparse.values.requires_grad_(), leaf(5))
    assert torch.autograd.gradcheck(layer, operands)
    assert torch.autograd.gradgradcheck(layer, operands)


@pytest.mark.parametrize("in_features", [1, 5, 8])
def test_layout_derivatives(serial_target: str, in_features: int) -> None:
    sparse = sparse_24(3, in_features, torch.float64)

    def to_dense(values: Tensor) -> Tensor:
        return Sparse24(values, sparse.indices, sparse.shape).to_dense()

    def gather(dense: Tensor) -> Tensor:
        return ops.sparse24_gather(dense, sparse.indices)

    for function, operand in (
        (to_dense, sparse.values.requires_grad_()),
        (gather, leaf(3, in_features)),
    ):
        assert torch.autograd.gradcheck(function, (operand,))
        assert torch.autograd.gradgradcheck(function, (operand,))


@pytest.mark.parametrize("wanted", [w for w in product([True, False], repeat=3) if any(w)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_those_of_the_dense_layer(
    target: str, dtype: torch.dtype, wanted: tuple[bool, bool, bool]
) -> None:
    dense = dense_24(20, 50, dtype)
    sparse = Sparse24.from_dense(dense)
    x, bias, upstream = torch.randn(2, 9, 50), torch.randn(20), torch.randn(2, 9, 20)
    x, bias, upstream = x.to(dtype), bias.to(dtype), upstream.to(dtype)
    operands = [x.requires_grad_(wanted[0]), sparse.values.requires_grad_(wanted[1])]
    operands += [bias.requires_grad_(wanted[2])]
    y = sparse24_linear(x, sparse, bias)
    got = torch.autograd.grad(y, list(compress(operands, wanted)), upstream)

    operands[1] = dense.requires_grad_(wanted[1])
    twin = torch.autograd.grad(F.linear(x, dense, bias), list(compress(operands, wanted)), upstream)
    for name, ours, theirs in zip(compress("xwb", wanted), got, twin, strict=True):
        kept = reference.sparse24_gather(theirs, sparse.indices) if name == "w" else theirs
        torch.testing.assert_close(ours, kept)


def test_no_gradient_is_wanted_where_none_is_asked_for() -> None:
    sparse = sparse_24(6, 12)
    assert not sparse24_linear(torch.randn(2, 12), sparse).requires_grad
    sparse.values.requires_grad_()
    with torch.no_grad():
        assert not sparse24_linear(torch.randn(2, 12), sparse).requires_grad


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_panels_pass_gradients_to_x_and_bias(target: str, activation: str | None) -> None:
    sparse = sparse_24(18, 37)
    x, bias = leaf(5, 37, dtype=torch.float32), leaf(18, dtype=torch.float32)
    for weight in (sparse, Sparse24Panels.from_sparse24(sparse)):
        grads = torch.autograd.grad(
            sparse24_linear(x, weight, bias, activation).square().sum(), (x, bias)
        )
        if weight is sparse:
            expected = grads
    torch.testing.assert_close(grads, expected)


def test_raw_op_has_the_same_gradient() -> None:
    sparse = sparse_24(6, 10)
    x, values, bias = leaf(4, 10, dtype=torch.float32), sparse.values.requires_grad_(), leaf(6)
    operands = (x, values, bias := bias.detach().float().requires_grad_())
    raw = ops.sparse24_linear(x, values, sparse.indices, bias, 10, 6, "gelu")
    public = sparse24_linear(x, sparse, bias, "gelu")
    assert torch.equal(raw, public)
    for got, want in zip(
        torch.autograd.grad(raw.sum(), operands),
        torch.autograd.grad(public.sum(), operands),
        strict=True,
    ):
        assert torch.equal(got, want)


def test_ops_without_gradient_say_so() -> None:
    sparse = sparse_24(6, 10)
    values = sparse.values.clone().requires_grad_()
    with pytest.raises(RuntimeError, match=r"sparse24_to_panels: no gradient .*; detach\(\) first"):
        ops.sparse24_to_panels(values, sparse.indices, 10)
    with pytest.raises(RuntimeError, match="sparse24_from_dense: no gradient"):
        ops.sparse24_from_dense(sparse.to_dense().requires_grad_())


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_function_transforms() -> None:
    layer = SparseLinear(10, 6)
    x = torch.randn(4, 10)
    params = dict(layer.named_parameters())

    def loss(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(layer, params, (x,)).square().sum()

    per_sample = vmap(grad(loss), in_dims=(None, 0))(params, x)
    for i, row in enumerate(x):
        expected = torch.autograd.grad(loss(params, row), list(params.values()))
        for got, want in zip(per_sample.values(), expected, strict=True):
            torch.testing.assert_close(got[i], want)
    with torch.no_grad():
        torch.testing.assert_close(vmap(layer)(x), layer(x))


def test_forward_mode_is_refused_and_not_dropped() -> None:
    sparse = sparse_24(6, 10)
    x = torch.randn(4, 10)
    with pytest.raises(NotImplementedError, match="jvp"):
        jvp(lambda x: sparse24_linear(x, sparse), (x,), (x,))
    with (
        forward_ad.dual_level(),
        torch.no_grad(),
        pytest.raises(NotImplementedError, match="jvp"),
    ):
        sparse24_linear(forward_ad.make_dual(x, x), sparse)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_as_the_dense_layer_does(dtype: torch.dtype) -> None:
    dense = nn.Linear(12, 6)
    with torch.no_grad():
        dense.weight.copy_(dense_24(6, 12))
    layer = SparseLinear.from_dense(dense)
    x = torch.randn(3, 12, requires_grad=True)
    results = []
    for module in (layer, dense):
        with torch.autocast("cpu", dtype):
            y = module(x)
        assert y.dtype == dtype
        (dx,) = torch.autograd.grad(y.float().sum(), x, retain_graph=True)
        y.float().sum().backward()
        results.append((y, dx))
    torch.testing.assert_close(results[0], results[1])
    assert layer.values is not None
    assert layer.values.grad is not None
    assert dense.weight.grad is not None
    assert layer.values.grad.dtype == torch.float32
    kept = reference.sparse24_gather(dense.weight.grad, layer.weight.indices)
    torch.testing.assert_close(layer.values.grad, kept, rtol=2e-2, atol=1e-2)

    layer.eval().pack()
    with torch.no_grad(), torch.autocast("cpu", dtype):
        y = layer(x.to(dtype))
    assert y.dtype == dtype
    # Packed, the weight stays float32: x alone was rounded.
    torch.testing.assert_close(y, F.linear(x.to(dtype).float(), dense.weight, dense.bias).to(dtype))


def test_autocast_leaves_float64_alone(serial_target: str) -> None:
    layer = SparseLinear(12, 6, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(3, 12, dtype=torch.float64)).dtype == torch.float64
