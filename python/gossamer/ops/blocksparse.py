"""Linear layers and convolutions with a block-sparse weight: y = act(W * x + b + residual)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..formats import BlockSparse, BlockSparsePanels
from .blocksparse_product import CONV, LINEAR, native, product
from .conv_geometry import Sizes, prepare
from .conv_operands import check_residual
from .operands import as_rows, check_features, check_tensor


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
    check_format(LINEAR, weight)
    if len(weight.shape) != 2:
        raise ValueError(
            f"{LINEAR}: a weight of shape {list(weight.shape)} is a convolution's: "
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
    check_tensor(LINEAR, x)
    dims = x.dim()
    check_features(LINEAR, x, dims, shape[1])
    blocks = (values, crow_indices, col_indices)
    rest = (shape, 1, (), (), (), packed_cols, activation)
    if residual is not None:
        check_residual(LINEAR, residual, (*x.shape[:-1], shape[0]))
        residual = as_rows(residual, dims)
    y = product(LINEAR, as_rows(x, dims), *blocks, bias, residual, *rest)
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
        In the result's shape and the weight's dtype, added before the activation, in one pass over
        the result with one rounding at its end; where a gradient is wanted, torch adds to the
        rounded result of the convolution. It is read fastest in the memory format of ``x``.

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
    check_format(CONV, weight)
    if len(weight.shape) == 2:
        raise ValueError(
            f"{CONV}: a weight of shape {list(weight.shape)} is a linear layer's: "
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
    conv = prepare(CONV, x, shape, groups, stride, padding, dilation, padding_mode)
    blocks, steps = (values, crow_indices, col_indices), (conv.stride, conv.padding, conv.dilation)
    rest = (tuple(shape), groups, *steps, packed_cols, activation)
    return conv.result(product(CONV, conv.x, *blocks, bias, conv.batch_of(residual), *rest))


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
        conv = prepare(CONV, x, weight.shape, weight.groups, stride, padding, dilation, "zeros")
        x, steps = conv.x, (conv.stride, conv.padding, conv.dilation)
    blocks = (weight.values, weight.crow_indices, weight.col_indices)
    rest = (tuple(weight.shape), weight.groups, *steps, 0, "none")
    return native(x, *blocks, None, None, *rest, way=way)
