"""Pooling of voxels: over windows, and over each sample of the batch."""

from __future__ import annotations

import math
from typing import ClassVar

from torch import Tensor, nn

from .._wide import wide
from ..ops.conv_geometry import Sizes, per_axis
from ..ops.pointcloud_pool import pointcloud_pool
from .tensor import SparseTensor, check_sparse
from .window import (
    Target,
    axes_of,
    check_input,
    set_window,
    target_coordinates,
    window_outputs,
)


class _WindowPool(nn.Module):
    axes: ClassVar[int | None] = None

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    outputs: str

    def __init__(
        self,
        kernel_size: Sizes,
        stride: Sizes | None = None,
        padding: Sizes = 0,
        dilation: Sizes = 1,
        outputs: str = "dense",
    ) -> None:
        super().__init__()
        axes = axes_of(self, kernel_size)
        self.kernel_size = per_axis(type(self).__name__, "kernel_size", kernel_size, axes, 1)
        set_window(self, kernel_size if stride is None else stride, padding, dilation, outputs)

    def _pool(self, x: SparseTensor, target: Target | None, reduce: str) -> SparseTensor:
        check_input(self, x)
        given = target_coordinates(self, target)
        coordinates, kernel_map = window_outputs(self, x.coordinates, given)
        return SparseTensor(coordinates, pointcloud_pool(x.feats, kernel_map, reduce))

    def extra_repr(self) -> str:
        names = ("kernel_size", "stride", "padding", "dilation", "outputs")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)


class MaxPool(_WindowPool):
    """The greatest feature of the voxels in each window; voxels that are not there are no zeros.

    Parameters
    ----------
    kernel_size, stride, padding, dilation
        As for ``torch.nn.MaxPool3d``.
    outputs : {"dense", "floor"}
        As for `Conv`. Where a voxel of the result has none in its window, which "dense" cannot
        make, its features are 0.
    """

    def forward(self, x: SparseTensor, target: Target | None = None) -> SparseTensor:
        """``x`` -> the voxels of the layer's rule, or of ``target``; any number of channels."""
        return self._pool(x, target, "max")


class AvgPool(_WindowPool):
    """The mean over each window: of the voxels that are there, or of all of its cells.

    Parameters
    ----------
    kernel_size, stride, padding
        As for ``torch.nn.AvgPool3d``.
    dilation, outputs
        As for `Conv`.
    count_empty : bool
        Whether cells without a voxel count as zeros, as in a dense tensor.
    """

    def __init__(
        self,
        kernel_size: Sizes,
        stride: Sizes | None = None,
        padding: Sizes = 0,
        dilation: Sizes = 1,
        outputs: str = "dense",
        count_empty: bool = False,
    ) -> None:
        super().__init__(kernel_size, stride, padding, dilation, outputs)
        self.count_empty = count_empty

    def forward(self, x: SparseTensor, target: Target | None = None) -> SparseTensor:
        """``x`` -> the voxels of the layer's rule, or of ``target``; any number of channels."""
        if not self.count_empty:
            return self._pool(x, target, "mean")
        check_input(self, x)
        # A sum may leave float16's range where the mean does not.
        total = self._pool(x.to(dtype=wide(x.dtype)), target, "sum")
        return (total / math.prod(self.kernel_size)).to(dtype=x.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, count_empty={self.count_empty}"


class _GlobalPool(nn.Module):
    reduce: ClassVar[str]

    def forward(self, x: SparseTensor) -> Tensor:
        """``x`` -> [batch_size, C]; a sample without voxels gets zeros."""
        check_sparse(type(self).__name__, x)
        return pointcloud_pool(x.feats, x.coordinates.samples(), self.reduce)


class GlobalMaxPool(_GlobalPool):
    """The greatest feature of each sample, [batch_size, C]."""

    reduce = "max"


class GlobalAvgPool(_GlobalPool):
    """The mean over the voxels of each sample, [batch_size, C]."""

    reduce = "mean"


class GlobalSumPool(_GlobalPool):
    """The sum over the voxels of each sample, [batch_size, C]."""

    reduce = "sum"
