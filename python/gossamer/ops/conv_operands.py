"""What the sparse convolutions share: their geometry, memory formats, and dense gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._wide import conv_in_float32, has_loops_only, matmul
from .conv_geometry import Sizes, check_channels, output_sizes, prepare
from .operands import activation_of, check_bias


class Geometry(NamedTuple):
    """What the op is told of the weight and of the convolution."""

    shape: Sequence[int]
    groups: int
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    packed_cols: int = 0

    @property
    def steps(self) -> tuple[Sequence[int], Sequence[int], Sequence[int]]:
        return self.stride, self.padding, self.dilation

    def in_3d(self) -> tuple[list[int], list[int], list[int], list[int]]:
        """Kernel, stride, padding and dilation, with the leading axes that are not there."""
        absent = 3 - len(self.stride)
        ones, zeros = [1] * absent, [0] * absent
        kernel, stride = [*ones, *self.shape[2:]], [*ones, *self.stride]
        return kernel, stride, [*zeros, *self.padding], [*ones, *self.dilation]


def empty_result(op: str, x: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """Memory for y [batch, C_out, *extents], in the memory format of x as torch chooses it."""
    shape = geometry.shape
    check_channels(op, x, shape, geometry.groups)
    check_bias(op, bias, shape[0])
    sizes = output_sizes(op, x, shape[2:], *geometry.steps)
    memory_format = memory_format_of(x.dim(), is_channels_last(x))
    size = (x.shape[0], shape[0], *sizes)
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=memory_format)


def without_content(
    op: str,
    x_shape: Sequence[int],
    weight: Any,
    stride: Sizes = 1,
    padding: Sizes | str = 0,
    dilation: Sizes = 1,
    padding_mode: str = "zeros",
    channels_last: bool = False,
) -> tuple[Tensor, Tensor, Geometry]:
    """x and y on "meta", and the convolution with a weight of a format."""
    x = torch.empty(x_shape, device="meta", dtype=weight.dtype)
    x = x.to(memory_format=memory_format_of(x.dim(), channels_last))
    kind = (weight.shape, weight.groups)
    conv = prepare(op, x, *kind, stride, padding, dilation, padding_mode)
    geometry = Geometry(*kind, conv.stride, conv.padding, conv.dilation)
    return conv.x, empty_result(op, conv.x, None, geometry), geometry


def check_residual(op: str, residual: Tensor | None, size: Sequence[int]) -> None:
    if residual is not None and residual.shape != tuple(size):
        raise ValueError(
            f"{op}: residual has shape {list(residual.shape)}, the result {list(size)}"
        )


def residual_in_5d(
    op: str, residual: Tensor | None, y: Tensor, channels_last: bool
) -> Tensor | None:
    """The residual as kernels read it: checked, and in the layout of y."""
    check_residual(op, residual, y.shape)
    if residual is None:
        return None
    return stored_in_5d(residual, channels_last)


def finish(op: str, y: Tensor, residual: Tensor | None, activation: str) -> Tensor:
    """act(y + residual) by torch, for it to differentiate, or where a kernel does not do it."""
    check_residual(op, residual, y.shape)
    activate = activation_of(op, activation)
    y = y if residual is None else y + residual
    return y if activate is None else activate(y)


LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
_CONVS = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


def is_channels_last(x: Tensor) -> bool:
    """Whether x, and so y, has its channels side by side: a matrix has, and what torch says has."""
    if x.dim() == 2:
        return True
    return (
        x.dim() in LAST and not x.is_contiguous() and x.is_contiguous(memory_format=LAST[x.dim()])
    )


def memory_format_of(dims: int, channels_last: bool) -> torch.memory_format:
    return LAST.get(dims, torch.contiguous_format) if channels_last else torch.contiguous_format


def stored_in_5d(t: Tensor, channels_last: bool) -> Tensor:
    """With its channels side by side, or its pixels."""
    memory_format = memory_format_of(t.dim(), channels_last)
    return as_5d(t.contiguous(memory_format=memory_format), channels_last)


def as_5d(t: Tensor, channels_last: bool) -> Tensor:
    """[batch, d, h, w, C], or [batch, C, d, h, w], over the same memory."""
    t = t.movedim(1, -1) if channels_last else t
    axis = 1 if channels_last else 2
    return t.view(*t.shape[:axis], *(1,) * (5 - t.dim()), *t.shape[axis:])


def is_misread(x: Tensor, geometry: Geometry, outputs: Sequence[int]) -> bool:
    """Whether oneDNN's tiles (AMX) may read memory beside x, as they do in torch 2.13.

    They do, for y and for the weight's gradient, where an axis of a stride or with padding has one
    output, or where padding is beside an x smaller than the window or is as wide as that: results
    are garbage, or the process ends.
    """
    if not x.is_cpu or x.dtype.itemsize != 2 or has_loops_only(x):
        return False
    axes = zip(x.shape[2:], outputs, geometry.shape[2:], *geometry.steps, strict=True)
    for size, count, kernel, stride, padding, dilation in axes:
        window = dilation * (kernel - 1) + 1
        if count == 1 and stride > 1:
            return True
        if padding > 0 and (count == 1 or size < window or padding >= window):
            return True
    return False


def without_padding(
    x: Tensor, geometry: Geometry, outputs: Sequence[int]
) -> tuple[Tensor, Geometry]:
    """The same convolution of an x that is padded, and of no stride where that has one output."""
    x = F.pad(x, [size for size in reversed(geometry.padding) for _ in range(2)])
    stride = list(geometry.stride)
    for axis, count in enumerate(outputs):
        if count == 1:
            window = geometry.dilation[axis] * (geometry.shape[axis + 2] - 1) + 1
            x, stride[axis] = x.narrow(axis + 2, 0, window), 1
    return x, geometry._replace(stride=stride, padding=[0] * len(stride))


def dense_conv(
    op: str, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry
) -> Tensor:
    """torch's convolution with a dense weight, of an x that it reads right."""
    outputs = output_sizes(op, x, geometry.shape[2:], *geometry.steps)
    conv = _CONVS[x.dim()]
    if x.is_cpu and x.dim() == 3:
        # torch 2.13's conv1d may end the process where the channels of its weight lie side by side.
        weight = weight.contiguous()
    if has_loops_only(x):
        return conv_in_float32(conv, x, weight, bias, *geometry.steps, geometry.groups)
    if is_misread(x, geometry, outputs):
        x, geometry = without_padding(x, geometry, outputs)
    return conv(x, weight, bias, *geometry.steps, geometry.groups)


def dense_gradients(
    dy: Tensor,
    x: Tensor | None,
    dense: Tensor | None,
    x_shape: Sequence[int],
    geometry: Geometry,
) -> tuple[Tensor | None, Tensor | None]:
    """(dx, dW); dx where the weight is given, dW where x is."""
    shape = geometry.shape
    if len(shape) == 2:
        dx = None if dense is None else matmul(dy, dense)
        return dx, None if x is None else matmul(dy.t(), x)
    if x is not None and is_misread(x, geometry, dy.shape[2:]):
        if dense is not None:  # whose product with dy is right
            dx, _ = dense_gradients(dy, None, dense, x_shape, geometry)
            return dx, dense_gradients(dy, x, None, x_shape, geometry)[1]
        x, geometry = without_padding(x, geometry, dy.shape[2:])
    wanted = (dense is not None, x is not None, False)
    if not any(wanted):
        return None, None
    if dense is not None and shape[0] == 1:
        # Of one output torch has kernels that take a stride nobody walks along for a gap.
        dense = dense.contiguous()
    # Only the shape of what is not given is looked at.
    operands = [
        dy,
        dy.new_empty(1).expand(x_shape) if x is None else x,
        dy.new_empty(1).expand(shape) if dense is None else dense,
    ]
    # Of float16 torch has no such kernel on some CPUs.
    if has_loops_only(dy) or (dy.is_cpu and dy.dtype == torch.float16):
        operands = [operand.float() for operand in operands]
    rest = (None, *geometry.steps, False, (0,) * len(shape[2:]), geometry.groups, wanted)
    dx, dweight, _ = torch.ops.aten.convolution_backward(*operands, *rest)
    return (
        dx.to(dy.dtype) if dense is not None else None,
        dweight.to(dy.dtype) if x is not None else None,
    )
