"""Linear layers and convolutions with a block-sparse weight: y = act(W * x + b + residual).

Both are one registered op, ``blocksparse_product``: a linear layer is the convolution of no axes.
``_product`` applies autocast, ``_autograd`` picks the gradient or goes below it, ``_native``
allocates the result and crosses into C++.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _C
from .._cuda_module import on_cuda
from .._library import is_recorded, library
from ..formats import BlockSparse, BlockSparsePanels
from ..formats.blocksparse_panels import blocks_to_panels, panels_to_blocks
from .blocksparse_gradient import dvalues_of, dx_of
from .conv_geometry import Sizes, prepare
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
    apply_function,
    as_rows,
    autocast_dtype,
    autocast_to,
    check_devices,
    check_dtypes,
    check_features,
    gradient_wanted,
)

_LINEAR, _CONV = "blocksparse_linear", "blocksparse_conv"


def blocksparse_linear(
    x: Tensor,
    weight: BlockSparse | BlockSparsePanels,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Linear layer with a block-sparse weight: ``act(x @ W.T + bias + residual)``.

    Sums run over the live blocks only: a NaN or an infinity in ``x`` goes through every position
    of a live block, zeros included, and never through the others.

    Parameters
    ----------
    x : Tensor
        [..., K] in the weight's dtype, of any strides; leading dimensions may be empty.
    weight : BlockSparse or BlockSparsePanels
        The [N, K] weight. Gradients flow to its values or panels.
    bias : Tensor, optional
        [N] in the weight's dtype.
    activation : {None, "relu", "gelu", "silu"}
        Applied to the sum; "gelu" is the exact one, by erf.
    residual : Tensor, optional
        [..., N] in the weight's dtype, added before the activation: see ``blocksparse_conv``.

    Returns
    -------
    Tensor
        [..., N] in the dtype of ``x``, contiguous. Under autocast x, weight, bias and residual are
        cast to autocast's dtype first, as by ``torch.nn.functional.linear``; panels are read in
        their own dtype and the result is returned in autocast's.

    Raises
    ------
    TypeError
        If ``weight`` is not one of the two formats, or dtypes differ.
    ValueError
        If shapes or devices do not match, the indices are not valid, or the activation is unknown.
    """
    check_format(_LINEAR, weight)
    if len(weight.shape) != 2:
        raise ValueError(
            f"{_LINEAR}: a weight of shape {list(weight.shape)} is a convolution's: "
            "gossamer.blocksparse_conv"
        )
    blocks, cols = _stored(weight)
    activation = activation or "none"
    return blocksparse_linear_tensors(
        x, *blocks, bias, weight.shape, activation, cols, residual=residual
    )


def blocksparse_linear_tensors(
    x: Tensor,
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    bias: Tensor | None,
    shape: tuple[int, ...],
    activation: str = "none",
    packed_cols: int = 0,
    residual: Tensor | None = None,
) -> Tensor:
    """``blocksparse_linear`` on values, or on panels of blocks of ``packed_cols`` columns."""
    dims = x.dim()
    check_features(_LINEAR, x, dims, shape[1])
    blocks = (values, crow_indices, col_indices)
    rest = (shape, 1, (), (), (), packed_cols, activation)
    if residual is not None:
        check_residual(_LINEAR, residual, (*x.shape[:-1], shape[0]))
        residual = as_rows(residual, dims)
    y = _product(_LINEAR, as_rows(x, dims), *blocks, bias, residual, *rest)
    return y if dims == 2 else y.view(*x.shape[:-1], shape[0])


def blocksparse_conv(
    x: Tensor,
    weight: BlockSparse | BlockSparsePanels,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: Sizes | str = 0,
    dilation: Sizes = 1,
    padding_mode: str = "zeros",
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Convolution with a block-sparse weight, of as many axes as its kernel has: 1, 2 or 3.

    Sums run over the live blocks only: a NaN or an infinity in ``x`` goes through every position
    of a live block, zeros included, and never through the others.

    Parameters
    ----------
    x : Tensor
        [batch, C_in, *extents] in the weight's dtype, of any strides; or without batch. The batch
        may be empty.
    weight : BlockSparse or BlockSparsePanels
        The [C_out, C_in / groups, *kernel size] weight; the groups are its own. Gradients flow to
        its values or panels.
    bias : Tensor, optional
        [C_out] in the weight's dtype.
    stride, dilation : int or sequence of int
        As for ``torch.nn.functional.conv2d``.
    padding : int, sequence of int, "same" or "valid"
        As for ``torch.nn.functional.conv2d``; "same" needs stride 1.
    padding_mode : {"zeros", "reflect", "replicate", "circular"}
        As for ``torch.nn.Conv2d``.
    activation : {None, "relu", "gelu", "silu"}
        Applied to the sum; "gelu" is the exact one, by erf.
    residual : Tensor, optional
        In the result's shape and the weight's dtype, added before the activation. On a CPU that is
        one pass over the result, with one rounding at its end; where a gradient is wanted or x is
        on a GPU, torch adds to the rounded result of the convolution. It is read fastest in the
        memory format of ``x``.

    Returns
    -------
    Tensor
        [batch, C_out, *extents] in the dtype and the memory format (contiguous or channels-last)
        of ``x``. Under autocast x, weight, bias and residual are cast to autocast's dtype first;
        panels are read in their own dtype and the result is returned in autocast's.

    Raises
    ------
    TypeError
        If ``weight`` is not one of the two formats, or dtypes differ.
    ValueError
        If shapes or devices do not match, the kernel is larger than the padded x, the indices are
        not valid, or another argument is none of those above.
    """
    check_format(_CONV, weight)
    if len(weight.shape) == 2:
        raise ValueError(
            f"{_CONV}: a weight of shape {list(weight.shape)} is a linear layer's: "
            "gossamer.blocksparse_linear"
        )
    blocks, packed_cols = _stored(weight)
    return blocksparse_conv_tensors(
        x,
        *blocks,
        bias,
        weight.shape,
        weight.groups,
        stride,
        padding,
        dilation,
        padding_mode,
        activation or "none",
        packed_cols,
        residual,
    )


def blocksparse_conv_tensors(
    x: Tensor,
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    bias: Tensor | None,
    shape: tuple[int, ...],
    groups: int,
    stride: Sizes = 1,
    padding: Sizes | str = 0,
    dilation: Sizes = 1,
    padding_mode: str = "zeros",
    activation: str = "none",
    packed_cols: int = 0,
    residual: Tensor | None = None,
) -> Tensor:
    """``blocksparse_conv`` on values, or on panels of blocks of ``packed_cols`` columns."""
    conv = prepare(_CONV, x, shape, groups, stride, padding, dilation, padding_mode)
    blocks, steps = (values, crow_indices, col_indices), (conv.stride, conv.padding, conv.dilation)
    rest = (tuple(shape), groups, *steps, packed_cols, activation)
    return conv.result(_product(_CONV, conv.x, *blocks, bias, conv.batch_of(residual), *rest))


def check_format(op: str, weight: object) -> None:
    if not isinstance(weight, (BlockSparse, BlockSparsePanels)):
        raise TypeError(
            f"{op}: weight is {type(weight).__name__}, expected BlockSparse or BlockSparsePanels "
            "(gossamer.formats.BlockSparse.from_dense makes one of a dense weight)"
        )


def _stored(weight: BlockSparse | BlockSparsePanels) -> tuple[tuple[Tensor, Tensor, Tensor], int]:
    """The tensors of a weight, and the columns of its blocks where they are packed, else 0."""
    indices = (weight.crow_indices, weight.col_indices)
    if isinstance(weight, BlockSparsePanels):
        return (weight.panels, *indices), weight.block.cols
    return (weight.values, *indices), 0


def _product(
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
        x = autocast_to(x, values.dtype)
        bias = None if bias is None else autocast_to(bias, values.dtype)
        residual = None if residual is None else autocast_to(residual, values.dtype)
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
    return _CONV if len(geometry.shape) > 2 else _LINEAR


def blocksparse_by_way(
    way: tuple[str, int, int, int],
    x: Tensor,
    weight: BlockSparse,
    stride: Sizes = 1,
    padding: Sizes | str = 0,
    dilation: Sizes = 1,
) -> Tensor:
    """The product as one of ``blocksparse_ways`` computes it on a GPU; for tuning and checks."""
    steps: tuple[Any, ...] = ((), (), ())
    if len(weight.shape) > 2:
        conv = prepare(_CONV, x, weight.shape, weight.groups, stride, padding, dilation, "zeros")
        x, steps = conv.x, (conv.stride, conv.padding, conv.dilation)
    blocks = (weight.values, weight.crow_indices, weight.col_indices)
    rest = (tuple(weight.shape), weight.groups, *steps, 0, "none")
    return _native(x, *blocks, None, None, *rest, way=way)


def _native(
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
    if residual is not None and _is_cuda(x):
        y = _native(x, values, crow, col, bias, None, *numbers, "none", way=way)
        return finish(_op_of(geometry), y, residual, activation)
    last = is_channels_last(x)
    y = empty_result(_op_of(geometry), x, bias, geometry)
    given = as_5d(x.contiguous() if x.dim() == 2 or not last else x, last)
    result = room = as_5d(y, last)
    turned = not last and _reads_channels(x, values, geometry.groups)
    if turned:
        given = given.movedim(1, -1).contiguous()
        room = result.new_empty(result.movedim(1, -1).shape)
    _C.blocksparse_conv(
        room,
        given,
        values.contiguous(),
        crow.contiguous(),
        col.contiguous(),
        None if bias is None else bias.contiguous(),
        residual_in_5d(_op_of(geometry), residual, y, last),
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


def _reads_channels(x: Tensor, values: Tensor, groups: int) -> bool:
    """Whether the kernel copies channels that lie side by side, by 16 bytes.

    For those of a GPU's tensor cores it takes less time to turn x and y over than to gather
    channels that lie apart, for every tap and tile of outputs once more.
    """
    if not _is_cuda(x) or x.element_size() != 2:
        return False
    return x.shape[1] // groups % 8 == 0 and values.shape[2] % 8 == 0


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


library.impl("blocksparse_product", _native, "CPU")
library.impl("blocksparse_product", on_cuda("blocksparse_product", _native), "CUDA")
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
        ctx.save_for_backward(
            x if values.requires_grad else None, values if x.requires_grad else None, crow, col
        )

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
