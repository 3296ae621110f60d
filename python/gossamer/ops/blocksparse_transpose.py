"""The gradient of x by the forward kernel: the product of dy with the transposed blocks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

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
    stride it takes several (``phases_of``).
    """
    shape, groups, stride, padding, dilation, _ = geometry
    if any(step != 1 for step in stride):
        return None
    around = [d * (k - 1) - p for d, k, p in zip(dilation, shape[2:], padding, strict=True)]
    if any(size < 0 for size in around):
        return None
    sizes = (shape[1] * groups, shape[0] // groups, *shape[2:])
    return Geometry(sizes, groups, tuple(stride), tuple(around), tuple(dilation))


class Phase(NamedTuple):
    """What of dx one convolution of dy makes: every so many-th pixel, which meets the same taps."""

    pixels: tuple[slice, ...]  # of dx, an entry an axis
    kept: tuple[slice, ...]  # of the convolution's result
    taps: tuple[int, ...]  # of the weight, in the order in which the convolution has them
    geometry: Geometry


def phases_of(geometry: Geometry, x_shape: Sequence[int], dy_shape: Sequence[int]) -> list[Phase]:
    """The convolutions that make dx of dy where there is a stride; pixels in none of them get 0.

    Along an axis output o sees x at o * stride + t * dilation - padding under tap t. Pixel
    q * stride + r of dx therefore meets the taps with t * dilation = r + padding modulo the stride,
    and of dy what is (r + padding - t * dilation) / stride from q on.
    """
    shape, groups = geometry.shape, geometry.groups
    axes = [
        _phases_along(*sizes)
        for sizes in zip(x_shape[2:], dy_shape[2:], shape[2:], *geometry.steps, strict=True)
    ]
    phases = []
    for along in product(*axes):
        pixels, kept, taps, padding, dilation = zip(*along, strict=True)
        places = [0]
        for size, chosen in zip(shape[2:], taps, strict=True):
            places = [place * size + tap for place in places for tap in chosen]
        sizes = (shape[1] * groups, shape[0] // groups, *(len(chosen) for chosen in taps))
        steps = ((1,) * len(axes), padding, dilation)
        phases.append(Phase(pixels, kept, tuple(places), Geometry(sizes, groups, *steps)))
    return phases


def _phases_along(
    size: int, outputs: int, kernel: int, stride: int, padding: int, dilation: int
) -> list[tuple[slice, slice, tuple[int, ...], int, int]]:
    """(pixels, kept, taps, padding, dilation) of each phase of one axis that has a tap."""
    phases = []
    for first in range(min(stride, size)):
        taps = [t for t in range(kernel) if (first + padding - t * dilation) % stride == 0]
        if not taps:
            continue
        offsets = [(first + padding - t * dilation) // stride for t in taps]  # of dy; they fall
        spread = offsets[0] - offsets[1] if len(taps) > 1 else 1
        count, reach = (size - first + stride - 1) // stride, offsets[0] - offsets[-1]
        # What is read before and after dy; a kernel pads as much on both sides, or not at all.
        before, after = -offsets[-1], count + offsets[0] - outputs
        around = max(before, after, 0, (reach - outputs + 2) // 2)
        kept = slice(around - before, around - before + count)
        phases.append((slice(first, None, stride), kept, tuple(taps[::-1]), around, spread))
    return phases


def transpose_blocks(
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    geometry: Geometry,
    chosen: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Values and indices of the weight with inputs and outputs of a group exchanged.

    Of the chosen taps, in their order; of all of them, mirrored, where none are. Differentiable in
    ``values``.
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
    tap = column // col_blocks
    if chosen is None:
        tap = taps - 1 - tap
    else:
        renamed = torch.full((taps,), -1, device=device)
        renamed[list(chosen)] = torch.arange(len(chosen), device=device)
        tap, taps = renamed[tap], len(chosen)
        (live,) = (tap >= 0).nonzero(as_tuple=True)
        row, tap, block_row, values = row[live], tap[live], block_row[live], values[live]
    width = taps * row_blocks
    places, order = (row * width + tap * row_blocks + block_row % row_blocks).sort()
    starts = torch.arange(groups * col_blocks + 1, device=device) * width
    crow = torch.searchsorted(places, starts).int()
    return values[order].transpose(1, 2), crow, (places % width).int()


def dx_by_blocks(x_shape: Sequence[int], values: Tensor, geometry: Geometry) -> bool:
    """Whether it is faster than torch's product with the dense weight, where there is one.

    Only float32: dense products of 16-bit types are faster on CPUs that multiply those. Measured on
    the layers of ResNet-50 (16x16 blocks: 1.1x to 2.4x at half of them live, 4x4: 0.7x to 2.3x, and
    1.0x to 2.1x at a quarter) and on linear layers (16x16: 0.8x to 1.3x at half, 1.2x to 3.6x at a
    quarter). With a stride a 3x3 kernel takes four products, which are put together: 1.0x to 1.2x
    at a quarter and 0.8x to 1.0x at half; a 1x1 kernel takes one, 1.5x to 2.4x and 1.2x to 1.8x.
    """
    count, rows, cols = values.shape
    pixels = x_shape[0]
    for size in x_shape[2:]:
        pixels = pixels * size
    weights = geometry.shape[0] * geometry.shape[1] * taps_of(geometry.shape)
    one_of = 2 if rows * cols >= _LARGE_BLOCK and len(geometry.shape) > 2 else 4
    if any(step != 1 for step in geometry.stride) and taps_of(geometry.shape) > 1:
        one_of *= 2
    return (
        values.is_cpu
        and values.dtype == torch.float32
        and one_of * count * rows * cols <= weights
        and pixels * weights >= _LEAST_WORK
    )
