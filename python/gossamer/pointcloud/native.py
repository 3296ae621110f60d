"""Coordinate sets and kernel maps by the native module on the CPU, by plain torch elsewhere.

The functions of ``plain``, which say what each of them means.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from .. import _C
from . import plain
from .plain import Box, Size

Window = tuple[Size, Size, Size, Size]  # kernel size, stride, padding, dilation


def bounds(coords: Tensor) -> Box:
    if coords.device.type != "cpu":
        return plain.bounds(coords)
    box: Box = _C.pointcloud_bounds(coords, torch.get_num_threads())
    return box


def sort(coords: Tensor, box: Box) -> tuple[Tensor | None, int, int]:
    if coords.device.type != "cpu":
        return plain.sort(coords, box)
    order = torch.empty(len(coords), dtype=torch.int32, device="cpu")
    ascending, repeated, row = _C.pointcloud_sort(coords, box, order, torch.get_num_threads())
    return (None if ascending else order), repeated, row


def match(
    walkers: Tensor,
    walker_order: Tensor | None,
    targets: Tensor,
    target_order: Tensor | None,
    box: Box,
    window: Window,
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``plain.match`` of the rows in their orders."""
    if walkers.device.type != "cpu":
        sides = _sorted(walkers, walker_order), _sorted(targets, target_order)
        return plain.match(*sides, box, *window)
    threads = torch.get_num_threads()
    pairs = _C.PointcloudPairs(walkers, walker_order, targets, target_order, box, window, threads)
    walker_of, target_of = (
        torch.empty(len(pairs), dtype=torch.int32, device="cpu") for _ in range(2)
    )
    tap_offsets = torch.empty(prod(window[0]) + 1, dtype=torch.int64, device="cpu")
    pairs.write(walker_of, target_of, tap_offsets, threads)
    return walker_of, target_of, tap_offsets


def outputs(
    coords: Tensor, order: Tensor | None, box: Box, window: Window, rule: str, shape: Size | None
) -> Tensor:
    """int32 [M, 1 + D], sorted: the outputs "reached", "floored" or "spread" as in ``plain``."""
    if coords.device.type != "cpu":
        return plain.outputs(coords, *window, rule, shape)
    made = _C.PointcloudOutputs(coords, order, box, window, rule, shape, torch.get_num_threads())
    out = torch.empty((len(made), coords.shape[1]), dtype=torch.int32, device="cpu")
    made.write(out)
    return out


def _sorted(coords: Tensor, order: Tensor | None) -> Tensor:
    return coords if order is None else coords[order.long()]


@dataclass(frozen=True, eq=False)
class Voxels:
    """Points by the voxel they lie in."""

    coords: Tensor  # int32 [M, 1 + D], ascending
    of_point: Tensor  # int64 [N]
    order: Tensor | None  # int32 [N], the points by voxel, then by row; None if they are so
    begins: Tensor  # int64 [M + 1], where each voxel's points begin in the order


def voxels(points: Tensor, batch: Tensor | None, sizes: tuple[float, ...]) -> Voxels:
    """float32 or float64 points in cells of these sizes."""
    if points.device.type != "cpu":
        return Voxels(*plain.voxels(points, batch, sizes))
    threads = torch.get_num_threads()
    cells = torch.empty((len(points), points.shape[1] + 1), dtype=torch.int32, device="cpu")
    _C.pointcloud_quantize(points, batch, sizes, cells, threads)
    order, _, _ = sort(cells, bounds(cells))
    found = _C.PointcloudVoxels(cells, order, threads)
    coords = torch.empty((len(found), cells.shape[1]), dtype=torch.int32, device="cpu")
    of_point = torch.empty(len(points), dtype=torch.int64, device="cpu")
    begins = torch.empty(len(found) + 1, dtype=torch.int64, device="cpu")
    found.write(coords, of_point, begins)
    return Voxels(coords, of_point, order, begins)


def reduce(features: Tensor, of: Voxels, how: str) -> Tensor:
    """[M, C]: a voxel's "mean", "first" or "max" of its points' features."""
    if features.device.type != "cpu":
        return plain.reduce(features, of.of_point, len(of.coords), how)
    out = features.new_empty((len(of.coords), features.shape[1]))
    _C.pointcloud_reduce(features, of.order, of.begins, how, out, torch.get_num_threads())
    return out
