"""The gradient of x by the forward kernel: the product of dy with the transposed blocks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..formats.geometry import taps_of
from .conv_operands import Geometry

# Below so many multiply-adds of the dense product the transposition costs more than it brings.
_LEAST_WORK = 2**24
# Blocks of so many weights are transposed and multiplied faster than small ones.
_LARGE_BLOCK = 128


def transposed_geometry(geometry: Geometry) -> Geometry | None:
    """Of the convolution that makes dx of dy; None where there is no such one.

    Its taps are mirrored, and its padding is what the kernel reaches over less the padding. With a
    stride every pixel of dx meets other taps.
    """
    shape, groups, stride, padding, dilation, _ = geometry
    if any(step != 1 for step in stride):
        return None
    around = [d * (k - 1) - p for d, k, p in zip(dilation, shape[2:], padding, strict=True)]
    if any(size < 0 for size in around):
        return None
    sizes = (shape[1] * groups, shape[0] // groups, *shape[2:])
    return Geometry(sizes, groups, tuple(stride), tuple(around), tuple(dilation))


def transpose_blocks(
    values: Tensor, crow_indices: Tensor, col_indices: Tensor, geometry: Geometry
) -> tuple[Tensor, Tensor, Tensor]:
    """Values and indices of the weight with inputs and outputs of a group exchanged, taps mirrored.

    Differentiable in ``values``.
    """
    shape, groups = geometry.shape, geometry.groups
    taps, (count, rows, cols) = taps_of(shape), values.shape
    row_blocks = (shape[0] // groups + rows - 1) // rows
    col_blocks = (shape[1] + cols - 1) // cols
    device = values.device
    blocks = torch.arange(count, device=device, dtype=crow_indices.dtype)
    block_row = torch.searchsorted(crow_indices, blocks, right=True) - 1
    column = col_indices.long()
    row = block_row // row_blocks * col_blocks + column % col_blocks
    mirrored = (taps - 1 - column // col_blocks) * row_blocks + block_row % row_blocks
    width = taps * row_blocks
    places, order = (row * width + mirrored).sort()
    starts = torch.arange(groups * col_blocks + 1, device=device) * width
    crow = torch.searchsorted(places, starts).int()
    return values[order].transpose(1, 2), crow, (places % width).int()


def dx_by_blocks(x_shape: Sequence[int], values: Tensor, geometry: Geometry) -> bool:
    """Whether it is faster than torch's product with the dense weight, where there is one.

    Only float32: dense products of 16-bit types are faster on CPUs that multiply those. Measured on
    the layers of ResNet-50 (16x16 blocks: 1.1x to 2.4x at half of them live, 4x4: 0.7x to 2.3x, and
    1.0x to 2.1x at a quarter) and on linear layers (16x16: 0.8x to 1.3x at half, 1.2x to 3.6x at a
    quarter).
    """
    count, rows, cols = values.shape
    pixels = x_shape[0]
    for size in x_shape[2:]:
        pixels = pixels * size
    weights = geometry.shape[0] * geometry.shape[1] * taps_of(geometry.shape)
    one_of = 2 if rows * cols >= _LARGE_BLOCK and len(geometry.shape) > 2 else 4
    return (
        values.is_cpu
        and values.dtype == torch.float32
        and one_of * count * rows * cols <= weights
        and pixels * weights >= _LEAST_WORK
    )
