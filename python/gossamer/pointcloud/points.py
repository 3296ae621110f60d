"""Points in space to a sparse tensor, and which voxel each point went into."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from . import native
from .coordinate_set import outliving, unwrapped
from .coordinates import Coordinates
from .tensor import SparseTensor

REDUCTIONS = ("mean", "first", "max")


def voxelize(
    points: Tensor,
    voxel_size: float | Sequence[float],
    reduce: str = "mean",
    features: Tensor | None = None,
    batch: Tensor | None = None,
    batch_size: int | None = None,
    spatial_shape: Sequence[int] | None = None,
) -> tuple[SparseTensor, Tensor]:
    """One voxel for all points in a cell of a regular grid.

    A point lies in the cell ``floor(point / voxel_size)``, divided in float64; shift the points
    for a grid that begins elsewhere. The result is the same at any number of threads, to the bit.

    Parameters
    ----------
    points : Tensor
        [N, D], D from 1 to 4, in any floating dtype; N may be 0.
    voxel_size : float or sequence of float
        A cell's width, one or D of them.
    reduce : {"mean", "first", "max"}
        What a voxel has of its points' features: their mean, summed in float64 in the order of
        the rows; those of the lowest row; or the greatest of each channel. NaN passes through
        "mean" and "max".
    features : Tensor, optional
        [N, C] in float32, bfloat16, float16 or float64; by default the points themselves. A
        gradient flows through them, under "max" to the lowest row that has the maximum.
    batch : Tensor, optional
        [N] int32 or int64, the sample of each point; by default all are of sample 0.
    batch_size, spatial_shape
        Of the tensor, see `SparseTensor`. Without a batch, batch_size is 1.

    Returns
    -------
    SparseTensor
        Its coordinates in ascending order.
    Tensor
        int64 [N], the row of each point's voxel.

    Raises
    ------
    TypeError
        If ``points`` or ``features`` are not floating, or ``batch`` is no integer tensor.
    ValueError
        If shapes or devices do not match, a size is not positive, a point is not finite or lies
        in no cell that int32 numbers, or a voxel lies outside of the batch or the shape.

    Examples
    --------
    >>> import torch, gossamer.pointcloud as pc
    >>> points = torch.rand(1000, 3)
    >>> x, voxel_of_point = pc.voxelize(points, 0.1)
    >>> offsets_in_voxels = points - x.feats[voxel_of_point]
    """
    for name, given in {"points": points, "features": features, "batch": batch}.items():
        if not isinstance(given, Tensor) and (given is not None or name == "points"):
            raise TypeError(f"voxelize: {name} are {type(given).__name__}, expected a Tensor")
    if points.dim() != 2 or not 1 <= points.shape[1] <= 4:
        raise ValueError(
            f"voxelize: points have shape {list(points.shape)}, expected [N, D] with D from 1 to 4"
        )
    if not points.is_floating_point():
        raise TypeError(f"voxelize: points are {points.dtype}, expected a floating dtype")
    if reduce not in REDUCTIONS:
        raise ValueError(f"voxelize: reduce is {reduce!r}, expected one of {', '.join(REDUCTIONS)}")
    if features is None:
        features = points
    elif features.dim() != 2 or len(features) != len(points):
        raise ValueError(
            f"voxelize: features have shape {list(features.shape)}, expected [{len(points)}, C]"
        )
    if not features.is_floating_point():
        raise TypeError(f"voxelize: features are {features.dtype}, expected a floating dtype")
    sizes = _sizes(voxel_size, points.shape[1])
    with outliving():
        points, batch = unwrapped(points).detach(), unwrapped(batch)
        sample = None if batch is None else _batch(batch, points)
        exact = points if points.dtype == torch.float64 else points.float()
        voxels = native.voxels(exact.contiguous(), sample, sizes)
    feats: Tensor = _Reduced.apply(features, voxels, reduce)
    if batch is None and batch_size is None:
        batch_size = 1
    coordinates = Coordinates.of_sorted(voxels.coords, voxels.box, batch_size, spatial_shape)
    return SparseTensor(coordinates, feats), voxels.of_point


def _batch(batch: Tensor, points: Tensor) -> Tensor:
    if batch.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"voxelize: batch is {batch.dtype}, expected torch.int32 or torch.int64")
    if batch.shape != points.shape[:1] or batch.device != points.device:
        raise ValueError(
            f"voxelize: batch has shape {list(batch.shape)} on {batch.device}, points "
            f"{list(points.shape)} on {points.device}"
        )
    least, most = torch.stack(batch.aminmax()).tolist() if len(batch) else (0, 0)
    if not 0 <= least <= most < 2**31:
        raise ValueError(f"voxelize: batch ranges from {least} to {most}, expected int32 from 0 on")
    return batch.int().contiguous()


def _sizes(voxel_size: float | Sequence[float], dims: int) -> tuple[float, ...]:
    if isinstance(voxel_size, Tensor):
        voxel_size = voxel_size.tolist()
    each = [voxel_size] * dims if isinstance(voxel_size, (int, float, Real)) else voxel_size
    given = tuple(map(float, each))
    if len(given) != dims or not all(v > 0 and math.isfinite(v) for v in given):
        raise ValueError(
            f"voxelize: voxel_size is {voxel_size}, expected a positive number or {dims} of them"
        )
    return given


class _Reduced(torch.autograd.Function):
    @staticmethod
    def forward(features: Tensor, voxels: native.Voxels, reduce: str) -> Tensor:
        return native.reduce(features.contiguous(), voxels, reduce)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        features, ctx.voxels, ctx.reduce = inputs
        ctx.save_for_backward(*((features, output) if ctx.reduce == "max" else ()))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        of_point = ctx.voxels.of_point
        if ctx.reduce == "mean":
            points = ctx.voxels.begins.diff().unsqueeze(1)
            return (dy / points)[of_point], None, None
        rows = torch.arange(len(of_point), device=dy.device).unsqueeze(1).expand(-1, dy.shape[1])
        if ctx.reduce == "max":
            features, feats = ctx.saved_tensors
            at_most = feats[of_point]
            same = (features == at_most) | (features.isnan() & at_most.isnan())
            rows = rows.where(same, len(of_point))
        first = rows.new_full(dy.shape, len(of_point))
        first.scatter_reduce_(0, of_point.unsqueeze(1).expand_as(rows), rows, "amin")
        return dy.new_zeros(len(of_point), dy.shape[1]).scatter_(0, first, dy), None, None
