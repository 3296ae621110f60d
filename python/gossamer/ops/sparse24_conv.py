"""sparse24_conv: a convolution with a 2:4 weight, y = act(W * x + b + residual)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..formats import Sparse24Conv, Sparse24ConvPairs
from .conv_geometry import Sizes, prepare
from .conv_operands import LAST, Geometry, empty_result, is_channels_last
from .operands import autocast_dtype, autocast_to
from .sparse24_conv_product import SPARSE24_CONV as _OP
from .sparse24_conv_product import choose, product


def sparse24_conv(
    x: Tensor,
    weight: Sparse24Conv | Sparse24ConvPairs,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: Sizes | str = 0,
    dilation: Sizes = 1,
    padding_mode: str = "zeros",
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Convolution with a 2:4 weight, of as many axes as its kernel has: 1, 2 or 3.

    Sums run over the stored slots only: a NaN or an infinity in ``x`` goes through every stored
    position, explicit zeros included, and never through a pruned one. That is so of our kernels;
    where torch's convolution with the dense weight is chosen, because it is faster (bfloat16 on
    CPUs that multiply it, few channels a group, a weight that is not packed and meets few pixels,
    any GPU), it makes a NaN of either.

    Parameters
    ----------
    x : Tensor
        [batch, C_in, *extents] in the weight's dtype, of any strides; or without batch. The batch
        may be empty.
    weight : Sparse24Conv or Sparse24ConvPairs
        The [C_out, C_in / groups, *kernel size] weight; the groups are its own. Gradients flow to
        ``Sparse24Conv.values``, and to nothing in the pairs.
    bias, stride, padding, dilation, padding_mode, activation, residual
        As for ``blocksparse_conv``; to torch's convolution, where that is chosen, torch adds the
        residual, too.

    Returns
    -------
    Tensor
        [batch, C_out, *extents] in the dtype and the memory format (contiguous or channels-last)
        of ``x``. Under autocast x, weight, bias and residual are cast to autocast's dtype first;
        pairs are read in their own dtype and the result is returned in autocast's.

    Raises
    ------
    TypeError
        If ``weight`` is neither of the two formats, or dtypes differ.
    ValueError
        As ``blocksparse_conv``.

    References
    ----------
    Mishra et al., "Accelerating Sparse Deep Neural Networks", 2021 (arXiv:2104.08378).
    """
    if isinstance(weight, Sparse24Conv):
        stored, indices = weight.values, weight.indices
    elif isinstance(weight, Sparse24ConvPairs):
        stored, indices = weight.panels, None
    else:
        raise TypeError(
            f"{_OP}: weight is {type(weight).__name__}, expected Sparse24Conv or Sparse24ConvPairs"
        )
    return sparse24_conv_tensors(
        x,
        stored,
        indices,
        bias,
        weight.shape,
        weight.groups,
        weight.dtype,
        stride,
        padding,
        dilation,
        padding_mode,
        activation or "none",
        residual,
    )


def sparse24_conv_tensors(
    x: Tensor,
    stored: Tensor,
    indices: Tensor | None,
    bias: Tensor | None,
    shape: tuple[int, ...],
    groups: int,
    dtype: torch.dtype,
    stride: Sizes = 1,
    padding: Sizes | str = 0,
    dilation: Sizes = 1,
    padding_mode: str = "zeros",
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """``sparse24_conv`` on a format's tensors: values and indices, or pairs and None."""
    conv = prepare(_OP, x, shape, groups, stride, padding, dilation, padding_mode)
    x, residual, autocast = conv.x, conv.batch_of(residual), autocast_dtype(x)
    if autocast is not None:
        if indices is not None:
            stored = autocast_to(stored, autocast)
            dtype = stored.dtype
        x = autocast_to(x, dtype)
        bias = None if bias is None else autocast_to(bias, dtype)
        residual = None if residual is None else autocast_to(residual, dtype)
    # Pairs are words: past this line nothing knows the dtype of what they hold.
    for name, operand in (("x", x), ("bias", bias), ("residual", residual)):
        if operand is not None and operand.dtype != dtype:
            raise TypeError(f"{_OP}: {name} is {operand.dtype}, the weight {dtype}")
    steps = (conv.stride, conv.padding, conv.dilation)
    rest = (tuple(shape), groups, *steps, activation)
    y = product(x, stored, indices, bias, residual, *rest)
    return conv.result(y if autocast is None else autocast_to(y, autocast))


def sparse24_conv_choice(
    x_shape: Sequence[int],
    weight: Sparse24Conv | Sparse24ConvPairs,
    stride: Sizes = 1,
    padding: Sizes | str = 0,
    dilation: Sizes = 1,
    padding_mode: str = "zeros",
    channels_last: bool = False,
) -> dict[str, Any]:
    """What a 2:4 convolution on the CPU does with an x of this shape, in the weight's dtype.

    Parameters
    ----------
    x_shape : sequence of int
        [batch, C_in, *extents].
    weight : Sparse24Conv or Sparse24ConvPairs
        Of any device; only its sizes and which of the two it is matter.
    stride, padding, dilation, padding_mode
        The convolution's.
    channels_last : bool
        Of x, where its dimensions have that memory format.

    Returns
    -------
    dict
        ``target``, ``kernel`` ("pairs", "serial", or "dense" for torch's convolution), ``why`` and
        ``threads``; of "pairs" also how it cuts the outputs up.

    Raises
    ------
    TypeError, ValueError
        As the product itself.
    """
    x = torch.empty(x_shape, device="meta", dtype=weight.dtype)
    if channels_last and x.dim() in LAST:
        x = x.to(memory_format=LAST[x.dim()])
    conv = prepare(_OP, x, weight.shape, weight.groups, stride, padding, dilation, padding_mode)
    geometry = Geometry(weight.shape, weight.groups, conv.stride, conv.padding, conv.dilation)
    y = empty_result(_OP, conv.x, None, geometry)
    packed = isinstance(weight, Sparse24ConvPairs)
    return choose(conv.x, y, geometry, packed, is_channels_last(conv.x))
