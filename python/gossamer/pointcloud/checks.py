"""What coordinates and the sizes of a convolution over them have to be."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor

from .native import Window
from .plain import Box, Size

MOST_ROWS = 2**31 - 1  # ranks are int32
MOST_CELLS = 2**62 - 1  # along an axis, for numbers of 64 bits to do arithmetic with


def sizes(name: str, value: int | Sequence[int], dims: int, least: int) -> Size:
    """One integer an axis, out of one for all of them or a sequence; numpy's are as good."""
    try:
        each = (value,) * dims if isinstance(value, (int, Integral)) else tuple(value)
        given = tuple(map(operator.index, each))
    except TypeError:
        raise TypeError(f"pointcloud: {name} is {value!r}, expected whole numbers") from None
    if len(given) != dims or not all(least <= v <= MOST_CELLS for v in given):
        raise ValueError(
            f"pointcloud: {name} is {value}, expected an integer of at least {least}, or {dims} "
            "of them, below 2**62"
        )
    return given


def int32_coords(coords: Tensor) -> Tensor:
    """Contiguous int32 of the coordinates that a user gave."""
    if not isinstance(coords, Tensor):
        raise TypeError(f"pointcloud: coords are {type(coords).__name__}, expected a Tensor")
    if coords.dim() != 2 or not 2 <= coords.shape[1] <= 5:
        raise ValueError(
            f"pointcloud: coords have shape {list(coords.shape)}, expected [N, 1 + D] with D from "
            "1 to 4, the batch index first"
        )
    if len(coords) > MOST_ROWS:
        raise ValueError(f"pointcloud: {len(coords)} voxels, at most {MOST_ROWS}")
    if coords.dtype == torch.int64 and len(coords):
        least, most = torch.stack(coords.aminmax()).tolist()  # a GPU is waited for once
        if least < -(2**31) or most >= 2**31:
            raise ValueError(
                f"pointcloud: coords range from {least} to {most}, beyond the int32 they become"
            )
    elif coords.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"pointcloud: coords are {coords.dtype}, expected torch.int32")
    return coords.detach().to(torch.int32).contiguous()


def checked_batch_size(coords: Tensor, box: Box, batch_size: int | None) -> int:
    if box[0][0] < 0:
        row = int((coords[:, 0] < 0).nonzero()[0])
        raise ValueError(f"pointcloud: row {row} has the batch index {int(coords[row, 0])}")
    if batch_size is None:
        return box[1][0] + 1 if len(coords) else 0
    (batch_size,) = sizes("batch_size", batch_size, 1, 0)
    if batch_size > 2**31:  # batch indices are int32
        raise ValueError(f"pointcloud: batch_size is {batch_size}, at most 2**31")
    if len(coords) and box[1][0] >= batch_size:
        row = int(coords[:, 0].argmax())
        raise ValueError(
            f"pointcloud: batch_size is {batch_size}, row {row} has the batch index {box[1][0]}"
        )
    return batch_size


def check_inside(coords: Tensor, box: Box, shape: Size) -> None:
    least, most = box[0][1:], box[1][1:]
    if not len(coords) or (
        min(least) >= 0 and all(m < n for m, n in zip(most, shape, strict=True))
    ):
        return
    spatial = coords[:, 1:]
    outside = ((spatial < 0) | (spatial >= torch.tensor(shape, device=coords.device))).any(1)
    row = int(outside.nonzero()[0])
    raise ValueError(
        f"pointcloud: {int(outside.sum())} of {len(coords)} coordinates lie outside of the spatial "
        f"shape {list(shape)}, the first in row {row}: {coords[row].tolist()} (batch first)"
    )


def check_output_shape(shape: Size, before: Size, window: Window) -> None:
    if min(shape) < 1 or max(shape) > MOST_CELLS:
        kernel, step, pad, dilated = window
        raise ValueError(
            f"pointcloud: kernel {kernel}, stride {step}, padding {pad}, dilation {dilated} leave "
            f"the shape {shape} of the spatial shape {before}"
        )
