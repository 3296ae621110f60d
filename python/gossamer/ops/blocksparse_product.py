"""The registered op of block-sparse products: y = act(W * x + b + residual).

A linear layer is the convolution of no axes. ``product`` applies autocast, ``_autograd`` picks the
gradient or goes below it, ``native`` allocates the result and crosses into C++.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _C
from .._cuda_module import on_cuda
from .._library import is_recorded, library
from ..formats.blocksparse_panels import blocks_to_panels, panels_to_blocks
from .blocksparse_gradient import dvalues_of, dx_of
from .conv_operands import (
    Geometry,
    as_5d,
    check_residual,
    empty_result,
    finish,
    is_channels_last,
    residual_in_5d,
)
from .operands import (
    activation_of,
    all_autocast_to,
    apply_function,
    autocast_dtype,
    autocast_to,
    check_devices,
    check_dtypes,
    gradient_wanted,
    saved_for,
)

LINEAR, CONV = "blocksparse_linear", "blocksparse_conv"


def product(
    op: str,
    x: Tensor,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    *rest: Any,
) -> Tensor:
    autocast = autocast_dtype(x)
    if autocast is not None:
        if values.dim() == 3:
            values = autocast_to(values, autocast)
        # Panels keep their dtype: rewriting them at every call would cost more than the product.
        x, bias, residual = all_autocast_to(values.dtype, x, bias, residual)
    check_dtypes(op, values.dtype, x=x, bias=bias, residual=residual)
    # Eager code skips the dispatcher's Python call of the autograd kernel.
    call = _op if is_recorded() else _autograd
    y: Tensor = call(x, values, crow, col, bias, residual, *rest)
    return y if autocast is None else autocast_to(y, autocast)


library.define(
    "blocksparse_product(Tensor x, Tensor values, Tensor crow_indices, Tensor col_indices, "
    "Tensor? bias, Tensor? residual, SymInt[] shape, SymInt groups, SymInt[] stride, "
    "SymInt[] padding, SymInt[] dilation, int packed_cols, str activation) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
_op = torch.ops.gossamer.blocksparse_product.default


def _op_of(geometry: Geometry) -> str:
    """The public function, for the error messages."""
    return CONV if len(geometry.shape) > 2 else LINEAR


def native(
    x: Tensor,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    *rest: Any,
    way: tuple[str, int, int, int] | None = None,
) -> Tensor:
    *numbers, activation = rest
    geometry = Geometry(*numbers)
    last = is_channels_last(x)
    y = empty_result(_op_of(geometry), x, bias, geometry)
    given = as_5d(x.contiguous() if x.dim() == 2 or not last else x, last)
    added = residual_in_5d(_op_of(geometry), residual, y, last)
    result = room = as_5d(y, last)
    runs = reads_channels(x.dtype, x.shape[1] // geometry.groups, values.shape[2])
    turned = not last and _is_cuda(x) and runs
    if turned:
        given = given.movedim(1, -1).contiguous()
        room = result.new_empty(result.movedim(1, -1).shape)
        added = None if added is None else added.movedim(1, -1).contiguous()
    _C.blocksparse_conv(
        room,
        given,
        values.contiguous(),
        crow.contiguous(),
        col.contiguous(),
        None if bias is None else bias.contiguous(),
        added,
        geometry.groups,
        *geometry.in_3d(),
        last or turned,
        geometry.packed_cols,
        activation,
        torch.get_num_threads(),
        way,
    )
    if turned:
        result.copy_(room.movedim(-1, 1))
    return y


def reads_channels(dtype: torch.dtype, group_in: int, cols: int) -> bool:
    """Whether a GPU's kernel copies channels that lie side by side, by 16 bytes.

    For those of its tensor cores it takes less time to turn x and y over than to gather channels
    that lie apart, for every tap and tile of outputs once more.
    """
    return dtype.itemsize == 2 and group_in % 8 == 0 and cols % 8 == 0


def _is_cuda(t: Tensor) -> bool:
    return t.is_cuda


def _fake(
    x: Tensor,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    *rest: Any,
) -> Tensor:
    *numbers, activation = rest
    geometry = Geometry(*numbers)
    activation_of(_op_of(geometry), activation)
    indices = {"crow_indices": crow, "col_indices": col}
    check_devices(_op_of(geometry), x, weight=values, **indices, bias=bias, residual=residual)
    y = empty_result(_op_of(geometry), x, bias, geometry)
    check_residual(_op_of(geometry), residual, y.shape)
    return y


def _autograd(
    x: Tensor,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    *rest: Any,
) -> Tensor:
    if gradient_wanted(x, values, bias, residual):
        *numbers, activation = rest
        # Lists as tuples: functorch keeps them.
        numbers = [tuple(n) if isinstance(n, (list, tuple)) else n for n in numbers]
        y: Tensor = _apply_product(x, values, crow, col, bias, *numbers)
        # Outside, for torch to differentiate.
        return finish(_op_of(Geometry(*numbers)), y, residual, activation)
    with torch._C._AutoDispatchBelowAutograd():
        return _op(x, values, crow, col, bias, residual, *rest)


library.impl("blocksparse_product", native, "CPU")
library.impl("blocksparse_product", on_cuda("blocksparse_product", native), "CUDA")
library.impl("blocksparse_product", _autograd, "Autograd")
torch.library.register_fake("gossamer::blocksparse_product", _fake, lib=library)


class _Product(torch.autograd.Function):
    """The gradients, by blocks or through the dense weight."""

    generate_vmap_rule = True  # for per-sample gradients

    @staticmethod
    def forward(*operands: Any) -> Tensor:
        tensors, numbers = operands[:5], operands[5:]
        with torch._C._AutoDispatchBelowAutograd():
            return _op(*tensors, None, *numbers, "none")

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, values, crow, col, _, *ctx.geometry = inputs
        ctx.x_shape = x.shape
        packed_cols = Geometry(*ctx.geometry).packed_cols
        ctx.block = (values.shape[2], packed_cols) if packed_cols else values.shape[1:]
        # x serves dvalues alone, and the values dx alone.
        ctx.save_for_backward(saved_for(values, x), saved_for(x, values), crow, col)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, values, crow, col = ctx.saved_tensors
        geometry = Geometry(*ctx.geometry)
        dx = dvalues = db = None
        if values is not None:
            if geometry.packed_cols:
                values = panels_to_blocks(values, geometry.packed_cols)
            dx = dx_of(dy, values, crow, col, ctx.x_shape, geometry)
        if x is not None:
            rows, cols = ctx.block
            dvalues = dvalues_of(dy, x, crow, col, rows, cols, geometry)
            if geometry.packed_cols:
                dvalues = blocks_to_panels(dvalues)
        if ctx.needs_input_grad[4]:
            db = dy.sum([axis for axis in range(dy.dim()) if axis != 1])
        return dx, dvalues, None, None, db, *(None,) * len(geometry)


_apply_product = apply_function(_Product)
