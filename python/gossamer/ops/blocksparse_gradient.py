"""The gradients of a product with a block-sparse weight, by its live blocks or by the dense one.

dx is the product of dy with the transposed blocks. dvalues is a registered op, linear in dy and in
x, whose own derivatives are the product and dx: so any order of derivative exists.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _C
from .._library import library
from ..formats.geometry import channels_last, taps_of
from .blocksparse_layout import Gather, ToDense
from .blocksparse_transpose import dx_by_blocks, phases_of, transpose_blocks, transposed_geometry
from .conv_geometry import check_channels, output_sizes
from .conv_operands import (
    Geometry,
    dense_gradients,
    is_channels_last,
    memory_format_of,
    stored_in_5d,
)

_OP = "blocksparse_dvalues"
_LEAST_ROWS = 4  # of a block, for whose sums reading x takes no longer than multiplying
# A linear layer of fewer rows of x is bound by writing its gradient.
_LEAST_LINEAR_ROWS = 128


library.define(
    "blocksparse_dvalues(Tensor dy, Tensor x, Tensor crow_indices, Tensor col_indices, "
    "SymInt rows, SymInt cols, SymInt[] shape, SymInt groups, SymInt[] stride, SymInt[] padding, "
    "SymInt[] dilation) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
_op = torch.ops.gossamer.blocksparse_dvalues.default


def _native(
    dy: Tensor, x: Tensor, crow: Tensor, col: Tensor, rows: int, cols: int, *numbers: Any
) -> Tensor:
    geometry = Geometry(*numbers)
    dvalues = _fake(dy, x, crow, col, rows, cols, *numbers)
    last = is_channels_last(x)
    _C.blocksparse_dvalues(
        dvalues,
        stored_in_5d(dy, last),
        stored_in_5d(x, last),
        crow.contiguous(),
        col.contiguous(),
        geometry.groups,
        *geometry.in_3d(),
        last,
        torch.get_num_threads(),
    )
    return dvalues


def _fake(
    dy: Tensor, x: Tensor, crow: Tensor, col: Tensor, rows: int, cols: int, *numbers: Any
) -> Tensor:
    geometry = Geometry(*numbers)
    check_channels(_OP, x, geometry.shape, geometry.groups)
    sizes = output_sizes(_OP, x, geometry.shape[2:], *geometry.steps)
    expected = [x.shape[0], geometry.shape[0], *sizes]
    if list(dy.shape) != expected:
        raise ValueError(f"{_OP}: dy has shape {list(dy.shape)}, expected {expected}")
    return x.new_empty((col.shape[0], rows, cols))


class Dvalues(torch.autograd.Function):
    """(dy, x, crow, col, rows, cols, *geometry) -> dvalues."""

    generate_vmap_rule = True  # for per-sample gradients

    @staticmethod
    def forward(*operands: Any) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            return _op(*operands)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        dy, x, crow, col, _, _, *ctx.geometry = inputs
        ctx.save_for_backward(dy, x, crow, col)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dy, x, crow, col = ctx.saved_tensors
        geometry = Geometry(*ctx.geometry)
        ddy = dx = None
        if ctx.needs_input_grad[0]:
            ddy = _product(x, grad, crow, col, None, None, *geometry, "none")
        if ctx.needs_input_grad[1]:
            dx = dx_of(dy, grad, crow, col, x.shape, geometry)
        return ddy, dx, *(None,) * (len(geometry) + 3)


library.impl("blocksparse_dvalues", _native, "CPU")
library.impl("blocksparse_dvalues", Dvalues.apply, "Autograd")
torch.library.register_fake("gossamer::blocksparse_dvalues", _fake, lib=library)


def dvalues_of(
    dy: Tensor,
    x: Tensor,
    crow: Tensor,
    col: Tensor,
    rows: int,
    cols: int,
    geometry: Geometry,
) -> Tensor:
    """Of blocks of this size, with 0 in their padding; differentiable in dy and x."""
    indices, groups = (crow, col), geometry.groups
    if dvalues_by_blocks(x, col.shape[0], rows, cols, geometry):
        numbers = [tuple(n) if isinstance(n, (list, tuple)) else n for n in geometry[:-1]]
        by_blocks: Tensor = Dvalues.apply(dy, x, *indices, rows, cols, *numbers)
        return by_blocks
    _, dweight = dense_gradients(dy, x, None, x.shape, geometry)
    assert dweight is not None
    gathered: Tensor = Gather.apply(channels_last(dweight), *indices, rows, cols, groups)
    return gathered


def dx_of(
    dy: Tensor,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    x_shape: Sequence[int],
    geometry: Geometry,
) -> Tensor:
    """Differentiable in dy and values."""
    if dx_by_blocks(x_shape, values, geometry):
        transposed = transposed_geometry(geometry)
        if transposed is not None:
            blocks = transpose_blocks(values, crow, col, geometry)
            by_blocks: Tensor = _product(dy, *blocks, None, None, *transposed, "none")
            return by_blocks
        # How many blocks a phase has is known where there are numbers alone, and not per sample.
        # A backward that is traced holds tensors of another type; torch 2.9 does not say more.
        traced = torch.compiler.is_compiling() or type(col) is not Tensor
        if not (traced or torch._C._are_functorch_transforms_active()):
            return _dx_by_phases(dy, (values, crow, col), x_shape, geometry)
    shape, groups = geometry.shape, geometry.groups
    dense = ToDense.apply(values, crow, col, shape[0], taps_of(shape), shape[1], groups)
    dense = dense.transpose(1, 2).reshape(shape)
    dx, _ = dense_gradients(dy, None, dense, x_shape, geometry)
    assert dx is not None
    return dx


def _dx_by_phases(
    dy: Tensor, weight: tuple[Tensor, Tensor, Tensor], x_shape: Sequence[int], geometry: Geometry
) -> Tensor:
    phases = phases_of(geometry, x_shape, dy.shape)
    memory_format = memory_format_of(dy.dim(), is_channels_last(dy))
    dx = torch.empty(x_shape, dtype=dy.dtype, device=dy.device, memory_format=memory_format)
    pixels = 1
    for step in geometry.stride:
        pixels = pixels * step
    if len(phases) < pixels:
        dx.zero_()
    for phase in phases:
        blocks = transpose_blocks(*weight, geometry, phase.taps)
        part = _product(dy, *blocks, None, None, *phase.geometry, "none")
        pixels_of, kept = (..., *phase.pixels), (..., *phase.kept)
        dx[pixels_of] = part[kept]  # type: ignore[index]
    return dx


def _product(*operands: Any) -> Tensor:
    """The op whose gradients these are."""
    from .blocksparse_product import _autograd  # which is made of these

    return _autograd(*operands)


def dvalues_by_blocks(x: Tensor, count: int, rows: int, cols: int, geometry: Geometry) -> bool:
    """Whether it is faster than torch's gradient of the dense weight, of which blocks are taken.

    Measured against that on the layers of ResNet-50: 16x16 blocks 1.4x to 5.8x at a quarter of them
    live and 1.1x to 2.1x at half, 8x8 1.6x and 0.9x, 4x4 0.8x and 1.4x at a tenth; linear layers of
    16x16 blocks 1.1x to 2.9x at a quarter. bfloat16, which CPUs multiply faster than float32, 0.7x
    to 1.7x at a quarter.
    """
    lanes = 8 if _C.target() == "avx2" else 16
    pixels = x.shape[0]
    for size in x.shape[2:]:
        pixels = pixels * size
    weights = geometry.shape[0] * geometry.shape[1] * taps_of(geometry.shape)
    # What the kernel multiplies: columns fill lanes, and blocks of few rows read x for few sums.
    multiplied = count * max(rows, _LEAST_ROWS) * (-(-cols // lanes) * lanes)
    conv = len(geometry.shape) > 2
    least_share = 8 if x.dtype == torch.bfloat16 else 2 if conv else 4
    return (
        x.is_cpu
        and x.dtype in (torch.float32, torch.float16, torch.bfloat16)
        and _C.target() != "serial"
        and least_share * multiplied <= weights
        and (conv or pixels >= _LEAST_LINEAR_ROWS)
    )
