"""The two products that the gradient of ``grouped_linear`` is made of, as registered ops.

Of each expert, with its tokens' rows of dy [T, N] and x [T, K]:

    grouped_input   dx [T, K] = dy W
    grouped_weight  dW [E, N, K] = dyᵀ x

Both and ``grouped_linear`` itself are bilinear, and the derivatives of each are the two others, so
any order of derivative exists. They are products of torch, one an expert, or on a GPU kernels
(``grouped_cuda``).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .. import _C
from .._library import library
from .._wide import has_loops_only, matmul
from . import grouped_cuda


def groups_of(offsets: Tensor, experts: int, tokens: int) -> Iterator[tuple[int, slice]]:
    """Each expert with the rows of its tokens, which may be none; all offsets are checked first."""
    begin = 0
    for expert, end in enumerate(_C.grouped_ends(offsets.cpu().contiguous(), experts, tokens)):
        yield expert, slice(begin, end)
        begin = end


def _write_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    if has_loops_only(a):
        out.copy_(matmul(a, b))
    else:
        torch.mm(a, b, out=out)


def _input_native(dy: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    dx = _input_fake(dy, weights, offsets)
    for expert, tokens in groups_of(offsets, len(weights), len(dy)):
        _write_product(dx[tokens], dy[tokens], weights[expert])
    return dx


def _input_native_cuda(dy: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    if not grouped_cuda.has_cuda_kernel(dy):
        return _input_native(dy, weights, offsets)
    return grouped_cuda.input_gradient(dy, weights, offsets, _input_fake(dy, weights, offsets))


def _input_fake(dy: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    return dy.new_empty((dy.shape[0], weights.shape[2]))


def _weight_native(dy: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    dweights = _weight_fake(dy, x, offsets)
    for expert, tokens in groups_of(offsets, len(offsets), len(dy)):
        left = dy[tokens].t()
        # oneDNN's 16-bit product takes twice as long where its left side lies transposed.
        left = left.contiguous() if dy.dtype.itemsize == 2 else left
        _write_product(dweights[expert], left, x[tokens])
    return dweights


def _weight_native_cuda(dy: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    if not grouped_cuda.has_cuda_kernel(dy):
        return _weight_native(dy, x, offsets)
    return grouped_cuda.weight_gradient(dy, x, offsets, _weight_fake(dy, x, offsets))


def _weight_fake(dy: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    return dy.new_empty((offsets.shape[0], dy.shape[1], x.shape[1]))


for _name, _operand, _native, _native_cuda, _fake in (
    ("grouped_input", "weights", _input_native, _input_native_cuda, _input_fake),
    ("grouped_weight", "x", _weight_native, _weight_native_cuda, _weight_fake),
):
    library.define(
        f"{_name}(Tensor dy, Tensor {_operand}, Tensor offsets) -> Tensor",
        tags=torch.Tag.pt2_compliant_tag,
    )
    library.impl(_name, _native, "CPU")
    library.impl(_name, _native_cuda, "CUDA")
    torch.library.register_fake(f"gossamer::{_name}", _fake, lib=library)

_input = torch.ops.gossamer.grouped_input.default
_weight = torch.ops.gossamer.grouped_weight.default


def _linear(x: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    from .grouped import _autograd  # which is made of these

    y: Tensor = _autograd(x, weights, offsets, None, "none")
    return y


class Input(torch.autograd.Function):
    """dx = dy W of each expert."""

    generate_vmap_rule = True

    @staticmethod
    def forward(dy: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            return _input(dy, weights, offsets)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dy, weights, offsets = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        return (
            _linear(grad, weights, offsets) if wanted[0] else None,
            Weight.apply(dy, grad, offsets) if wanted[1] else None,
            None,
        )


class Weight(torch.autograd.Function):
    """dW = dyᵀ x of each expert; zeros where it has no token."""

    generate_vmap_rule = True

    @staticmethod
    def forward(dy: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            return _weight(dy, x, offsets)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dy, x, offsets = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        return (
            _linear(x, grad, offsets) if wanted[0] else None,
            Input.apply(dy, grad, offsets) if wanted[1] else None,
            None,
        )


library.impl("grouped_input", Input.apply, "Autograd")
library.impl("grouped_weight", Weight.apply, "Autograd")
