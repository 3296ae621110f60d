"""The two products that the gradient of ``csr_linear`` is made of, as registered ops.

With dy [M, N] and x [M, K]:

    csr_input   dx [M, K] = dy W, the product with the transposed pattern
    csr_values  dvalues [nnz] = dyᵀ x at the live places

Both and ``csr_linear`` itself are bilinear, and the derivatives of each are the two others, so any
order of derivative exists.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _C
from .._library import library
from ..formats import SparseCsr
from .csr_pattern import checked_pattern, transposed
from .operands import row_major

_INPUT, _VALUES = "csr_input", "csr_values"


def dense_of(values: Tensor, crow: Tensor, col: Tensor, shape: tuple[int, int]) -> Tensor:
    """The dense weight: what a GPU multiplies with."""
    checked_pattern("csr_linear", crow, col, shape)
    return SparseCsr(values, crow, col, shape).to_dense()


def _input_native(dy: Tensor, values: Tensor, crow: Tensor, col: Tensor, inputs: int) -> Tensor:
    dx = _input_fake(dy, values, crow, col, inputs)
    rows, columns, source = transposed(_INPUT, crow, col, (crow.shape[0] - 1, inputs))
    threads, turned = torch.get_num_threads(), values.new_empty(values.shape)
    _C.csr_gather(turned, values.contiguous(), source, threads)
    _C.csr_linear(dx, row_major(dy), turned, rows, columns, None, "none", threads)
    return dx


def _input_cuda(dy: Tensor, values: Tensor, crow: Tensor, col: Tensor, inputs: int) -> Tensor:
    dx = _input_fake(dy, values, crow, col, inputs)
    return dx.copy_(dy @ dense_of(values, crow, col, (crow.shape[0] - 1, inputs)))


def _input_fake(dy: Tensor, values: Tensor, crow: Tensor, col: Tensor, inputs: int) -> Tensor:
    if dy.dim() != 2 or dy.shape[1] != crow.shape[0] - 1:
        raise ValueError(
            f"{_INPUT}: dy has shape {list(dy.shape)}, expected [rows, {crow.shape[0] - 1}]"
        )
    return dy.new_empty((dy.shape[0], inputs))


def _values_native(dy: Tensor, x: Tensor, crow: Tensor, col: Tensor) -> Tensor:
    dvalues = _values_fake(dy, x, crow, col)
    checked_pattern(_VALUES, crow, col, (dy.shape[1], x.shape[1]))
    indices = (crow.contiguous(), col.contiguous())
    _C.csr_dvalues(dvalues, row_major(dy), row_major(x), *indices, torch.get_num_threads())
    return dvalues


def _values_cuda(dy: Tensor, x: Tensor, crow: Tensor, col: Tensor) -> Tensor:
    shape = (dy.shape[1], x.shape[1])
    checked_pattern(_VALUES, crow, col, shape)
    keys = SparseCsr(x.new_empty(col.shape[0]), crow, col, shape).keys()
    return (dy.t() @ x).flatten()[keys]


def _values_fake(dy: Tensor, x: Tensor, crow: Tensor, col: Tensor) -> Tensor:
    return x.new_empty((col.shape[0],))


library.define(
    f"{_INPUT}(Tensor dy, Tensor values, Tensor crow_indices, Tensor col_indices, SymInt inputs) "
    "-> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
library.define(
    f"{_VALUES}(Tensor dy, Tensor x, Tensor crow_indices, Tensor col_indices) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
for _name, _native, _cuda, _fake in (
    (_INPUT, _input_native, _input_cuda, _input_fake),
    (_VALUES, _values_native, _values_cuda, _values_fake),
):
    library.impl(_name, _native, "CPU")
    library.impl(_name, _cuda, "CUDA")
    torch.library.register_fake(f"gossamer::{_name}", _fake, lib=library)

_input = torch.ops.gossamer.csr_input.default
_values = torch.ops.gossamer.csr_values.default


def _linear(x: Tensor, values: Tensor, crow: Tensor, col: Tensor, outputs: int) -> Tensor:
    from .csr import _autograd  # which is made of these

    y: Tensor = _autograd(x, values, crow, col, None, outputs, "none")
    return y


class Input(torch.autograd.Function):
    """(dy, values, crow, col, inputs) -> dx."""

    generate_vmap_rule = True

    @staticmethod
    def forward(dy: Tensor, values: Tensor, crow: Tensor, col: Tensor, inputs: int) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            return _input(dy, values, crow, col, inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:4])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dy, values, crow, col = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        return (
            _linear(grad, values, crow, col, dy.shape[1]) if wanted[0] else None,
            Values.apply(dy, grad, crow, col) if wanted[1] else None,
            *(None,) * 3,
        )


class Values(torch.autograd.Function):
    """(dy, x, crow, col) -> dvalues."""

    generate_vmap_rule = True

    @staticmethod
    def forward(dy: Tensor, x: Tensor, crow: Tensor, col: Tensor) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            return _values(dy, x, crow, col)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dy, x, crow, col = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        return (
            _linear(x, grad, crow, col, dy.shape[1]) if wanted[0] else None,
            Input.apply(dy, grad, crow, col, x.shape[1]) if wanted[1] else None,
            *(None,) * 2,
        )


library.impl(_INPUT, Input.apply, "Autograd")
library.impl(_VALUES, Values.apply, "Autograd")
