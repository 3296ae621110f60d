"""What the arguments of a convolution mean: an entry an axis, padding spelled out, output sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from ..formats.geometry import whole_number
from .operands import check_tensor

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")

Sizes = int | Sequence[int]
_LARGEST = 2**30  # of what the kernels count with


def per_axis(op: str, name: str, given: Sizes, axes: int, lowest: int) -> tuple[int, ...]:
    """One whole number an axis, from ``lowest`` to 2**30; one alone stands for all.

    Raises
    ------
    TypeError, ValueError
        If they are something else.
    """
    try:
        numbers = tuple(map(whole_number, given if isinstance(given, Sequence) else (given,)))
    except TypeError:
        raise TypeError(f"{op}: {name} {given!r}, expected whole numbers") from None
    if len(numbers) == 1:
        numbers = numbers * axes
    if len(numbers) != axes or any(not lowest <= number <= _LARGEST for number in numbers):
        raise ValueError(
            f"{op}: {name} {given!r}, expected {axes} number(s) from {lowest} to 2**30"
        )
    return numbers


def padding_of(
    op: str, padding: Sizes | str, kernel: Sequence[int], stride: Sizes, dilation: Sizes
) -> tuple[tuple[int, int], ...]:
    """How much stands before and after x along each axis; "same" puts an odd one after.

    Raises
    ------
    TypeError, ValueError
        If it is an unknown word, "same" with a stride, or as ``per_axis`` says.
    """
    axes = len(kernel)
    if not isinstance(padding, str):
        return tuple((size, size) for size in per_axis(op, "padding", padding, axes, 0))
    if padding == "valid":
        return ((0, 0),) * axes
    if padding != "same":
        raise ValueError(f"{op}: padding {padding!r}, expected numbers, 'same' or 'valid'")
    strides = per_axis(op, "stride", stride, axes, 1)
    if any(step != 1 for step in strides):
        raise ValueError(f"{op}: padding 'same' with stride {list(strides)}, it needs stride 1")
    dilations = per_axis(op, "dilation", dilation, axes, 1)
    totals = [d * (k - 1) for d, k in zip(dilations, kernel, strict=True)]
    return tuple((total // 2, total - total // 2) for total in totals)


def pad_around(
    op: str, x: Tensor, padding: tuple[tuple[int, int], ...], mode: str
) -> tuple[Tensor, tuple[int, ...]]:
    """x with what a kernel does not pad by itself, and what is left for the kernel to pad.

    A kernel pads with zeros, as much before as after.
    """
    if mode not in PADDING_MODES:
        raise ValueError(f"{op}: padding_mode {mode!r}, expected one of {PADDING_MODES}")
    if mode == "zeros" and all(before == after for before, after in padding):
        return x, tuple(before for before, _ in padding)
    around = [size for both in reversed(padding) for size in both]
    x = F.pad(x, around, mode="constant" if mode == "zeros" else mode)
    return x, (0,) * len(padding)


def check_channels(op: str, x: Tensor, shape: Sequence[int], groups: int) -> None:
    """Raise where x is no batch for a weight of this shape."""
    if x.dim() != len(shape) or x.shape[1] != shape[1] * groups:
        raise ValueError(
            f"{op}: x has shape {list(x.shape)}, a weight {list(shape)} in {groups} group(s) "
            f"expects {shape[1] * groups} channels and {len(shape) - 2} axes"
        )


@dataclass(frozen=True)
class Prepared:
    """An x as kernels take it, with a batch and padded by what they do not pad by themselves."""

    x: Tensor
    batched: bool  # before
    stride: tuple[int, ...]
    padding: tuple[int, ...]  # zeros, as many before as after
    dilation: tuple[int, ...]

    def batch_of(self, residual: Tensor | None) -> Tensor | None:
        return residual if self.batched or residual is None else residual.unsqueeze(0)

    def result(self, y: Tensor) -> Tensor:
        """y without a batch where x had none."""
        return y if self.batched else y.squeeze(0)


def prepare(
    op: str,
    x: Tensor,
    shape: Sequence[int],
    groups: int,
    stride: Sizes,
    padding: Sizes | str,
    dilation: Sizes,
    padding_mode: str,
) -> Prepared:
    """What a user says of a convolution with a weight of this shape, checked and spelled out.

    Raises
    ------
    TypeError, ValueError
        If x does not fit the weight, or an argument says nothing.
    """
    check_tensor(op, x)
    axes = len(shape) - 2
    batched = x.dim() == axes + 2
    if not batched and x.dim() != axes + 1:
        raise ValueError(
            f"{op}: x has shape {list(x.shape)}, a weight {list(shape)} expects {axes + 2} "
            f"dimensions, or {axes + 1} without batch"
        )
    x = x if batched else x.unsqueeze(0)
    check_channels(op, x, shape, groups)
    around = padding_of(op, padding, shape[2:], stride, dilation)
    steps = per_axis(op, "stride", stride, axes, 1)
    spread = per_axis(op, "dilation", dilation, axes, 1)
    x, zeros = pad_around(op, x, around, padding_mode)
    return Prepared(x, batched, steps, zeros, spread)


def output_sizes(
    op: str,
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """Extents of y, of an x [batch, C_in, *extents].

    Raises
    ------
    ValueError
        If the kernel does not fit into the padded x.
    """
    sizes = []
    for size, k, s, p, d in zip(x.shape[2:], kernel, stride, padding, dilation, strict=True):
        room = size + 2 * p - d * (k - 1) - 1
        if room < 0:
            raise ValueError(
                f"{op}: x has extents {list(x.shape[2:])}, padded by {list(padding)} they are "
                f"smaller than a kernel {list(kernel)} of dilation {list(dilation)}"
            )
        sizes.append(room // s + 1)
    return sizes
