"""sparse24_conv: a convolution with a 2:4 weight, through the dense one so far."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..formats import Sparse24Conv
from .conv_geometry import Sizes, output_sizes, prepare
from .operands import activation_of, autocast_dtype, check_bias, check_devices, check_dtypes

_OP = "sparse24_conv"
_CONVS = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


def sparse24_conv(
    x: Tensor,
    weight: Sparse24Conv,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: Sizes | str = 0,
    dilation: Sizes = 1,
    padding_mode: str = "zeros",
    activation: str | None = None,
) -> Tensor:
    """Convolution with a 2:4 weight, of as many axes as its kernel has: 1, 2 or 3.

    Parameters
    ----------
    x : Tensor
        [batch, C_in, *extents] in the weight's dtype, of any strides; or without batch. The batch
        may be empty.
    weight : Sparse24Conv
        The [C_out, C_in / groups, *kernel size] weight; the groups are its own. Gradients flow to
        its values.
    bias, stride, padding, dilation, padding_mode, activation
        As for ``blocksparse_conv``.

    Returns
    -------
    Tensor
        [batch, C_out, *extents], as torch's convolution with the dense weight returns it.

    Raises
    ------
    TypeError
        If ``weight`` is no ``Sparse24Conv``, or dtypes differ.
    ValueError
        As ``blocksparse_conv``.
    """
    if not isinstance(weight, Sparse24Conv):
        raise TypeError(f"{_OP}: weight is {type(weight).__name__}, expected Sparse24Conv")
    return sparse24_conv_tensors(
        x,
        weight.values,
        weight.indices,
        bias,
        weight.shape,
        weight.groups,
        stride,
        padding,
        dilation,
        padding_mode,
        activation or "none",
    )


def sparse24_conv_tensors(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    bias: Tensor | None,
    shape: tuple[int, ...],
    groups: int,
    stride: Sizes = 1,
    padding: Sizes | str = 0,
    dilation: Sizes = 1,
    padding_mode: str = "zeros",
    activation: str = "none",
) -> Tensor:
    """``sparse24_conv`` on a format's tensors."""
    conv = prepare(_OP, x, shape, groups, stride, padding, dilation, padding_mode)
    activate = activation_of(_OP, activation)
    check_bias(_OP, bias, shape[0])
    check_devices(_OP, x, weight=values, indices=indices, bias=bias)
    if autocast_dtype(x) is None:
        check_dtypes(_OP, values.dtype, x=x, bias=bias)
    steps = (conv.stride, conv.padding, conv.dilation)
    output_sizes(_OP, conv.x, shape[2:], *steps)  # or it is an error
    dense = Sparse24Conv(values, indices, shape, groups).to_dense()
    y = conv.result(_CONVS[conv.x.dim()](conv.x, dense, bias, *steps, groups))
    return y if activate is None else activate(y)
