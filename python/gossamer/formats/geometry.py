"""The weight of a linear layer or a convolution: its shape, its matrix, and both in a file."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

# What the header of a file says of a shape; kernels of fewer axes have 1 in the leading ones.
GEOMETRY_FIELDS = "groups, axes, C_out, C_in / groups, kd, kh, kw"
# No layer comes near; below it, the kernels' offsets stay within 64 bits.
_LARGEST = 2**30


def whole_number(number: Any) -> int:
    """The number as one of Python's, numpy's for instance; a SymInt stays one.

    Raises
    ------
    TypeError
        If it is none.
    """
    if not isinstance(number, bool):
        if isinstance(number, (int, torch.SymInt)):
            return number  # type: ignore[return-value]
        with suppress(TypeError):
            return operator.index(number)
    raise TypeError(f"{number!r}, expected a whole number")


def check_weight_shape(shape: tuple[int, ...], groups: int) -> None:
    """Raise where torch has no linear layer or convolution with a weight of this shape."""
    if not all(isinstance(size, (int, torch.SymInt)) for size in (*shape, groups)):
        raise TypeError(f"a weight of shape {shape!r} in {groups!r} groups: whole numbers expected")
    if not 2 <= len(shape) <= 5 or any(size < 1 for size in shape):
        raise ValueError(
            f"a weight of shape {list(shape)}: expected [N, K] or [C_out, C_in / groups, "
            "*kernel size] of up to 3 axes, all at least 1"
        )
    if shape[0] > _LARGEST or shape[1] * taps_of(shape) > _LARGEST:
        raise ValueError(f"a weight of shape {list(shape)} is too large")
    if groups < 1 or shape[0] % groups != 0 or (len(shape) == 2 and groups != 1):
        raise ValueError(
            f"a weight of shape {list(shape)} in {groups} groups: groups divide C_out, and a "
            "linear layer has one"
        )


def taps_of(shape: Sequence[int]) -> int:
    """The positions of the kernel."""
    taps = 1
    for size in shape[2:]:
        taps *= size
    return taps


def channels_last(weight: Tensor) -> Tensor:
    """A weight as torch has it -> [C_out, taps, C_in / groups], contiguous."""
    # Of flatten there are no batched gradients.
    taps = weight.reshape(*weight.shape[:2], taps_of(weight.shape))
    return taps.transpose(1, 2).contiguous()


def torch_layout(dense: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The inverse of ``channels_last``."""
    return dense.transpose(1, 2).contiguous().view(shape)


def write_geometry(shape: tuple[int, ...], groups: int) -> list[int]:
    """The numbers of ``GEOMETRY_FIELDS``."""
    return [groups, len(shape) - 2, *shape[:2], *[1] * (5 - len(shape)), *shape[2:]]


def read_geometry(name: str, numbers: list[int]) -> tuple[tuple[int, ...], int]:
    """(shape, groups) of what ``write_geometry`` gave.

    Raises
    ------
    ValueError
        If no weight is described so.
    """
    groups, axes, *sizes = numbers
    if not 0 <= axes <= 3 or any(size != 1 for size in sizes[2 : 5 - axes]):
        raise ValueError(f"{name}: 'format' says {numbers} for {GEOMETRY_FIELDS}")
    return (*sizes[:2], *sizes[5 - axes :]), groups
